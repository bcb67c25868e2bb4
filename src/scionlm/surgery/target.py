"""The target's configuration: the source's own, with sizes and per-layer lists brought into line with the plan."""

import copy
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.families import FamilySpec, ModelShape, family_of
from scionlm.surgery.plan import SurgeryPlan, same_for_all

Config = dict[str, Any]
# Lists that have nothing to do with layers, whatever their length.
_NOT_PER_LAYER = (
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "keys_to_ignore_at_inference", "id2label", "label2id", "rope_parameters", "rope_scaling",
)  # fmt: skip
# A short way to write `layer_types`; some families keep it beside the list.
_PATTERN = "sliding_window_pattern"
# Settings that hold token numbers under another name.
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_SEQUENCES = ("bad_words_ids", "force_words_ids")  # a part of one says something else
# What may differ between two donors of one model.
_FREE = (
    "num_hidden_layers",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "architectures",
    "use_cache",
)


def resolved_config(config: Config) -> Config:
    """Return a configuration with everything that transformers fills in, such as lists that older files leave out.

    Raises:
        DataError: transformers does not accept it.
    """
    from transformers import AutoConfig

    from scionlm.sources.quiet import refusals

    with refusals():
        return AutoConfig.for_model(**copy.deepcopy(config)).to_dict()


def check_lists(family: FamilySpec, config: Config) -> None:
    """Check that every list in a configuration is one that Scion knows the meaning of.

    Raises:
        DataError: One is not; cutting layers could leave it wrong.
    """
    for key, value in config.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for name, item in inner:
            if isinstance(item, list) and item and key not in _NOT_PER_LAYER and key not in family.per_layer_config:
                where = f"{key}.{name}" if name else key
                raise DataError(
                    f"config.json: the family does not say whether the list {where!r} has to do with layers; "
                    "name it in per_layer_config of the family's page if it has one entry a layer"
                )


def per_layer_lists(family: FamilySpec, config: Config, filled: bool = True) -> dict[str, list[Any]]:
    """Return the lists with one entry a layer.

    Args:
        family: The family of the model.
        config: Its `config.json`.
        filled: Those included that transformers fills in.

    Raises:
        DataError: A list's length is not the number of layers.
    """
    check_lists(family, config)
    if not family.per_layer_config:
        return {}
    resolved = resolved_config(config) if filled else config
    check_lists(family, resolved)
    layers = ModelShape.of(config).num_hidden_layers
    lists = {key: resolved[key] for key in family.per_layer_config if resolved.get(key) is not None}
    for key, value in lists.items():
        if len(value) != layers:
            raise DataError(f"config.json: {key} has {len(value)} entries, but num_hidden_layers is {layers}")
    return lists


def target_config(configs: list[Config], plan: SurgeryPlan, *, for_a_plan: bool = False) -> Config:
    """Return the target's `config.json`.

    Args:
        configs: `config.json` of each donor.
        plan: What to make.
        for_a_plan: Only sizes matter: what transformers fills in is left out, and it is not asked whether it accepts
            sizes that it has no reason to refuse, so that it and torch are not imported.

    Raises:
        DataError: A configuration holds what its family does not explain, or donors do not fit together.
        UsageError: The sizes asked for cannot be written down for this family.
    """
    config, family = configs[0], family_of(configs[0])
    for other in configs[1:]:
        if other["model_type"] != config["model_type"]:
            raise DataError(
                f"the donors are of two families (model_type {config['model_type']} and {other['model_type']}); "
                "layers can only be joined from models of one kind"
            )
    lists = [per_layer_lists(family, donor, filled=not for_a_plan) for donor in configs]
    _check_donors(configs)
    target = copy.deepcopy(config)
    target[family.key("num_hidden_layers")] = len(plan.layers)
    target |= {key: [lists[layer.donor][key][layer.index] for layer in plan.layers] for key in lists[0]}
    if "layer_types" in lists[0] and not for_a_plan:
        _drop_pattern(target, config)
    if plan.is_subset:
        for key in family.layer_count_config:
            if isinstance(config.get(key), int):
                target[key] = sum(index < config[key] for index in plan.keep)
    if plan.vocab is not None or plan.vocab_padding:
        rows = ModelShape.of(config).vocab_size if plan.vocab is None else len(plan.vocab)
        if plan.vocab is not None and not for_a_plan:  # numbers that transformers fills in move along too
            resolved = resolved_config(config)
            filled = {key: value for key, value in resolved.items() if key.endswith("_token_id") and value is not None}
            target = filled | target
        target = remap_token_ids(target, plan) | {"vocab_size": rows + plan.vocab_padding}
    if plan.cuts_width:
        _set_width(target, family, ModelShape.of(config), plan)
        shape = ModelShape.of(target)
        if for_a_plan and shape.hidden_size % shape.num_attention_heads == 0:
            return target
        try:
            resolved_config(target)
        except DataError as error:
            resolved_config(config)  # if it is the source that transformers refuses, say so
            raise UsageError(f"{config['model_type']} cannot have these sizes: {error}") from error
    return target


