"""Proof that a target is what the plan says, on a small random batch in float32; and a check of files by tensor.

The oracle (`surgery.oracle`) is the source itself with what is dropped switched off: it shares no code with the
cutting.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.errors import ScionError
from scionlm.families import count_parameters, family_of
from scionlm.families.weights import FolderWeights, Weights
from scionlm.sources import load_hf_model, open_folder
from scionlm.sources.tensors import FolderTensors
from scionlm.surgery.apply import blocks, lazy_fresh
from scionlm.surgery.operations import Operation
from scionlm.surgery.oracle import build_oracle, load_needed
from scionlm.surgery.plan import SurgeryPlan

_BATCH, _LENGTH, _NEW_TOKENS = 2, 24, 8
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


def _token_batch(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_tokens, (_BATCH, _LENGTH), generator=generator)


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
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
    family = family_of(configs[0])
    fresh = bool(plan.fresh) or any(layer.init == "random" for layer in plan.layers)
    if not fresh:
        needed = [
            {layer.index for layer in plan.layers if layer.donor == number and layer.init == "source"}
            for number in range(len(donors))
        ]
        models = [load_needed(*each) for each in zip(configs, donors, needed, strict=True)]
        oracle = build_oracle(models, plan)
        num_tokens = int(configs[0]["vocab_size"]) if plan.vocab is None else len(plan.vocab)
        ids = _token_batch(num_tokens)
        rows = torch.arange(num_tokens) if plan.vocab is None else torch.tensor(plan.vocab)
        expected_layers = _watch(models[0], family.layers)
        expected = oracle(rows[ids])[..., rows]
        found_layers = _watch(target, family.layers)
        logits = target(input_ids=ids, use_cache=False).logits
        found = logits[..., :num_tokens]
        worst = float((expected - found).abs().max())
        largest = float(expected.abs().max())
        folded = family.inverse_layer_scale is not None and bool(configs[0].get(family.inverse_layer_scale))
        moved = plan.keep != tuple(range(len(plan.keep)))
        exact = not plan.cuts_width and not (folded and moved)
        name = "logits equal the source's with the dropped layers as identity, bitwise"
        if not plan.is_subset:
            name = "logits equal those of the donors' own layers run in this order, bitwise"
        if plan.cuts_width:
            name = f"logits equal the source's under 0/1 masks, within {TOLERANCE:g} of the largest"
        elif not exact:
            name = f"logits equal the source's with the dropped layers as identity, within {TOLERANCE:g} of the largest"
        holds = torch.equal(expected, found) if exact else worst <= TOLERANCE * max(largest, 1e-3)
        detail = "" if holds else _where(expected_layers, found_layers, plan, worst, largest)
        proof.require(name, holds, detail)
        if plan.vocab_padding:
            winner = logits.argmax(-1)
            proof.require("no padded row of the vocabulary is ever the most likely", bool((winner < num_tokens).all()))
        del models
    try:
        ids = _token_batch(int(target.config.vocab_size) - plan.vocab_padding)
        cached_equals = torch.equal(_greedy(target, ids, True), _greedy(target, ids, False))
    except (RuntimeError, IndexError):  # a cache that does not fit the layers fails anywhere inside
        cached_equals = False
    proof.require("cached greedy generation equals uncached", cached_equals)
    config = target.config.to_dict()
    formula = count_parameters(family_of(config), config)["total"]
    proof.require(f"{formula} parameters, as the formula says", sum(p.numel() for p in target.parameters()) == formula)
    return proof


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
    folder: Path, found: list[Operation], donors: list[Weights], config: dict[str, Any], plan: SurgeryPlan
) -> Proof:
    """Check written files against their donors, tensor by tensor, bitwise, with a block of memory.

    Raises:
        ScionError: A tensor is missing, too many, or differs; the message names it, and its layer.
    """
    proof = Proof()
    fresh = lazy_fresh(config, plan.seed)
    with FolderTensors(folder) as tensors:
        written = FolderWeights(config, tensors, folder)
        names = {operation.place.name for operation in found}
        wrong = sorted(names ^ written.names())
        proof.require("the files hold the tensors of the configuration and no others", not wrong, f"({wrong[:1]})")
        for operation in found:
            start = 0
            for block in blocks(operation, donors, fresh):
                again = written.rows(operation.place.name, start, start + block.shape[0])
                if not torch.equal(_bits(again), _bits(block.to(again.dtype))):
                    proof.require(f"tensor {operation.place.name} reads back as it should", False)
                start += block.shape[0]
    proof.checks.append(f"{len(found)} tensors read back from the files equal their donors', bitwise")
    return proof


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
