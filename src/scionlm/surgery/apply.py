"""Build the target: inherited tensors copied, the rest of the configuration kept, per-layer lists cut to match.

Everything outside the layers comes along: embeddings, final norm, head, ties. (The published Inheritune code forgets
the final norm, and for untied models the embeddings: *when attention collapses*, its own repository.)
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.families import family_of
from scionlm.families.shape import check_tensors
from scionlm.sources.quiet import quiet_transformers
from scionlm.surgery.depth import DepthPlan

_NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")


def target_config(config: dict[str, Any], plan: DepthPlan) -> dict[str, Any]:
    """Return the target's `config.json`: the number of layers and every per-layer list cut to the plan.

    Raises:
        DataError: A list in the configuration has one entry a layer but is not one that the family names.
    """
    family = family_of(config)
    target = copy.deepcopy(config)
    target["num_hidden_layers"] = len(plan.keep)
    for key, value in config.items():
        if not isinstance(value, list) or len(value) != plan.num_source_layers:
            continue
        if key in _NOT_PER_LAYER:
            continue
        if key not in family.per_layer_config:
            raise DataError(f"config.json: {key} has one entry a layer, but the family does not say what it means")
        target[key] = [value[index] for index in plan.keep]
    return target


def target_tensors(config: dict[str, Any], plan: DepthPlan, names: list[str]) -> dict[str, str]:
    """Return the source's tensor for each of the target's, for a source with the tensors `names`."""
    prefix = family_of(config).layers + "."
    place = {source: target for target, source in enumerate(plan.keep)}
    result: dict[str, str] = {}
    for name in names:
        if not name.startswith(prefix):
            result[name] = name
            continue
        index, rest = name.removeprefix(prefix).split(".", 1)
        if int(index) in place:
            result[f"{prefix}{place[int(index)]}.{rest}"] = name
    return result


def _empty_model(config: dict[str, Any], dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Return a model with the family's own random initialization."""
    hf_config = AutoConfig.for_model(**config)
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        ).eval()


def inherit_model(source: PreTrainedModel, plan: DepthPlan) -> PreTrainedModel:
    """Return a new model made of the plan's layers and all of the source's tensors outside the layers.

    The source's weights and configuration are left as they are; nothing is shared with it.

    Raises:
        DataError: The source has a tensor that its family does not know.
    """
    config = source.config.to_dict()
    state = source.state_dict()
    check_tensors(family_of(config), config, {name: tuple(t.shape) for name, t in state.items()}, "source")
    mapping = target_tensors(config, plan, list(state))
    dtype = next(iter(state.values())).dtype
    attention = source.config._attn_implementation or "sdpa"
    target = _empty_model(target_config(config, plan), dtype, attention)
    target.load_state_dict({name: state[origin].clone() for name, origin in mapping.items()}, strict=True)
    if source.generation_config is not None:
        target.generation_config = copy.deepcopy(source.generation_config)
    return target


def random_model(
    config: dict[str, Any], plan: DepthPlan, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the control: the plan's shape with the family's own random initialization from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _empty_model(target_config(config, plan), dtype, "sdpa")