def _drop_pattern(target: Config, source: Config) -> None:
    """Take the pattern out beside the list that it means, where transformers reads one or the other."""
    if _PATTERN in source and _PATTERN not in resolved_config(source):
        del target[_PATTERN]


def _set_width(target: Config, family: FamilySpec, source: ModelShape, plan: SurgeryPlan) -> None:
    heads = same_for_all(plan.layers, lambda layer: layer.heads) or source.num_attention_heads
    kv_heads = same_for_all(plan.layers, lambda layer: layer.kv_heads) or source.num_key_value_heads
    sizes = {
        "hidden_size": source.hidden_size if plan.hidden is None else len(plan.hidden),
        "intermediate_size": same_for_all(plan.layers, lambda layer: layer.ffn) or source.intermediate_size,
        "num_attention_heads": heads,
    }
    if family.has_kv_heads:
        sizes["num_key_value_heads"] = kv_heads
    if family.has_head_dim:
        sizes["head_dim"] = source.head_dim
    elif sizes["hidden_size"] != heads * source.head_dim:
        raise UsageError(
            f"{target['model_type']} has no head_dim setting: hidden_size {sizes['hidden_size']} must be "
            f"num_attention_heads {heads} times the source's head size {source.head_dim}; set both"
        )
    if heads % kv_heads:
        raise UsageError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    for name, value in sizes.items():
        target[family.key(name)] = value
    for key, wanted in family.required_config.items():
        if isinstance(wanted, str) and key in target:
            target[key] = target[family.key(wanted)]


def remap_token_ids(settings: Config, plan: SurgeryPlan) -> Config:
    """Return settings whose `*_token_id` entries follow the plan's vocabulary; a token that is gone becomes null."""
    if plan.vocab is None:
        return settings
    place = {source: token for token, source in enumerate(plan.vocab)}

    def moved(value: Any, whole: bool) -> Any:
        """Return a token's new number, or those of a list: with `whole`, none of a sequence that lacks one of them."""
        if isinstance(value, list):
            found = [moved(item, whole) for item in value]
            left = [item for item in found if item not in (None, [])]
            is_broken = whole and len(left) < len(found) and not any(isinstance(item, list) for item in value)
            return None if is_broken else left or None
        return place.get(value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {
        key: moved(value, key in _SEQUENCES) if key.endswith("_token_id") or key in _TOKEN_LISTS else value
        for key, value in settings.items()
    }


def _check_donors(configs: list[Config]) -> None:
    if len(configs) == 1:
        return
    family = family_of(configs[0])
    free = {*_FREE, family.key("num_hidden_layers"), *family.per_layer_config, *family.layer_count_config}
    first, *others = [resolved_config(config) for config in configs]
    for other in others:
        for key in sorted((first.keys() | other.keys()) - free):
            if first.get(key) != other.get(key):
                raise DataError(
                    f"the donors' configurations differ in {key} ({first.get(key)!r} and {other.get(key)!r}); "
                    "layers can only be joined from models of one kind and width"
                )


def changed_settings(source: Config, target: Config, plan: SurgeryPlan) -> str:
    """Return a key whose value the target has no reason to have otherwise than its source; empty where there is none.

    Args:
        source: `config.json` of the first donor.
        target: The target's configuration, as transformers reads it.
        plan: What was made of the source.
    """
    family = family_of(source)
    sizes = ("num_hidden_layers",)
    if plan.cuts_width:
        sizes += ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    free = {*_FREE, *map(family.key, sizes), *family.per_layer_config, *family.layer_count_config}
    if plan.cuts_width:
        free |= {key for key, wanted in family.required_config.items() if isinstance(wanted, str)}
    if plan.vocab is not None or plan.vocab_padding:
        free |= {"vocab_size", *_TOKEN_LISTS}
    before, after = resolved_config(source), resolved_config(target)
    for key in sorted((before.keys() | after.keys()) - free):
        if before.get(key) != after.get(key) and not (plan.vocab is not None and key.endswith("_token_id")):
            return f"{key}: {before.get(key)!r}, now {after.get(key)!r}"
    return ""


def unusual_settings(source: Config, target: Config) -> list[str]:
    """Return settings that a target has and its source had not, and that programs other than transformers may work out.

    They are per-layer lists other than transformers would make for this number of layers (llama.cpp works them out for
    some families), and a head size other than hidden_size / num_attention_heads where the family's configuration class
    has no field for it. Such a program would run the model wrongly.
    """
    family, shapes = family_of(target), (ModelShape.of(source), ModelShape.of(target))
    bare = {key: value for key, value in target.items() if key not in family.per_layer_config}
    usual = resolved_config(bare) if family.per_layer_config else {}
    found = [key for key in family.per_layer_config if key in target and target[key] != usual.get(key)]
    was, now = (shape.head_dim * shape.num_attention_heads == shape.hidden_size for shape in shapes)
    if was and not now:
        from transformers import AutoConfig

        if not hasattr(type(AutoConfig.for_model(target["model_type"])), "head_dim"):
            found.append("head_dim")
    return found
