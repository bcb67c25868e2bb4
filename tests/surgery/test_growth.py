"""How a trained model grows: what is added where, and that what it has stays as it is."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factories import tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import write_json
from scionlm.sources import open_folder
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.lineage import inherited_layers, plan_origins
from scionlm.surgery.plan import LayerPlan
from scionlm.surgery.request import layer_plan
from scionlm.surgery.surgery import open_surgery


def places(plan):
    """Return a plan's layers as short words: `s2` the student's, `d4` the donor's, `z` and `r` fresh."""
    return [f"{'sd'[layer.donor]}{layer.index}" if layer.init == "source" else layer.init[0] for layer in plan.layers]


def source_next(num_layers, layers, donor, inherited=None):
    return plan_growth(["student", "donor"], num_layers, layers, "source_next", inherited, donor)


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (source_next(2, 4, 6), "s0 s1 d2 d3"),
        (source_next(3, 4, 6, [0, 2, 4]), "s0 d1 s1 s2"),
        (source_next(3, 5, 6, [0, 2, 4]), "s0 d1 s1 d3 s2"),
        (source_next(3, 6, 6, [0, 2, 4]), "s0 d1 s1 d3 s2 d5"),
        (source_next(2, 4, 6, [4, 5]), "d0 d1 s0 s1"),
        (plan_growth(["s"], 3, 5, "stack"), "s0 s1 s2 s0 s1"),
        (plan_growth(["s"], 2, 7, "stack"), "s0 s1 s0 s1 s0 s1 s0"),
        (plan_growth(["s"], 2, 4, "random"), "s0 s1 r r"),
        (plan_growth(["s"], 4, 6, "zero_output"), "s0 s1 z s2 s3 z"),
        (plan_growth(["s"], 2, 4, "zero_output"), "s0 z s1 z"),
        (plan_growth(["s"], 3, 4, "zero_output"), "s0 s1 s2 z"),
        (plan_growth(["s"], 1, 3, "zero_output"), "z s0 z"),
    ],
)
def test_what_is_added_stands_where_it_should(plan, wanted):
    assert places(plan) == wanted.split()


@given(st.integers(1, 12), st.integers(1, 24))
@settings(max_examples=100)
def test_layers_that_pass_on_are_spread_evenly(num_layers, added):
    plan = plan_growth(["s"], num_layers, num_layers + added, "zero_output")
    assert [layer.index for layer in plan.layers if layer.init == "source"] == list(range(num_layers))
    gaps = [len(part) for part in "".join(places(plan)).translate({ord(c): " " for c in "s0123456789"}).split()]
    assert sum(gaps) == added
    assert added < num_layers or max(gaps) <= -(-added // num_layers) + 1
    if added <= num_layers:
        assert set(gaps) == {1}


@given(st.data())
@settings(max_examples=200)
def test_next_layers_are_the_first_ones_missing_each_at_its_place(data):
    donor = data.draw(st.integers(2, 12))
    origin = sorted(data.draw(st.sets(st.integers(0, donor - 1), min_size=1, max_size=donor - 1)))
    layers = data.draw(st.integers(len(origin) + 1, donor))
    plan = source_next(len(origin), layers, donor, origin)
    true = [origin[layer.index] if layer.donor == 0 else layer.index for layer in plan.layers]
    assert true == sorted(set(true))
    assert [layer.index for layer in plan.layers if layer.donor == 0] == list(range(len(origin)))
    missing = [index for index in range(donor) if index not in origin]
    assert [layer.index for layer in plan.layers if layer.donor == 1] == missing[: layers - len(origin)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["s"], 3, 3, "stack"), "no growth"),
        ((["s"], 3, 2, "zero_output"), "no growth"),
        ((["s"], 3, 4, "source_next"), "donor"),
        ((["s", "d"], 3, 4, "source_next", None, None), "donor"),
        ((["s", "d"], 3, 7, "source_next", None, 6), "only 6 layers"),
        ((["s", "d"], 3, 4, "source_next", None, 2), "not some of the donor's"),
        ((["s", "d"], 3, 4, "source_next", [0, 1], 6), "not some of the donor's"),
        ((["s", "d"], 3, 4, "source_next", [0, 1, 1], 6), "not some of the donor's"),
        ((["s", "d"], 3, 4, "source_next", [1, 0, 2], 6), "not some of the donor's"),
        ((["s", "d"], 3, 4, "source_next", [-1, 0, 1], 6), "not some of the donor's"),
        ((["s", "d"], 3, 4, "source_next", [0, 1, 6], 6), "not some of the donor's"),
    ],
)
def test_growth_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        plan_growth(*arguments)


# --- on tiny models ---


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth") / "teacher"
    tiny_model("smollm3", num_hidden_layers=6, layer_types=["full_attention", "sliding_attention"] * 3,
               no_rope_layers=[1, 0, 0, 1, 1, 0]).save_pretrained(folder)  # fmt: skip
    return open_folder(folder)


