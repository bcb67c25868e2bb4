"""Plans are plain values: they survive JSON, broken ones are refused, and two in a row are one."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factories import tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.families import ModelShape, family_of
from scionlm.families.spec import PARTS
from scionlm.sources import open_folder
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.indices import format_indices, parse_indices
from scionlm.surgery.plan import LayerPlan, SurgeryPlan, compose, parse_parts
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width

NUMBERS = st.lists(st.integers(0, 60), max_size=12).map(tuple)
INDICES = st.none() | NUMBERS.filter(bool)


@st.composite
def plans(draw) -> SurgeryPlan:
    donors = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))

    def layer() -> LayerPlan:
        donor = draw(st.integers(0, len(donors) - 1))
        init = draw(st.sampled_from(("source", "zero_output", "random")))
        return LayerPlan(
            draw(st.integers(0, donors[donor] - 1)), donor, init, draw(INDICES), draw(INDICES), draw(INDICES)
        )

    return SurgeryPlan(
        tuple(draw(st.text(max_size=5)) for _ in donors),
        tuple(donors),
        tuple(layer() for _ in range(draw(st.integers(1, 5)))),
        draw(INDICES),
        draw(INDICES),
        draw(st.integers(0, 99)),
        tuple(part for part in PARTS if draw(st.booleans())),
        draw(st.integers(0, 2**40)),
        draw(st.text(max_size=5)),
        draw(st.none() | st.text(max_size=5)),
    )


@given(plans())
@settings(max_examples=150)
def test_a_plan_survives_json(plan):
    record = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert SurgeryPlan.from_dict(record) == plan
    assert record["keep"] == list(plan.keep)


RECORD = SurgeryPlan(
    ("a", "b"), (3, 2), (LayerPlan(0, heads=(0, 1)), LayerPlan(1, 1)), hidden=(0, 2), fresh=("mlp",)
).to_dict()


@pytest.mark.parametrize("key", [key for key in RECORD if key not in ("keep", "num_source_layers")])
def test_a_record_without_a_key_is_refused(key):
    record = {name: value for name, value in RECORD.items() if name != key}
    with pytest.raises(DataError, match="plan"):
        SurgeryPlan.from_dict(record)


def changed(**changes):
    return RECORD | changes


def layers(**changes):
    return RECORD | {"layers": [RECORD["layers"][0] | changes, RECORD["layers"][1]]}


BROKEN = {
    "no layers": (changed(layers=[]), "no donor or no layer"),
    "no donors": (changed(donors=[]), "no donor or no layer"),
    "layers are no list": (changed(layers=7), "not iterable"),
    "a layer is no mapping": (changed(layers=[3]), "not subscriptable"),
    "a donor is no mapping": (changed(donors=["a", "b"]), "string indices"),
    "donor without layers": (changed(donors=[{"name": "a"}]), "num_hidden_layers"),
    "init unknown": (layers(init="sources"), "init 'sources' is unknown"),
    "init no word": (layers(init=["source"]), r"init \['source'\] is unknown"),
    "donor not there": (layers(donor=2), "donor 2 does not exist"),
    "donor negative": (layers(donor=-1), "-1 is not a number from 0 on"),
    "layer not there": (layers(index=3), "layer 3 of donor 0 does not exist"),
    "layer negative": (layers(index=-1), "-1 is not a number from 0 on"),
    "layer no number": (layers(index="first"), "'first' is not a number"),
    "layer half": (layers(index=0.5), "0.5 is not a number"),
    "heads no list": (layers(heads="x"), "'x' is neither a number nor a range"),
    "heads a number": (layers(heads=3), "'int' object"),
    "heads backwards": (layers(heads="3-1"), "'3-1' is neither a number nor a range"),
    "hidden empty": (changed(hidden=""), "a selection is empty"),
    "hidden broken": (changed(hidden="1,,2"), "plan '1,,2': "),
    "vocab a list": (changed(vocab=[1, 2]), "'list' object"),
    "padding negative": (changed(vocab_padding=-1), "-1 is not a number from 0 on"),
    "padding no number": (changed(vocab_padding="many"), "'many' is not a number"),
    "fresh unknown": (changed(fresh=["mpl"]), "fresh: 'mpl' is not a part"),
    "fresh a word": (changed(fresh="mlp"), "fresh is not a list"),
    "seed no number": (changed(seed=None), "None is not a number"),
    "width no word": (changed(width=3), "3 is not a name"),
    "not a mapping": ([1, 2], "list indices"),
    "nothing": (None, "'NoneType' object"),
}


@pytest.mark.parametrize(("record", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_records_are_refused(record, words):
    with pytest.raises(DataError, match=f"not a surgery plan: .*{words}"):
        SurgeryPlan.from_dict(copy.deepcopy(record))


@given(st.lists(st.integers(0, 10**9 - 1) | st.integers(0, 20), min_size=1, max_size=30))
@settings(max_examples=300)
def test_indices_are_read_as_they_are_written(indices):
    assert parse_indices(format_indices(indices)) == indices


@given(st.text("0123456789-,: ", max_size=8))
@settings(max_examples=300)
def test_what_is_read_as_indices_is_written_as_the_same_ones(text):
    try:
        indices = parse_indices(text)
    except UsageError:
        return
    assert parse_indices(format_indices(indices)) == indices
    assert indices


def test_runs_are_written_as_ranges():
    assert format_indices([0, 1, 2, 5, 7, 8, 3, 4, 4]) == "0-2,5,7-8,3-4,4"


def test_parts_come_in_the_models_order_and_unknown_ones_are_named():
    assert parse_parts("mlp, attention,mlp_norm") == ("attention", "mlp_norm", "mlp")
    for wrong in ("mpl", "mlp,", "", "mlp;head"):
        with pytest.raises(UsageError, match="parts: embedding"):
            parse_parts(wrong)


# --- composition ---


def family_folder(root, model_type, **changes):
    """Return the folder of a tiny model, which is written once."""
    folder = root / f"plans-{model_type}"
    if not folder.exists():
        tiny_model(model_type, **changes).save_pretrained(folder)
    return open_folder(folder)


def carry_out(sources, plan, out):
    """Write what a plan gives; return it as a folder."""
    out.mkdir()
    with open_surgery(sources, plan) as surgery:
        surgery.write(out)
    return open_folder(out)


def same_files(a, b):
    first, second = load_file(a.path / "model.safetensors"), load_file(b.path / "model.safetensors")
    assert a.config == b.config
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name].numpy(), second[name].numpy())] == []


def widen(plan, folder, seed, **sizes):
    """Return a plan that also cuts a folder's model by random scores."""
    shape, rng = ModelShape.of(folder.config), np.random.default_rng(seed)
    found = {
        "hidden": rng.random(shape.hidden_size),
        "heads": rng.random((shape.num_hidden_layers, shape.num_attention_heads)),
        "ffn": rng.random((shape.num_hidden_layers, shape.intermediate_size)),
    }
    return plan_width(plan, family_of(folder.config), shape, WidthTarget(**sizes), found, f"test {seed}")


