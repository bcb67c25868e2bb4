"""Proof that a target is what the plan says, on a small random batch in float32.

The oracle is the source itself with every dropped layer replaced by the identity: it shares no code with the cutting.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.errors import ScionError
from scionlm.families import count_parameters, family_of
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.depth import DepthPlan

_BATCH, _LENGTH, _NEW_TOKENS = 2, 24, 8


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


def _token_batch(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (_BATCH, _LENGTH), generator=generator)


@torch.no_grad()
def identity_logits(source: PreTrainedModel, plan: DepthPlan, ids: torch.Tensor) -> torch.Tensor:
    """Return the source's logits with every layer that the plan drops replaced by the identity."""
    layers: Any = source.get_submodule(family_of(source.config.to_dict()).layers)

    def passes_input_on(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    hooks = [
        layer.register_forward_hook(passes_input_on) for index, layer in enumerate(layers) if index not in plan.keep
    ]
    try:
        return source(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


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
def verify_inheritance(source: PreTrainedModel, target: PreTrainedModel, plan: DepthPlan) -> Proof:
    """Prove a depth cut, bitwise; both models in float32, where equal sums need no luck with rounding.

    A plan that keeps the source's order is compared with the source whose other layers are the identity; one that moves
    layers about has no such oracle and gets the other checks.

    Raises:
        ScionError: A check fails.
    """
    proof = Proof()
    ids = _token_batch(int(source.config.vocab_size))
    if list(plan.keep) == sorted(plan.keep):
        expected = identity_logits(source, plan, ids)
        found = target(input_ids=ids, use_cache=False).logits
        worst = float((expected - found).abs().max())
        proof.require(
            "logits equal the source's with the dropped layers as identity, bitwise",
            torch.equal(expected, found),
            f"(largest difference {worst:g})",
        )
    try:
        cached_equals = torch.equal(_greedy(target, ids, True), _greedy(target, ids, False))
    except (RuntimeError, IndexError):  # a cache that does not fit the layers fails anywhere inside
        cached_equals = False
    proof.require("cached greedy generation equals uncached", cached_equals)
    config = target.config.to_dict()
    formula = count_parameters(family_of(config), config)["total"]
    proof.require(f"{formula} parameters, as the formula says", sum(p.numel() for p in target.parameters()) == formula)
    pointers = {t.data_ptr() for t in source.state_dict().values()}
    shared = [name for name, t in target.state_dict().items() if t.data_ptr() in pointers]
    proof.require("no storage is shared with the source", not shared, f"({', '.join(shared[:2])})")
    return proof


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
    if model.config.tie_word_embeddings:
        head: Any = again.get_output_embeddings()
        embedding: Any = again.get_input_embeddings()
        proof.require("the head is tied to the embedding after reloading", head.weight is embedding.weight)
