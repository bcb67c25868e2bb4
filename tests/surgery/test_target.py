"""The target's configuration: lists with one entry a layer, counts of layers, and what Scion does not know."""

import copy

import pytest

from factories import tiny_config
from scionlm.core.errors import DataError, UsageError
from scionlm.families import ModelShape, family_of
from scionlm.families.registry import FAMILIES
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.plan import LayerPlan, SurgeryPlan
from scionlm.surgery.target import (
    changed_settings,
    per_layer_lists,
    resolved_config,
    target_config,
    unusual_settings,
)

LISTED = [(t, key) for f in FAMILIES for t in f.model_types for key in f.per_layer_config]
COUNTED = [(t, key) for f in FAMILIES for t in f.model_types for key in f.layer_count_config]


def config_of(model_type, **changes):
    return tiny_config(model_type, **changes).to_dict()


PLANS = {
    "some": plan_depth(5, keep=[0, 2, 4]),
    "another order": plan_depth(5, keep=[4, 0, 3]),
    "twice": plan_depth(5, keep=[1, 1, 2, 2], repeat=True),
    "stack": plan_growth(["a"], 5, 8, "stack"),
    "zeros": plan_growth(["a"], 5, 7, "zero_output"),
    "random": plan_growth(["a"], 5, 7, "random"),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("model_type", "key"), LISTED)
def test_each_layer_keeps_its_entry(model_type, key, plan):
    config = config_of(model_type)
    before = copy.deepcopy(config)
    target = target_config([config], plan)
    assert len(set(config[key])) > 1, "the test could not fail"
    assert target[key] == [config[key][layer.index] for layer in plan.layers]
    assert resolved_config(target)[key] == target[key]
    assert ModelShape.of(target).num_hidden_layers == len(plan.layers)
    assert config == before


@pytest.mark.parametrize(("model_type", "key"), LISTED)
def test_a_list_that_is_left_to_transformers_is_written_out(model_type, key):
    config = config_of(model_type)
    del config[key]
    usual = resolved_config(config)[key]
    target = target_config([config], plan_depth(5, keep=[4, 1]))
    assert target[key] == [usual[4], usual[1]]


@pytest.mark.parametrize(("model_type", "kept"), [("cohere2", False), ("gemma3_text", True)])
def test_a_pattern_goes_where_transformers_takes_the_list_that_it_made_instead(model_type, kept):
    config = config_of(model_type) | {"sliding_window_pattern": 2}
    del config["layer_types"]
    plan = plan_depth(5, keep=[1, 4])
    target = target_config([config], plan)
    assert target["layer_types"] == ["full_attention", "sliding_attention"]
    assert ("sliding_window_pattern" in target) == kept
    assert changed_settings(config, target, plan) == ""
    growth = SurgeryPlan(("child", "donor"), (2, 5), (LayerPlan(0), LayerPlan(3, 1), LayerPlan(1)))
    assert target_config([target, config], growth)["layer_types"] == [*["full_attention"] * 2, "sliding_attention"]


@pytest.mark.parametrize(("model_type", "key"), LISTED)
@pytest.mark.parametrize("change", ["short", "long", "a word", "a mapping"])
def test_a_list_of_another_length_is_refused_by_name(model_type, key, change):
    config = config_of(model_type)
    config[key] = {"short": config[key][:3], "long": config[key] * 2, "a word": "full", "a mapping": {"0": 1}}[change]
    with pytest.raises(DataError, match=key) as error:
        target_config([config], plan_depth(5, 2))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("model_type", "key"), COUNTED)
def test_a_count_of_the_first_layers_counts_those_that_are_left(model_type, key):
    config = config_of(model_type, **{key: 3})
    for keep, wanted in ([0, 1, 2, 3, 4], 3), ([0, 2, 4], 2), ([3, 4], 0), ([0, 1], 2):
        assert target_config([config], plan_depth(5, keep=keep))[key] == wanted
    assert resolved_config(target_config([config], plan_depth(5, keep=[0, 2, 4])))[key] == 2


