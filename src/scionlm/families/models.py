"""transformers models out of configurations and weights: empty, random, assembled."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.families.initialization import OUTPUTS, Init, standard_deviations
from scionlm.families.registry import family_of
from scionlm.families.shape import ModelShape, TensorPlace, expected_tensors
from scionlm.sources.quiet import quiet_transformers, refusals


def empty_model(config: dict[str, Any], dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return a model whose weights are not set: memory is reserved, nothing is computed.

    Raises:
        DataError: transformers cannot make a model of this configuration.
    """
    from transformers.initialization import no_init_weights

    with refusals(), no_init_weights():
        hf_config = AutoConfig.for_model(**copy.deepcopy(config))  # transformers fills in nested sections in place
        return AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        ).eval()


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model, in order."""
    return list(model.get_submodule(family_of(model.config.to_dict()).layers).children())


def random_model(
    config: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32, init: Init = "transformers"
) -> PreTrainedModel:
    """Return a model with random weights from `seed`: those of every model from scratch, and of every control."""
    if init != "transformers":
        return assemble(config, _drawn(config, seed, init), dtype)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**copy.deepcopy(config)), dtype=dtype, trust_remote_code=False
        ).eval()


def _drawn(config: dict[str, Any], seed: int, init: Init) -> dict[str, torch.Tensor]:
    """Return every weight of a model as `init` draws it, by name, in float32."""
    family, generator = family_of(config), torch.Generator().manual_seed(seed)
    others, outputs = standard_deviations(init, ModelShape.of(config))

    def draw(place: TensorPlace) -> torch.Tensor:
        weights = torch.empty(place.shape)
        if weights.dim() == 1:
            is_gain = place.spec.role.endswith("norm") and place.spec.name.endswith(".weight")
            return weights.fill_(1.0 - family.norm_offset if is_gain else 0.0)
        return weights.normal_(0.0, outputs if place.spec.role in OUTPUTS else others, generator=generator)

    return {place.name: draw(place) for place in expected_tensors(config)}


def assemble(
    config: dict[str, Any], state: dict[str, torch.Tensor], dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return a model with these weights; tensors that are not in `state` stay unset, ties are tied.

    Args:
        config: Its `config.json`.
        state: Weights by full name.
        dtype: Type of all weights.
        attn_implementation: transformers' name of the attention kernel; None leaves the choice to it.

    Raises:
        DataError: A tensor is not one of the model's.
    """
    model = empty_model(config, dtype, attn_implementation)
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    unknown = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    if unknown:
        raise DataError(f"tensor {unknown[0]!r} is not one that model_type {config['model_type']!r} has")
    model.requires_grad_(True)
    model.tie_weights()
    return model
