"""mergekit's slices: what passthrough does there is done here, and everything else is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factories import tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.sources import open_folder
from scionlm.surgery.mergekit import Slices, plan_slices, read_slices
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config

SIMPLE = """
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
  - sources:
      - {model: b, layer_range: [1, 2]}
  - sources:
      - model: a
        layer_range: [2, 5]
merge_method: passthrough
"""


def read(tmp_path, text):
    (tmp_path / "merge.yaml").write_text(text)
    return read_slices(tmp_path / "merge.yaml")


def test_ranges_are_half_open_and_slices_follow_each_other(tmp_path):
    slices = read(tmp_path, SIMPLE)
    assert slices == Slices(("a", "b"), ((0, 0, 3), (1, 1, 2), (0, 2, 5)))
    plan = plan_slices(slices, [5, 2])
    assert [(layer.donor, layer.index) for layer in plan.layers] == [
        (0, 0), (0, 1), (0, 2), (1, 1), (0, 2), (0, 3), (0, 4)
    ]  # fmt: skip
    assert (plan.donors, plan.donor_layers) == (("a", "b"), (5, 2))
    assert not plan.is_subset


def test_the_models_of_one_layer_and_without_a_method_are_understood(tmp_path):
    slices = read(tmp_path, "slices: [{sources: [{model: org/name@main, layer_range: [3, 4]}]}]\nbase_model: null\n")
    assert plan_slices(slices, [4]).keep == (3,)
    assert plan_slices(slices, [4]).is_subset


def one(**changes):
    source = {"model": "a", "layer_range": [0, 2]} | changes
    return f"slices: [{{sources: [{source}]}}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (one() + "merge_method: slerp\n", "slerp"),
        (one() + "merge_method: linear\nparameters: {weight: 1}\n", "parameters"),
        (one() + "merge_method: [passthrough]\n", "merge_method"),
        (one() + "parameters: {scale: 0.5}\n", "parameters"),
        (one() + "dtype: bfloat16\n", "dtype"),
        (one() + "out_dtype: bfloat16\n", "out_dtype"),
        (one() + "tokenizer_source: union\n", "tokenizer_source"),
        (one() + "models: [{model: a}]\n", "models"),
        ("models: [{model: a}]\nmerge_method: passthrough\n", "models"),
        (one(parameters={"scale": 0.0}), "parameters"),
        ("merge_method: passthrough\n", "slices"),
        ("slices: []\n", "slices"),
        ("slices: {a: 1}\n", "slices"),
        ("slices: [3]\n", r"slices\[0\]"),
        ("slices: [{sources: []}]\n", r"slices\[0\]"),
        ("slices: [{sources: [a]}]\n", r"slices\[0\]"),
        ("slices: [{sources: [{model: a}]}]\n", "layer_range"),
        ("slices: [{sources: [{layer_range: [0, 2]}]}]\n", "model"),
        ("slices: [{sources: [{model: a, layer_range: [0, 2]}], parameters: {}}]\n", r"slices\[0\]"),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]}]\n",
            r"slices\[0\]",
        ),
        (one(layer_range=[2, 2]), "layer_range"),
        (one(layer_range=[3, 1]), "layer_range"),
        (one(layer_range=[-1, 2]), "layer_range"),
        (one(layer_range=[0]), "layer_range"),
        (one(layer_range=[0, 1, 2]), "layer_range"),
        (one(layer_range=[0.0, 2.0]), "layer_range"),
        (one(layer_range=[False, True]).replace("F", "f").replace("T", "t"), "layer_range"),
        (one(layer_range="0-2"), "layer_range"),
        (one(model=3), "layer_range|model"),
        (one(model={"model": "a"}), "layer_range|model"),
        (one() + "base_model: b\n", "base_model"),
        (one() + "base_model: [a]\n", "base_model"),
        ("- 1\n", "mapping"),
        ("slices: [\n", "YAML"),
    ],
)
def test_everything_else_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("ranges", "layers", "words"),
    [
        (((0, 0, 2), (1, 0, 2)), [2, 2], "one model"),
        (((0, 0, 3),), [2], "leaves 'a'"),
        (((0, 0, 2), (1, 0, 3), (0, 0, 1)), [2, 2], "leaves 'b'"),
        (((0, 0, 10**11),), [2], "leaves 'a'"),
    ],
)
def test_slices_that_do_not_fit_the_models_are_refused(ranges, layers, words):
    with pytest.raises(UsageError, match=words):
        plan_slices(Slices(("a", "b")[: len(layers)], ranges), layers)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=6))
@settings(max_examples=100)
def test_a_plan_is_its_slices_one_behind_the_other(found):
    ranges = tuple((model, first, first + number) for model, first, number in found)
    slices = Slices(("a", "b", "c"), ranges)
    if ranges[0][0] != ranges[-1][0] or any(last > 8 for _, _, last in ranges):
        with pytest.raises(UsageError):
            plan_slices(slices, [8, 8, 8])
    else:
        wanted = [(model, index) for model, first, last in ranges for index in range(first, last)]
        assert [(layer.donor, layer.index) for layer in plan_slices(slices, [8, 8, 8]).layers] == wanted


def test_layers_of_two_models_stand_as_they_are_bitwise(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_model("qwen2", seed=seed, num_hidden_layers=5).save_pretrained(tmp_path / name)
    folders = [open_folder(tmp_path / name) for name in "ab"]
    plan = plan_slices(read(tmp_path, SIMPLE), [5, 5])
    (tmp_path / "out").mkdir()
    with open_surgery(folders, plan) as surgery:
        surgery.write(tmp_path / "out")
        surgery.prove(surgery.build(torch.float32))
    a, b, out = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    for number, (donor, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (a, 2), (a, 3), (a, 4)]):
        for name in [name for name in donor if name.startswith(f"model.layers.{index}.")]:
            assert torch.equal(out[name.replace(f".{index}.", f".{number}.", 1)], donor[name]), name
    assert torch.equal(out["model.norm.weight"], a["model.norm.weight"])
    kinds = open_folder(tmp_path / "out").config["layer_types"]
    assert kinds == [folders[0].config["layer_types"][i] for i in (0, 1, 2, 1, 2, 3, 4)]


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"rope_theta": 5.0}, {"intermediate_size": 40}])
def test_models_that_do_not_fit_together_are_refused_by_name(changes):
    configs = [tiny_model().config.to_dict(), tiny_model(**changes).config.to_dict()]
    plan = plan_slices(Slices(("a", "b"), ((0, 0, 2), (1, 0, 2), (0, 4, 5))), [5, 5])
    name = "rope" if "rope_theta" in changes else next(iter(changes))
    with pytest.raises(DataError, match=name):
        target_config(configs, plan)


@pytest.mark.parametrize("other", ["qwen2", "gpt2", "smollm3"])
def test_models_of_two_families_are_refused_as_such(other):
    configs = [tiny_model().config.to_dict(), tiny_model(other).config.to_dict()]
    plan = plan_slices(Slices(("a", "b"), ((0, 0, 2), (1, 0, 2), (0, 4, 5))), [5, 5])
    with pytest.raises(DataError, match="model_type"):
        target_config(configs, plan)