def heir(root, source, keep):
    """Write a trained heir with its provenance: its weights are no longer the source's."""
    folder = root / "heir"
    folder.mkdir()
    plan = plan_depth(len(source.config["layer_types"]), keep=keep, name=source.name)
    with open_surgery([source], plan) as surgery:
        model = surgery.build(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(folder)
    record = {"name": source.name, "revision": None}
    write_json(folder / "provenance.json", {"source": record, "donors": [record], "plan": plan.to_dict()})
    return open_folder(folder)


def grown(root, student, donor, layers):
    plan = layer_plan({"layers": layers, "grow": "source_next"}, student, donor)
    (root / "grown").mkdir()
    with open_surgery([student, donor], plan) as surgery:
        surgery.write(root / "grown")
    return plan, open_folder(root / "grown")


def test_a_trained_student_keeps_its_weights_and_takes_the_donors_next_layers_bitwise(teacher, tmp_path):
    student = heir(tmp_path, teacher, [0, 2, 5])
    plan, result = grown(tmp_path, student, teacher, 5)
    assert places(plan) == ["s0", "d1", "s1", "d3", "s2"]
    mine, theirs, found = (load_file(f.path / "model.safetensors") for f in (student, teacher, result))
    for number, (where, index) in enumerate([(mine, 0), (theirs, 1), (mine, 1), (theirs, 3), (mine, 2)]):
        prefix = f"model.layers.{index}."
        for name in [name for name in where if name.startswith(prefix)]:
            assert torch.equal(found[f"model.layers.{number}.{name.removeprefix(prefix)}"], where[name]), name
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[name], mine[name])
        assert not torch.equal(found[name], theirs[name])
    for key in ("layer_types", "no_rope_layers"):
        assert result.config[key] == [teacher.config[key][i] for i in (0, 1, 2, 3, 5)]


def test_without_provenance_a_student_is_the_first_layers(teacher, tmp_path):
    student = heir(tmp_path, teacher, [0, 2])
    assert inherited_layers(student, teacher) == [0, 2]
    (student.path / "provenance.json").unlink()
    assert inherited_layers(student, teacher) is None
    assert places(layer_plan({"layers": 3, "grow": "source_next"}, student, teacher)) == ["s0", "s1", "d2"]


def test_growth_goes_on_from_a_grown_model(teacher, tmp_path):
    student = heir(tmp_path, teacher, [0, 1])
    plan, result = grown(tmp_path, student, teacher, 4)
    found = plan_origins([student, teacher], plan)
    assert [steps[-1]["index"] for steps in found] == [0, 1, 2, 3]
    write_json(result.path / "provenance.json", {"plan": plan.to_dict(), "origins": found})
    again = layer_plan({"layers": 6, "grow": "source_next"}, result, teacher)
    assert places(again) == ["s0", "s1", "s2", "s3", "d4", "d5"]


@pytest.mark.parametrize("grow", ["stack", "zero_output", "random"])
def test_a_provenance_that_is_not_needed_is_not_looked_at(teacher, tmp_path, grow):
    student = heir(tmp_path, teacher, [0, 1])
    (student.path / "provenance.json").write_text('{"made_by": "another program"}')
    assert len(layer_plan({"layers": 3, "grow": grow}, student, None).layers) == 3


@pytest.mark.parametrize(
    "record",
    [[], 3, {"plan": {}}, {"plan": [1]}, {"plan": {"keep": 3}}, {"plan": {"keep": ["x"]}}, {"plan": {"keep": "01"}}],
)
def test_a_broken_provenance_is_refused(teacher, tmp_path, record):
    student = heir(tmp_path, teacher, [0, 1])
    text = json.dumps({"format_version": 1} | record if isinstance(record, dict) else record)
    (student.path / "provenance.json").write_text(text)
    with pytest.raises(DataError, match=r"provenance\.json"):
        layer_plan({"layers": 3, "grow": "source_next"}, student, teacher)


@pytest.mark.parametrize(
    "options",
    [
        {"grow": "stack"},
        {"grow": "stack", "layers": 7, "keep": "0-2"},
        {"grow": "stack", "layers": 7, "strategy": "first"},
        {"grow": "stack", "layers": 7, "scores": [1.0] * 6},
        {"grow": "sideways", "layers": 7},
    ],
)
def test_contradictions_are_refused(teacher, options):
    with pytest.raises(UsageError, match="grow"):
        layer_plan(options, teacher, None)


@pytest.mark.parametrize("grow", ["stack", "zero_output", "random", "sideways"])
def test_a_donor_is_for_source_next_only(teacher, grow):
    with pytest.raises(UsageError, match=r"donor|grow"):
        layer_plan({"grow": grow, "layers": 8}, teacher, teacher)
    with pytest.raises(UsageError, match="donor"):
        layer_plan({"layers": 2}, teacher, teacher)


def test_fresh_layers_take_nothing_but_their_kind_from_the_model(teacher, tmp_path):
    plan = plan_growth(["s"], 6, 8, "random", seed=4)
    with open_surgery([teacher], plan) as surgery:
        one, other = surgery.build(torch.float32).state_dict(), None
        assert surgery.config["layer_types"] == [*teacher.config["layer_types"], *["sliding_attention"] * 2]
    with open_surgery([teacher], replace(plan, seed=5)) as surgery:
        other = surgery.build(torch.float32).state_dict()
    same = {name for name in one if torch.equal(one[name], other[name])}
    differ = {name for name in one if name not in same}
    assert differ == {n for n in one if n.startswith(("model.layers.6.", "model.layers.7.")) and one[n].ndim == 2}
    assert plan.layers[6] == LayerPlan(5, init="random")
