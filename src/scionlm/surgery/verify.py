"""Proof that a target is what the plan says, on a small random batch in float32; and a check of files by tensor.

The oracle (`surgery.oracle`) is the source itself with what is dropped switched off: it shares no code with the
cutting.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.families import ModelShape, count_parameters, family_of
from scionlm.families.shape import context_length
from scionlm.families.weights import Weights
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.oracle import build_oracle, load_needed
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.proof import Proof
from scionlm.surgery.target import changed_settings

_BATCH, _LENGTH, _NEW_TOKENS = 2, 24, 8
# Sliding windows are made this short for the proof: in one of thousands, 24 tokens would not tell layers apart by kind.
_WINDOW = 7
# Sums of other lengths round otherwise; a wrong channel is off by more than a hundred times this.
_TOLERANCES = ((1_000_000, 1e-5), (float("inf"), 1e-4))


@contextmanager
def short_windows(*models: PreTrainedModel) -> Generator[None, None, None]:
    """Make every sliding window of the models short inside the block; full attention stays full."""
    with ExitStack() as stack:
        for model in models:
            for holder in (model.config, *model.modules()):
                window = getattr(holder, "sliding_window", None)
                if isinstance(window, int) and window > _WINDOW:
                    vars(holder)["sliding_window"] = _WINDOW
                    stack.callback(setattr, holder, "sliding_window", window)
        yield


def tolerance(config: dict[str, Any]) -> float:
    """Return how far logits of a model may be from the oracle's, as a share of the largest: it grows with the sums."""
    parameters = count_parameters(config)["total"]
    return next(bound for size, bound in _TOLERANCES if parameters < size)


def random_tokens(num_tokens: int, length: int = _LENGTH) -> torch.Tensor:
    """Return the batch of ids below `num_tokens` that proofs run on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_tokens, (_BATCH, length), generator=generator)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Return the tokens that follow greedily, decoded by hand so that generation settings play no part."""
    out, cache = ids, None
    for _ in range(_NEW_TOKENS):
        step = out[:, -1:] if cache is not None else out
        result = model(input_ids=step, past_key_values=cache, use_cache=use_cache)
        cache = result.past_key_values if use_cache else None
        out = torch.cat([out, result.logits[:, -1:].argmax(-1)], dim=1)
    return out


@torch.no_grad()
def prove(configs: list[dict[str, Any]], donors: list[Weights], plan: SurgeryPlan, target: PreTrainedModel) -> Proof:
    """Prove a target in float32 against its donors; it is left as it was.

    Layers that are left out or moved must give the very same logits, bit for bit. Where channels are cut, or a factor
    is folded into weights, sums are of other lengths or roundings and agree within `tolerance` of the largest logit.
    Weights that are freshly drawn have no oracle; the plan's other checks still hold.

    Args:
        configs: `config.json` of each donor.
        donors: Their tensors.
        plan: What was made of them.
        target: The result, with no weight rounded to a narrower type than float32.

    Raises:
        ScionError: A check fails; the message says which, and the first layer that differs.
    """
    proof = Proof()
    config = target.config.to_dict()
    changed = changed_settings(configs[0], config, plan)
    proof.require("no setting differs from the source's but those that the plan changes", not changed, f"({changed})")
    num_tokens = ModelShape.of(config).vocab_size - plan.vocab_padding
    length = min(_LENGTH, (context_length(config) or _LENGTH + _NEW_TOKENS) - _NEW_TOKENS)
    ids = random_tokens(num_tokens, max(1, length))
    with short_windows(target):
        with _watched(target) as found_layers:
            logits = target(input_ids=ids, use_cache=False).logits
        if not plan.fresh and all(layer.init != "random" for layer in plan.layers):
            _prove_logits(configs, donors, plan, ids, logits[..., :num_tokens], found_layers, proof)
        if plan.vocab_padding:
            wins = bool((logits.argmax(-1) >= num_tokens).any())
            proof.require("no padded row of the vocabulary is ever the most likely", not wins)
        if length >= 1:
            try:  # a cache that does not fit the layers fails anywhere inside
                cached_equals = torch.equal(greedy(target, ids, use_cache=True), greedy(target, ids, use_cache=False))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError):
                cached_equals = False
            proof.require("cached greedy generation equals uncached", cached_equals)
    formula = count_parameters(config)["total"]
    proof.require(f"{formula} parameters, as the formula says", sum(p.numel() for p in target.parameters()) == formula)
    return proof