@pytest.mark.parametrize("model_type", [t for f in FAMILIES for t in f.model_types])
@pytest.mark.parametrize("value", [[1, 2, 3, 4, 5], {"inner": [1, 2]}])
def test_a_list_that_the_family_does_not_explain_is_refused_by_name(model_type, value):
    config = config_of(model_type) | {"surprising_layers": value}
    with pytest.raises(DataError, match="surprising_layers"):
        target_config([config], plan_depth(5, 2))


@pytest.mark.parametrize("model_type", [t for f in FAMILIES for t in f.model_types])
def test_lists_that_have_nothing_to_do_with_layers_stay(model_type):
    config = config_of(model_type) | {"eos_token_id": [3, 4], "architectures": ["X"], "empty": []}
    target = target_config([config], plan_depth(5, 2))
    assert (target["eos_token_id"], target["architectures"], target["empty"]) == ([3, 4], ["X"], [])
    assert set(target) - set(config) <= {*family_of(config).per_layer_config}


def test_donors_give_their_layers_their_own_entries():
    first = config_of("smollm3")
    second = config_of("smollm3", layer_types=["full_attention"] * 5, no_rope_layers=[0] * 5)
    plan = SurgeryPlan(("a", "b"), (5, 5), (LayerPlan(0), LayerPlan(0, 1), LayerPlan(3, 1), LayerPlan(4)))
    target = target_config([first, second], plan)
    assert target["no_rope_layers"] == [first["no_rope_layers"][0], 0, 0, first["no_rope_layers"][4]]
    assert target["layer_types"] == [
        first["layer_types"][0], "full_attention", "full_attention", first["layer_types"][4]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"num_hidden_layers": 7}, True),
        ({"use_cache": False}, True),
        ({"rms_norm_eps": 1e-3}, False),
        ({"hidden_size": 40}, False),
        ({"num_key_value_heads": 4}, False),
        ({"sliding_window": 5}, False),
    ],
)
def test_donors_must_be_of_one_kind_and_width(changes, fits):
    configs = [config_of("qwen3"), config_of("qwen3", **changes)]
    if changes.get("hidden_size"):
        configs[0] = config_of("qwen3", hidden_size=32)
    layers = configs[1]["num_hidden_layers"]
    plan = SurgeryPlan(("a", "b"), (5, layers), (LayerPlan(0), LayerPlan(layers - 1, 1)))
    if fits:
        assert len(target_config(configs, plan)["layer_types"]) == 2
    else:
        with pytest.raises(DataError, match=next(iter(changes))):
            target_config(configs, plan)


@pytest.mark.parametrize(
    ("model_type", "keep", "found"),
    [
        ("gemma2", [0, 1, 2, 3], []),  # sliding and full in turn
        ("gemma2", [0, 3, 4], []),
        ("gemma2", [0, 2, 4], ["layer_types"]),
        ("gemma2", [1, 0], ["layer_types"]),
        ("qwen2", [0, 3, 4], []),  # two full ones first: their number follows the cut
        ("qwen2", [3, 4], []),
        ("qwen2", [3, 0], ["layer_types"]),
    ],
)
def test_a_pattern_that_is_no_longer_the_usual_one_is_told(model_type, keep, found):
    config = config_of(model_type) | ({"max_window_layers": 2} if model_type == "qwen2" else {})
    del config["layer_types"]
    assert unusual_settings(config, target_config([config], plan_depth(5, keep=keep))) == found


def test_families_without_lists_have_none():
    assert per_layer_lists(family_of({"model_type": "llama"}), config_of("llama")) == {}
    assert unusual_settings(config_of("llama"), config_of("llama")) == []


def test_a_head_size_that_a_family_has_no_field_for_is_told():
    for model_type, found in (("qwen2", ["head_dim"]), ("llama", [])):
        plain = {key: value for key, value in config_of(model_type).items() if key != "layer_types"}
        plain["hidden_size"] = 32
        assert unusual_settings(plain, plain | {"hidden_size": 24}) == found


def test_sizes_that_cannot_be_written_down_are_refused():
    plan = SurgeryPlan(("a",), (5,), (LayerPlan(0, heads=(0, 1, 2)),))
    with pytest.raises(UsageError, match="not a multiple"):
        target_config([config_of("llama")], plan)
