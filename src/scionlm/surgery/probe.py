"""The proof for models larger than memory: layer by layer, with one layer of each kind in memory at a time.

A layer is looked at alone, between the real embedding of a few tokens and the real norm and head, once in its donor
(with masks, as in the whole proof) and once in the files that were written.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from scionlm.families import ModelShape, family_of
from scionlm.families.shape import context_length
from scionlm.families.weights import Weights
from scionlm.surgery.apply import whole
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.fresh import lazy_fresh
from scionlm.surgery.oracle import build_oracle, load_needed
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.proof import Proof
from scionlm.surgery.surgery import Surgery
from scionlm.surgery.target import per_layer_lists, target_config
from scionlm.surgery.verify import random_tokens, short_windows, tolerance

_TOKENS = 64


class _OneLayer:
    """A model's weights seen as those of a model of one layer and a few tokens."""

    def __init__(
        self, config: dict[str, Any], outside: Weights, layers: Weights, index: int, tokens: Sequence[int]
    ) -> None:
        family = family_of(config)
        self._outside, self._layers, self._tokens = outside, layers, tokens
        self._stack = f"{family.layers}."
        self._prefix, self._own = f"{self._stack}0.", f"{self._stack}{index}."
        self._by_token = {spec.name for spec in family.outside if spec.axes[0] == "vocab"}

    def names(self) -> set[str]:
        """Return the names of the one layer's tensors and of those outside the layers."""
        outside = {name for name in self._outside.names() if not name.startswith(self._stack)}
        own = {name for name in self._layers.names() if name.startswith(self._own)}
        return outside | {name.replace(self._own, self._prefix, 1) for name in own}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        if name.startswith(self._prefix):
            return self._layers.shape(name.replace(self._prefix, self._own, 1))
        shape = self._outside.shape(name)
        return (len(self._tokens), *shape[1:]) if name in self._by_token else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type."""
        if name.startswith(self._prefix):
            return self._layers.dtype(name.replace(self._prefix, self._own, 1))
        return self._outside.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor; of the vocabulary's, those of the few tokens."""
        if name.startswith(self._prefix):
            return self._layers.rows(name.replace(self._prefix, self._own, 1), start, stop)
        if name in self._by_token:
            return torch.cat([self._outside.rows(name, token, token + 1) for token in self._tokens[start:stop]])
        return self._outside.rows(name, start, stop)


class _Exact:
    """The written tensors, but for fresh ones, which are inherited here, and scaled ones, which are not rounded."""

    def __init__(self, surgery: Surgery, written: Weights) -> None:
        self._surgery, self._written = surgery.without_fresh(), written
        fresh = {op.place.name for op in surgery.operations if op.fill == "random"}
        self._made = {
            op.place.name: op for op in self._surgery.operations if op.scale is not None or op.place.name in fresh
        }

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return self._written.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._written.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type."""
        return self._written.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor."""
        if name not in self._made:
            return self._written.rows(name, start, stop)
        operation = self._made[name].narrowed(list(range(start, stop)))
        return whole(operation, self._surgery.weights, lazy_fresh(self._surgery.config, self._surgery.plan.seed))


def _alone(config: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the configuration of a model of one layer, `index`, and a few tokens."""
    total = ModelShape.of(config).num_hidden_layers
    alone = target_config([config], plan_depth(total, keep=[index])) | {"vocab_size": _TOKENS}
    return {key: None if key.endswith("_token_id") else value for key, value in alone.items()}


def _kinds(config: dict[str, Any], plan: SurgeryPlan) -> list[int]:
    """Return the first inherited layer of the target of each kind that per-layer lists tell apart."""
    lists = per_layer_lists(family_of(config), config)
    first: dict[tuple[Any, ...], int] = {}
    for number, layer in enumerate(plan.layers):
        if layer.init == "source":
            first.setdefault((layer.donor, *(values[number] for values in lists.values())), number)
    return sorted(first.values())


@torch.no_grad()
def probe_layers(surgery: Surgery, written: Weights, proof: Proof) -> None:
    """Prove one inherited layer of each kind of the written target; add what holds to `proof`.

    Args:
        surgery: What was to be done.
        written: The target's tensors.
        proof: Gets the checks.

    Raises:
        ScionError: A layer differs; the message names it.
    """
    exact = _Exact(surgery, written)
    surgery = surgery.without_fresh()
    plan, config, donors = surgery.plan, surgery.config, surgery.weights
    configs = [folder.config for folder in surgery.folders]
    rows = ModelShape.of(config).vocab_size - plan.vocab_padding
    tokens = [number * rows // _TOKENS for number in range(_TOKENS)]
    source_tokens = tokens if plan.vocab is None else [plan.vocab[token] for token in tokens]
    ids = random_tokens(_TOKENS, min(24, context_length(config) or 24))
    numbers = _kinds(config, plan)
    bound = tolerance(configs[0])
    for number in numbers:
        layer = plan.layers[number]
        small = _alone(configs[layer.donor], layer.index)
        model = load_needed(small, _OneLayer(small, donors[0], donors[layer.donor], layer.index, source_tokens), {0})
        _set_place(model, layer.index)
        alone = replace(
            plan,
            donors=plan.donors[:1],
            donor_layers=(1,),
            layers=(replace(layer, index=0, donor=0),),
            vocab=None,
            vocab_padding=0,
        )
        oracle = build_oracle([model], alone)
        with short_windows(model):
            expected = oracle(ids)
        del model, oracle
        own = _alone(config, number)
        target = load_needed(own, _OneLayer(own, exact, exact, number, tokens), {0})
        _set_place(target, number)
        with short_windows(target):
            found = target(input_ids=ids, use_cache=False).logits
        del target
        worst, largest = float((expected - found).abs().max()), float(expected.abs().max())
        if not worst <= bound * max(largest, 1e-3):
            detail = f"(layer {number}, from the source's {layer.index}: largest difference {worst:g} of {largest:g})"
            proof.require("a layer alone gives the source's logits", holds=False, detail=detail)
    proof.checks.append(
        f"layers {', '.join(map(str, numbers))}, each alone between embedding and head, give the source's logits under "
        f"0/1 masks, within {bound:g} of the largest"
    )


def _set_place(model: torch.nn.Module, index: int) -> None:
    """Give a lone layer back its number, which GPT-2 can scale its scores by: by the factor that it made of it."""
    for module in model.modules():
        place = getattr(module, "layer_idx", None)
        if not isinstance(place, int):
            continue
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            vars(module)["scaling"] = vars(module)["scaling"] * (place + 1) / (index + 1)
        vars(module)["layer_idx"] = index
