"""Gates on a transformers model as it is: hooks that multiply, and norms that count the open channels only.

Where each acts: hidden channels on embeddings, on what attention and MLP add to the residual stream, and on norms;
heads and MLP channels on what their output projection reads; layers on what attention and MLP add. Shapes never change
and nothing looks at a value, so that a compiler and every attention kernel see an ordinary model. The hooks find their
values as attributes of the module that they are on: that way all layers share one compiled pass.

Source: Xia et al. (Sheared LLaMA), arXiv:2310.06694, appendix C.
Differs: its norms gather the open channels, which makes the device wait and shapes change; here they are the model's
    own, on an input that is scaled so that its mean square is that of the open channels. The embedding is masked in
    training too, as it is when the model is cut.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scionlm.families import FamilySpec, ModelShape, family_of
from scionlm.families.models import layers_of

Values = Mapping[str, torch.Tensor]
"""Gates by axis, `[rows, units]`, float32; an axis without gates is left out."""
_BRANCHES = {"attention_output": "attention", "mlp_output": "mlp"}


class Masks:
    """The gates' hooks on a model.

    Args:
        model: The model; its weights and its class stay what they are.

    Raises:
        DataError: The family is unknown.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: dict[str, Any] = model.config.to_dict()
        family = family_of(config)
        self._shape = ModelShape.of(config)
        self._handles: list[RemovableHandle] = []
        self._embeddings: list[Any] = []
        self._layers = [_Layer(self, layer, family, config) for layer in layers_of(model)]
        for spec in family.outside:
            if spec.role in ("embedding", "position"):
                module = model.get_submodule(spec.module)
                self._embeddings.append(module)
                self.after(module, _gate_output)
        self._final: Any = model.get_submodule(family.one("final_norm").module)
        self.around_norm(self._final, family)
        self.set({})

    def before(self, module: nn.Module, hook: Any) -> None:
        """Have a hook called before a module."""
        self._handles.append(module.register_forward_pre_hook(hook))

    def after(self, module: nn.Module, hook: Any) -> None:
        """Have a hook called after a module."""
        self._handles.append(module.register_forward_hook(hook))

    def around_norm(self, module: nn.Module, family: FamilySpec) -> None:
        """Have a norm count the open channels only."""
        self.before(module, _center if family.norm_centered else _scale)
        self.after(module, _gate_norm)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set(self, values: Values) -> None:
        """Take values for the passes to come, and for making activations again on their way back."""
        shape = self._shape
        layers, groups, heads = shape.num_hidden_layers, shape.num_key_value_heads, shape.num_attention_heads

        def row(name: str, units: int, rows: int = 1) -> torch.Tensor:
            return values[name] if name in values else _ones(values, rows, units)

        hidden = row("hidden", shape.hidden_size).view(-1)
        depth = {name: row(name if name in values else "layers", layers).view(-1) for name in ("attention", "mlp")}
        outer = row("groups", groups, layers)
        inner = row("heads", heads // groups, layers * groups).view(layers, groups, heads // groups)
        by_head = (outer.unsqueeze(-1) * inner).view(layers, heads).repeat_interleave(shape.head_dim, 1)
        by_group = (outer * (inner.detach() != 0).any(-1)).repeat_interleave(shape.head_dim, 1)
        ffn = row("ffn", shape.intermediate_size, layers)
        norm = _norm_values(hidden)
        for module in self._embeddings:
            module.gate_output = hidden
        _set_norm(self._final, norm)
        added = {name: gate.unsqueeze(1) * hidden for name, gate in depth.items()}
        for index, layer in enumerate(self._layers):
            own = {name: rows[index] for name, rows in added.items()}
            layer.set(hidden, norm, own, by_head[index], by_group[index], ffn[index])


class _Layer:
    """The gated modules of one layer."""

    def __init__(self, masks: Masks, layer: nn.Module, family: FamilySpec, config: dict[str, Any]) -> None:
        self._projections: list[tuple[str, Any, bool]] = []
        self._norms: list[tuple[str, Any]] = []
        seen: set[str] = set()
        for spec in family.layer:
            if not spec.name.endswith(".weight") or spec.repeat is not None or not family.has(spec, config):
                continue
            module: Any = layer.get_submodule(spec.module)
            if spec.role in _BRANCHES:
                normed = norms_output(family, spec.role)
                self._projections.append((_BRANCHES[spec.role], module, normed))
                masks.before(module, _gate_input)
                if not normed:
                    masks.after(module, _gate_output)
            elif spec.role in ("attention_norm", "mlp_norm"):
                behind = spec.role.replace("norm", "output") in seen
                self._norms.append((spec.part.removesuffix("_norm") if behind else "input", module))
                masks.around_norm(module, family)
            elif spec.role in ("query_norm", "key_norm") and spec.axes[0] in ("heads", "kv_heads"):
                self._norms.append((spec.axes[0], module))
                masks.around_norm(module, family)
            seen.add(spec.role)

    def set(
        self,
        hidden: torch.Tensor,
        norm: tuple[torch.Tensor, ...],
        added: Mapping[str, torch.Tensor],
        heads: torch.Tensor,
        groups: torch.Tensor,
        ffn: torch.Tensor,
    ) -> None:
        """Take values: of hidden channels, of what each half adds, and along the axes inside."""
        inner = {"attention": heads, "mlp": ffn}
        for branch, module, normed in self._projections:
            module.gate_input = inner[branch]
            if not normed:
                module.gate_output = added[branch]
        for what, module in self._norms:
            if what in ("heads", "kv_heads"):  # what such a norm gives out is gated where attention ends
                counted = (heads if what == "heads" else groups).detach()
                _set_norm(module, _norm_values((counted != 0).to(counted.dtype)))
            else:
                _set_norm(module, norm if what == "input" else _norm_values(hidden, added[what]))


def norms_output(family: FamilySpec, role: str) -> bool:
    """Return whether a norm stands between an output projection and the residual stream."""
    roles = [spec.role for spec in family.layer if spec.name.endswith(".weight")]
    return role.replace("output", "norm") in roles[roles.index(role) :]  # pyright: ignore[reportArgumentType]


def _ones(values: Values, rows: int, units: int) -> torch.Tensor:
    like = next(iter(values.values()), torch.ones(()))
    return torch.ones(rows, units, dtype=like.dtype, device=like.device)


def _norm_values(gates: torch.Tensor, after: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Return what a norm is given: which channels count, how many of all do (a ratio), and what its output takes."""
    counted = (gates.detach() != 0).to(gates.dtype)
    ratio = counted.numel() / counted.sum().clamp(min=1.0)
    out = gates if after is None else after
    return counted, ratio, out


def _set_norm(module: Any, values: tuple[torch.Tensor, ...]) -> None:
    counted, ratio, out = values
    scale = ratio.sqrt()
    module.gate_counted, module.gate_ratio, module.gate_scale = counted, ratio, scale
    module.gate_scaled, module.gate_bias = out / scale, out - out / scale


def _gate_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0] * module.gate_input.to(args[0].dtype), *args[1:]


def _gate_output(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output * module.gate_output.to(output.dtype)


def _scale(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a norm by mean square an input whose mean square over all channels is that of the open ones."""
    x = args[0]
    return (x * (module.gate_counted * module.gate_scale)).to(x.dtype), *args[1:]


def _center(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a norm by variance an input whose mean is that of the open channels, and whose variance is theirs."""
    x, counted = args[0], module.gate_counted
    mean = (x * counted).mean(-1, keepdim=True) * module.gate_ratio
    return ((x * counted + mean * (1 - counted)) * module.gate_scale).to(x.dtype), *args[1:]


def _gate_norm(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Take the scale off what a norm gives out, but not off its bias, and gate it."""
    bias = getattr(module, "bias", None)
    scaled = output * module.gate_scaled
    return (scaled if bias is None else scaled + bias * module.gate_bias).to(output.dtype)