WIDE = {
    "llama": ({"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}, {"hidden_size": 16}),
    "phi3": (
        {"hidden_size": 16, "intermediate_size": 30, "num_attention_heads": 2, "num_key_value_heads": 2},
        {"hidden_size": 8, "intermediate_size": 20, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "gpt2": (
        {"hidden_size": 24, "intermediate_size": 30, "num_attention_heads": 3},
        {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2},
    ),
    "gpt_neox": (
        {"hidden_size": 24, "intermediate_size": 30, "num_attention_heads": 3},
        {"hidden_size": 8, "num_attention_heads": 1},
    ),
    # The scale of embeddings would be rounded twice if both cut hidden_size.
    "gemma2": (
        {"hidden_size": 32, "intermediate_size": 30, "num_attention_heads": 2, "num_key_value_heads": 2},
        {"intermediate_size": 20, "num_attention_heads": 1},
    ),
    "stablelm": (
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 40},
        {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8},
    ),
    "smollm3": ({"intermediate_size": 30, "num_key_value_heads": 1}, {"hidden_size": 24}),
    "olmo2": ({"num_key_value_heads": 1, "hidden_size": 32}, {"num_attention_heads": 1}),
}
CHANGES = {"stablelm": {"qk_layernorm": True, "use_qkv_bias": True}}
KINDS = ("depth", "width", "vocabulary", "everything")


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [(name, kind) for name in WIDE for kind in KINDS if kind in ("width", "everything") or name in ("llama", "gpt2")],
)
def test_two_plans_in_one_are_the_two_one_after_the_other(sources_root, tmp_path, model_type, kind):
    source = family_folder(sources_root, model_type, **CHANGES.get(model_type, {}))
    vocab = tuple(int(i) for i in np.random.default_rng(3).permutation(320)[:200])
    first, second = plan_depth(5, 5), plan_depth(5, 5)
    if kind in ("depth", "everything"):
        first, second = plan_depth(5, keep=[0, 2, 3, 4]), plan_depth(4, keep=[2, 0, 3, 2], repeat=True)
    if kind in ("width", "everything"):
        first = widen(first, source, 1, **WIDE[model_type][0])
    if kind in ("vocabulary", "everything"):
        first = replace(first, vocab=vocab)
        second = replace(second, vocab=(*range(0, 200, 2), 1), vocab_padding=27)
    middle = carry_out([source], first, tmp_path / "middle")
    if kind in ("width", "everything"):
        second = widen(second, middle, 2, **WIDE[model_type][1])
    if kind == "everything":
        second = replace(second, fresh=("mlp_norm", "final_norm"), seed=5)
    apart = carry_out([middle], second, tmp_path / "apart")
    composed = compose(first, second)
    same_files(apart, carry_out([source], composed, tmp_path / "together"))
    assert SurgeryPlan.from_dict(composed.to_dict()) == composed
    other = replace(composed, layers=composed.layers[::-1])
    if kind in ("depth", "everything"):  # the comparison can fail
        with pytest.raises(AssertionError):
            same_files(apart, carry_out([source], other, tmp_path / "other"))


def test_composing_is_associative(llama, tmp_path):
    a = widen(plan_depth(5, keep=[0, 1, 3, 4]), llama, 1, intermediate_size=40)
    middle = carry_out([llama], a, tmp_path / "a")
    b = widen(plan_depth(4, keep=[3, 0, 1]), middle, 2, intermediate_size=30, hidden_size=24)
    c = widen(plan_depth(3, keep=[0, 2]), carry_out([middle], b, tmp_path / "b"), 3, intermediate_size=7)
    assert compose(compose(a, b), c) == compose(a, compose(b, c))


def test_gpt2_layers_that_move_twice_carry_one_factor(tmp_path):
    tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path / "source")
    source = open_folder(tmp_path / "source")
    first, second = plan_depth(5, keep=[1, 3, 4]), plan_depth(3, keep=[2, 0])
    apart = carry_out([carry_out([source], first, tmp_path / "middle")], second, tmp_path / "apart")
    together = carry_out([source], compose(first, second), tmp_path / "together")
    theirs = load_file(together.path / "model.safetensors")
    for name, tensor in load_file(apart.path / "model.safetensors").items():
        assert np.allclose(tensor.numpy(), theirs[name].numpy(), rtol=1e-6, atol=0), name


@pytest.mark.parametrize("then", ["drop the layer in front", "cut the width", "drop nothing, other seed", "drop it"])
def test_fresh_layers_composed_are_those_of_one_after_the_other_or_refused(llama, tmp_path, then):
    """Layers that pass their input on are random inside: a composed plan must not make other ones."""
    first = replace(plan_growth(["source"], 5, 6, "zero_output"), seed=3)
    middle = carry_out([llama], first, tmp_path / "middle")
    assert first.layers[5].init == "zero_output"
    second = {
        "drop the layer in front": plan_depth(6, keep=[0, 1, 2, 3, 5]),
        "cut the width": widen(plan_depth(6, 6), middle, 1, intermediate_size=20),
        "drop nothing, other seed": replace(plan_depth(6, 6), seed=9),
        "drop it": plan_depth(6, 5),
    }[then]
    apart = carry_out([middle], second, tmp_path / "apart")
    if then != "drop it":
        with pytest.raises(UsageError, match="fresh weights of the first plan cannot be carried into another"):
            compose(first, second)
        return
    same_files(apart, carry_out([llama], compose(first, second), tmp_path / "together"))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (plan_depth(5, 3), plan_depth(5, 2), "layers"),
        (plan_depth(5, 3), plan_growth(["a", "b"], 3, 4, "source_next", None, 5), "layers"),
        (replace(plan_depth(5, 3), vocab_padding=4), replace(plan_depth(3, 3), vocab=(0, 1)), "trim first"),
        (replace(plan_depth(5, 3), fresh=("mlp",)), plan_depth(3, 2), "fresh"),
        (plan_growth(["a"], 5, 6, "random"), plan_depth(6, keep=[0, 5]), "fresh"),
    ],
)
def test_plans_that_cannot_be_one_are_refused(first, second, words):
    with pytest.raises(UsageError, match=words):
        compose(first, second)


@pytest.mark.parametrize(("a", "b"), [(3, 3), (5, 1), (4, 3)])
def test_inheriting_from_an_heir_is_inheriting_from_the_source(llama, tmp_path, a, b):
    """I8 of the Inheritune study: the first b of the first a layers are the first b."""
    require_same_heirs(llama, tmp_path, a, b)


def test_inheriting_from_an_heir_is_inheriting_from_the_source_in_every_family(source, tmp_path):
    require_same_heirs(source, tmp_path, 4, 2)


def require_same_heirs(source, root, a, b):
    heir = carry_out([carry_out([source], plan_depth(5, a), root / "a")], plan_depth(a, b), root / "ab")
    same_files(heir, carry_out([source], plan_depth(5, b), root / "b"))
    assert ModelShape.of(heir.config).num_hidden_layers == b
