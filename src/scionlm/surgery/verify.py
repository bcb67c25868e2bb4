"""Proof that a target is what the plan says, on a small random batch in float32; and a check of files by tensor.

The oracle (`surgery.oracle`) is the source itself with what is dropped switched off: it shares no code with the
cutting.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.errors import ScionError
from scionlm.families import ModelShape, count_parameters, family_of
from scionlm.families.shape import context_length
from scionlm.families.weights import Weights
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.apply import blocks, lazy_fresh, whole
from scionlm.surgery.fresh import FreshTensors
from scionlm.surgery.operations import Operation
from scionlm.surgery.oracle import build_oracle, load_needed
from scionlm.surgery.plan import SurgeryPlan

_BATCH, _LENGTH, _NEW_TOKENS = 2, 24, 8
# Sliding windows are made this short for the proof: in one of thousands, 24 tokens would not tell layers apart by kind.
_WINDOW = 7
# Rows of each tensor that a sample looks at, less one.
_SAMPLED = 7
# Sums of other lengths round otherwise; a wrong channel is off by more than a hundred times this.
TOLERANCE = 1e-5


@dataclass
class Proof:
    """The checks that were made and passed, in words."""

    checks: list[str] = field(default_factory=lambda: [])

    def require(self, name: str, holds: bool, detail: str = "") -> None:
        """Record a check.

        Raises:
            ScionError: It does not hold; the result must not be used.
        """
        if not holds:
            raise ScionError(f"surgery failed its own proof: {name}{detail and ' ' + detail}; nothing was written")
        self.checks.append(name)


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
    """Prove a target in float32 against its donors.

    Layers that are left out or moved must give the very same logits, bit for bit. Where channels are cut, or a factor
    is folded into weights, sums are of other lengths or roundings and agree within `TOLERANCE` of the largest logit.
    Weights that are freshly drawn have no oracle; the plan's other checks still hold.

    Raises:
        ScionError: A check fails; the message says which, and the first layer that differs.
    """
    proof = Proof()
    config = target.config.to_dict()
    num_tokens = ModelShape.of(config).vocab_size - plan.vocab_padding
    length = min(_LENGTH, (context_length(config) or _LENGTH) - _NEW_TOKENS)
    ids = random_tokens(num_tokens, max(1, length))
    with short_windows(target):
        found_layers = _watch(target, family_of(config).layers)
        logits = target(input_ids=ids, use_cache=False).logits
        if not plan.fresh and all(layer.init != "random" for layer in plan.layers):
            _prove_logits(configs, donors, plan, ids, logits[..., :num_tokens], found_layers, proof)
        if plan.vocab_padding:
            wins = bool((logits.argmax(-1) >= num_tokens).any())
            proof.require("no padded row of the vocabulary is ever the most likely", not wins)
        if length >= 1:
            try:
                cached_equals = torch.equal(greedy(target, ids, use_cache=True), greedy(target, ids, use_cache=False))
            except (RuntimeError, IndexError):  # a cache that does not fit the layers fails anywhere inside
                cached_equals = False
            proof.require("cached greedy generation equals uncached", cached_equals)
    formula = count_parameters(family_of(config), config)["total"]
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
    expected_layers = _watch(models[0], family.layers)
    rows = torch.arange(found.shape[-1]) if plan.vocab is None else torch.tensor(plan.vocab)
    with short_windows(*models):
        expected = oracle(rows[ids])[..., rows]
    folded = bool(family.inverse_layer_scale and configs[0].get(family.inverse_layer_scale))
    exact = not plan.cuts_width and not (folded and plan.keep != tuple(range(len(plan.keep))))
    name = "logits equal the source's with the dropped layers as identity"
    if not plan.is_subset:
        name = "logits equal those of the donors' own layers run in this order"
    if plan.cuts_width:
        name = "logits equal the source's under 0/1 masks"
    worst, largest = float((expected - found).abs().max()), float(expected.abs().max())
    holds = torch.equal(expected, found) if exact else worst <= TOLERANCE * max(largest, 1e-3)
    detail = "" if holds else _where(expected_layers, found_layers, plan, worst, largest)
    proof.require(f"{name}, {'bitwise' if exact else f'within {TOLERANCE:g} of the largest'}", holds, detail)


def _watch(model: PreTrainedModel, layers: str) -> list[torch.Tensor]:
    """Return a list that fills with the output of each layer, in the order they run, layers passed over left out."""
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    stack: Any = model.get_submodule(layers)
    for layer in stack:
        if any(True for _ in layer.parameters()):
            layer.register_forward_hook(note)
    return seen


def _where(
    expected: list[torch.Tensor], found: list[torch.Tensor], plan: SurgeryPlan, worst: float, largest: float
) -> str:
    """Return the first layer of the target whose output is off, for the message."""
    size = f"largest difference {worst:g} of {largest:g}"
    numbers = [i for i, layer in enumerate(plan.layers) if layer.init == "source"]
    if len(found) > len(expected):  # fresh layers have no counterpart
        found = [found[i] for i in numbers]
    for number, mine, theirs in zip(numbers, found, expected, strict=False):
        kept = theirs if plan.hidden is None else theirs[..., torch.tensor(plan.hidden)]
        if mine.shape != kept.shape or float((mine - kept).abs().max()) > 10 * TOLERANCE * float(kept.abs().max()):
            return f"({size}; the first layer that differs is {number}, from the source's {plan.layers[number].index})"
    return f"({size}; the layers agree, so it lies behind them: final norm or head)"


@torch.no_grad()
def check_files(
    found: list[Operation],
    donors: list[Weights],
    config: dict[str, Any],
    plan: SurgeryPlan,
    written: Weights,
    sample: bool = False,
) -> Proof:
    """Check written files against their donors, tensor by tensor, bitwise, with a block of memory.

    Args:
        found: What was to be done.
        donors: The donors' tensors.
        config: The target's `config.json`.
        plan: What was made of them.
        written: The target's tensors.
        sample: Look at the first, the last and some rows between of each tensor only.

    Raises:
        ScionError: A tensor is missing, too many, or differs; the message names it, and with it its layer.
    """
    proof = Proof()
    fresh = lazy_fresh(config, plan.seed)
    names = {operation.place.name for operation in found}
    wrong = sorted(names ^ written.names())
    proof.require("the files hold the tensors of the configuration and no others", not wrong, f"({wrong[:1]})")
    for operation in found:
        name = operation.place.name
        if sample and operation.fill == "source":
            rows = sorted({number * (operation.num_rows - 1) // _SAMPLED for number in range(_SAMPLED + 1)})
            again = torch.cat([written.rows(name, row, row + 1) for row in rows])
            pieces = [(0, whole(operation.narrowed(rows), donors, fresh), again)]
        else:
            pieces = _pieces(operation, donors, fresh, written)
        for start, block, again in pieces:
            if not torch.equal(_bits(again), _bits(block.to(again.dtype))):
                proof.require("every tensor reads back as it should", holds=False, detail=f"({name}, from row {start})")
    what = "rows of all" if sample else "all"
    proof.checks.append(f"{what} {len(found)} tensors read back from the files equal their donors', bitwise")
    return proof


def _pieces(
    operation: Operation, donors: list[Weights], fresh: Callable[[], FreshTensors], written: Weights
) -> Generator[tuple[int, torch.Tensor, torch.Tensor], None, None]:
    start = 0
    for block in blocks(operation, donors, fresh):
        yield start, block, written.rows(operation.place.name, start, start + block.shape[0])
        start += block.shape[0]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes: a NaN of the source equals itself here."""
    return tensor.contiguous().view(torch.uint8)


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
