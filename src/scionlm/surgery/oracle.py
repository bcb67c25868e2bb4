"""The oracle of a proof: the source itself, made to behave as the plan says, without a tensor of it being cut.

Dropped layers pass their input on; dropped heads and channels are multiplied by zero where they enter the residual
stream or leave an output projection, and norms count only the channels that are kept. It shares no code with the
cutting: it knows no layouts, only modules, and it would be as right for a model that nobody could cut.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.families import ModelShape, family_of
from scionlm.families.models import assemble
from scionlm.families.shape import expected_tensors
from scionlm.families.weights import Weights
from scionlm.surgery.plan import LayerPlan, SurgeryPlan


class _PassesOn(nn.Module):
    """In the place of a layer: its input."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states


def load_needed(config: dict[str, Any], donor: Weights, layers: set[int]) -> PreTrainedModel:
    """Return a donor in float32 with only the layers that are needed; the others pass their input on."""
    family = family_of(config)
    state: dict[str, torch.Tensor] = {}
    for place in expected_tensors(config):
        if place.layer is None or place.layer in layers:
            state[place.name] = donor.rows(place.name, 0, place.shape[0]).float()
    model = assemble(config, state, torch.float32)
    stack: Any = model.get_submodule(family.layers)
    for index in range(len(stack)):
        if index not in layers:
            stack[index] = _PassesOn()
    return model


def build_oracle(models: list[PreTrainedModel], plan: SurgeryPlan) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from source token ids to the logits that the target must give, over the source's vocabulary.

    Args:
        models: Each donor in float32 (`load_needed`); the first is changed.
        plan: Without random parts: what they give cannot be foreseen.
    """
    model = models[0]
    config = model.config.to_dict()
    family = family_of(config)
    stack: Any = model.get_submodule(family.layers)
    if plan.is_subset:
        sources = dict(zip(plan.keep, plan.layers, strict=True))
        modules = [(layer, sources.get(index)) for index, layer in enumerate(stack)]
    else:
        modules = _rearranged(models, plan)
        for key in family.per_layer_config:
            value = getattr(model.config, key, None)
            if value is not None:
                donors = [getattr(donor.config, key) for donor in models]
                setattr(model.config, key, [donors[layer.donor][layer.index] for layer in plan.layers])
        setattr(model.config, family.key("num_hidden_layers"), len(plan.layers))
    parent, _, name = family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList([module for module, _ in modules]))
    shape = ModelShape.of(config)
    for module, layer in modules:
        if layer is not None and layer.init == "source":
            _mask_layer(module, layer, plan, config, shape)
    if plan.hidden is not None:
        kept = torch.tensor(plan.hidden)
        mask = _mask(shape.hidden_size, plan.hidden)
        for spec in family.outside:
            if spec.role in ("embedding", "position"):
                model.get_submodule(spec.module).register_forward_hook(_masks_output(mask))
        _count_kept_only(model.get_submodule(family.one("final_norm").module), kept)

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return logits


def _rearranged(models: list[PreTrainedModel], plan: SurgeryPlan) -> list[tuple[nn.Module, LayerPlan | None]]:
    """Return the donors' own layers in the plan's order; a copy where one stands twice, as each gets its own masks."""
    result: list[tuple[nn.Module, LayerPlan | None]] = []
    seen: set[tuple[int, int]] = set()
    for layer in plan.layers:
        stack: Any = models[layer.donor].get_submodule(family_of(models[layer.donor].config.to_dict()).layers)
        if layer.init != "source":
            result.append((_PassesOn(), None))
            continue
        module = stack[layer.index]
        result.append((copy.deepcopy(module) if (layer.donor, layer.index) in seen else module, layer))
        seen.add((layer.donor, layer.index))
    return result


def _mask_layer(
    module: nn.Module, layer: LayerPlan, plan: SurgeryPlan, config: dict[str, Any], shape: ModelShape
) -> None:
    heads, kv_heads = layer.heads, layer.kv_heads
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    if heads is None and kv_heads is not None:
        heads = tuple(h for h in range(shape.num_attention_heads) if h // per_group in kv_heads)
    channels = {
        "heads": _channels(heads, shape.head_dim),
        "kv_heads": _channels(kv_heads, shape.head_dim),
        "hidden": None if plan.hidden is None else list(plan.hidden),
    }
    for spec in family_of(config).layer:
        if not spec.name.endswith(".weight") or spec.repeat is not None:
            continue
        if spec.role == "attention_output" and channels["heads"] is not None:
            size = shape.num_attention_heads * shape.head_dim
            _mask_input(module.get_submodule(spec.module), _mask(size, channels["heads"]))
        elif spec.role == "mlp_output" and layer.ffn is not None:
            _mask_input(module.get_submodule(spec.module), _mask(shape.intermediate_size, layer.ffn))
        elif spec.role in ("attention_norm", "mlp_norm", "query_norm", "key_norm"):
            kept = channels.get(spec.axes[0])
            if kept is not None and family_of(config).has(spec, config):
                _count_kept_only(module.get_submodule(spec.module), torch.tensor(kept))


def _channels(units: tuple[int, ...] | None, size: int) -> list[int] | None:
    return None if units is None else [unit * size + i for unit in units for i in range(size)]


def _mask(size: int, kept: list[int] | tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(size)
    mask[torch.tensor(kept)] = 1.0
    return mask


def _masks_output(mask: torch.Tensor) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
    return lambda module, args, output: output * mask


def _mask_input(module: nn.Module, mask: torch.Tensor) -> None:
    module.register_forward_pre_hook(lambda m, args: (args[0] * mask, *args[1:]))


def _count_kept_only(norm: nn.Module, kept: torch.Tensor) -> None:
    """Make a norm's statistics and output those of the kept channels; the others come out as zero.

    The norm's own forward runs on the kept channels, whatever kind of norm it is.
    """
    narrow = copy.deepcopy(norm)
    for name, parameter in list(narrow.named_parameters(recurse=False)):
        setattr(narrow, name, nn.Parameter(parameter.detach()[kept]))
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (len(kept),)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x).index_copy_(-1, kept, narrow(x[..., kept]))

    norm.forward = forward