def _prove_logits(
    configs: list[dict[str, Any]],
    donors: list[Weights],
    plan: SurgeryPlan,
    ids: torch.Tensor,
    found: torch.Tensor,
    found_layers: list[torch.Tensor],
    proof: Proof,
) -> None:
    family = family_of(configs[0])
    needed = [
        {layer.index for layer in plan.layers if layer.donor == number and layer.init == "source"}
        for number in range(len(donors))
    ]
    models = [load_needed(*each) for each in zip(configs, donors, needed, strict=True)]
    oracle = build_oracle(models, plan)
    rows = torch.arange(found.shape[-1]) if plan.vocab is None else torch.tensor(plan.vocab)
    with short_windows(*models), _watched(models[0]) as expected_layers:
        expected = oracle(rows[ids])[..., rows]
    folded = bool(family.inverse_layer_scale and configs[0].get(family.inverse_layer_scale))
    exact = not plan.cuts_width and not (folded and plan.keep != tuple(range(len(plan.keep))))
    name = "logits equal the source's with the dropped layers as identity"
    if not plan.is_subset:
        name = "logits equal those of the donors' own layers run in this order"
    if plan.cuts_width:
        name = "logits equal the source's under 0/1 masks"
    worst, largest = float((expected - found).abs().max()), float(expected.abs().max())
    bound = tolerance(configs[0])
    holds = torch.equal(expected, found) if exact else worst <= bound * max(largest, 1e-3)
    detail = "" if holds else _where(expected_layers, found_layers, plan, worst, largest)
    proof.require(f"{name}, {'bitwise' if exact else f'within {bound:g} of the largest'}", holds, detail)


@contextmanager
def _watched(model: PreTrainedModel) -> Generator[list[torch.Tensor], None, None]:
    """Give a list that fills with the input of the first layer and the output of each, layers passed over left out."""
    seen: list[torch.Tensor] = []

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    stack: Any = model.get_submodule(family_of(model.config.to_dict()).layers)
    with ExitStack() as hooks:
        hooks.callback(stack[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer in stack:
            if any(True for _ in layer.parameters()):
                hooks.callback(layer.register_forward_hook(after).remove)
        yield seen


def _where(
    expected: list[torch.Tensor], found: list[torch.Tensor], plan: SurgeryPlan, worst: float, largest: float
) -> str:
    """Return where the target's residual stream first differs from the oracle's, for the message."""
    size = f"largest difference {worst:g} of {largest:g}"

    def differ(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
        kept = theirs if plan.hidden is None else theirs[..., torch.tensor(plan.hidden)]
        if mine.shape != kept.shape:
            return True
        if plan.cuts_width:
            return float((mine - kept).abs().max()) > 1e-4 * float(kept.abs().max())
        return not torch.equal(mine, kept)

    if differ(found[0], expected[0]):
        return f"({size}; it lies in front of the layers: the embeddings)"
    numbers = [i for i, layer in enumerate(plan.layers) if layer.init == "source"]
    outputs = found[1:] if len(found) == len(expected) else [found[1 + i] for i in numbers]
    for number, mine, theirs in zip(numbers, outputs, expected[1:], strict=False):
        if differ(mine, theirs):
            return f"({size}; the first layer that differs is {number}, from the source's {plan.layers[number].index})"
    return f"({size}; the layers agree, so it lies behind them: final norm or head)"


@torch.no_grad()
def verify_export(model: PreTrainedModel, folder: Path, proof: Proof, dtype: torch.dtype | None = None) -> None:
    """Prove that a saved folder loads as the same model, bitwise, with its ties intact.

    Args:
        model: What was saved.
        folder: Where.
        proof: Gets the checks.
        dtype: Type that was saved, when it is not the model's.

    Raises:
        ScionError: A tensor differs.
    """
    again = load_hf_model(open_folder(folder))
    saved: dict[str, Any] = again.state_dict()
    convert: Callable[[torch.Tensor], torch.Tensor] = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
    wrong = [name for name, t in model.state_dict().items() if not torch.equal(convert(t).cpu(), saved[name])]
    proof.require("saved and reloaded weights are equal, bitwise", not wrong, f"({', '.join(wrong[:2])})")
    require_ties(again, proof)


def require_ties(model: PreTrainedModel, proof: Proof) -> None:
    """Check that a reloaded model's head is its embedding where the configuration says so."""
    if model.config.tie_word_embeddings:
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        proof.require("the head is tied to the embedding after reloading", head.weight is embedding.weight)
