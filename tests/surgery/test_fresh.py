"""Fresh parts: exactly those asked for, by the family's own initialization, the same from the same seed."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from factories import tiny_model
from scionlm.core.errors import UsageError
from scionlm.families import ModelShape, family_of
from scionlm.families.shape import expected_tensors
from scionlm.families.spec import PARTS
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.request import complete_plan
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width


def weights(folder, plan):
    """Return the target's tensors by name, from the operations, without ties."""
    with open_surgery([folder], plan) as surgery:
        state = surgery.build(torch.float32).state_dict()
        return {op.place.name: state[op.place.name] for op in surgery.operations}


def part_of(folder):
    return {place.name: place.spec.part for place in expected_tensors(folder.config)}


def differing(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Models wide enough to measure a standard deviation of."""
    root = tmp_path_factory.mktemp("wide")

    def make(model_type):
        if not (root / model_type).exists():
            heads = {"n_head": 8} if model_type == "gpt2" else {"num_attention_heads": 8}
            hidden = {"n_embd": 128} if model_type == "gpt2" else {"hidden_size": 128}
            tiny_model(model_type, **heads, **hidden).save_pretrained(root / model_type)
        return open_folder(root / model_type)

    return make


def test_parts_are_disjoint_and_cover_the_model(source):
    """I7: attention, MLP and norms together are a layer, and nothing is of two parts."""
    parts = part_of(source)
    model = load_hf_model(source)
    names = {name for name, _ in model.named_parameters()}
    assert set(parts) == names
    assert set(parts.values()) <= set(PARTS)
    norms = {name for name in names if parts[name].endswith("norm")}
    words = ("ln_", "norm")
    inside = {n for n in names if any(w in n for w in words) and not any(w in n for w in ("q_", "k_"))}
    assert norms == inside
    assert {n for n in names if parts[n] == "mlp"} == {n for n in names if ".mlp." in n or ".fc1." in n or ".fc2." in n}


def test_exactly_the_parts_asked_for_are_fresh(source):
    parts = part_of(source)
    inherited = weights(source, plan_depth(5, 5))
    for fresh in (("mlp", "mlp_norm"), ("attention", "embedding", "final_norm")):
        found = weights(source, replace(plan_depth(5, 5), fresh=fresh))
        assert differing(inherited, found) == {name for name, part in parts.items() if part in fresh}


@pytest.mark.parametrize("fresh", ["mlp", "mlp_norm", "attention", "attention_norm", "embedding", "final_norm"])
def test_each_part_can_be_fresh_alone(llama, fresh):
    plan = plan_depth(5, keep=[3, 1])
    names = differing(weights(llama, plan), weights(llama, replace(plan, fresh=(fresh,))))
    parts = part_of(llama)
    assert names == {name for name in weights(llama, plan) if parts[name] == fresh}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "starcoder2"])
def test_same_seed_same_weights_whatever_else_is_fresh(wide, model_type):
    source = wide(model_type)
    plan = replace(plan_depth(5, 3), fresh=("mlp",), seed=3)
    alone = weights(source, plan)
    everything = tuple(part for part in PARTS if part in part_of(source).values())
    together = weights(source, replace(plan, fresh=everything))
    mlp = {name for name in alone if part_of(source)[name] == "mlp"}
    assert mlp
    assert not mlp & differing(alone, together)
    again = weights(source, plan)
    assert differing(alone, again) == set()
    other = differing(alone, weights(source, replace(plan, seed=4)))
    assert other == {name for name in mlp if alone[name].ndim == 2}


def test_layers_do_not_share_their_numbers(llama):
    found = weights(llama, replace(plan_depth(5, 3), fresh=("mlp", "attention")))
    for inner in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
        layers = [found[f"model.layers.{i}.{inner}"] for i in range(3)]
        assert not torch.equal(layers[0], layers[1])
        assert not torch.equal(layers[1], layers[2])
    gate, up = (found[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert not torch.equal(gate, up)


def test_the_state_of_torchs_generator_is_left_alone(llama):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    weights(llama, replace(plan_depth(5, 2), fresh=("mlp",)))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_gpt2_scales_residual_projections_by_the_layers_of_the_target(wide, layers):
    """I7: 0.02 / sqrt(2 * layers of the student), not of the source."""
    found = weights(wide("gpt2"), replace(plan_depth(5, layers), fresh=("attention", "mlp")))
    for number in range(layers):
        prefix = f"transformer.h.{number}."
        for inner in ("attn.c_proj", "mlp.c_proj"):
            assert float(found[f"{prefix}{inner}.weight"].std()) == pytest.approx(0.02 / sqrt(2 * layers), rel=0.05)
        for inner in ("attn.c_attn", "mlp.c_fc"):
            assert float(found[f"{prefix}{inner}.weight"].std()) == pytest.approx(0.02, rel=0.05)
            assert not found[f"{prefix}{inner}.bias"].any()


def test_embeddings_and_norms_start_as_the_family_starts_them(wide):
    parts = ("embedding", "position", "attention_norm", "mlp_norm", "final_norm")
    found = weights(wide("gpt2"), replace(plan_depth(5, 2), fresh=parts))
    assert float(found["transformer.wte.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(found["transformer.wpe.weight"].std()) == pytest.approx(0.02, rel=0.05)
    for name in ("transformer.ln_f", "transformer.h.1.ln_1", "transformer.h.0.ln_2"):
        assert bool((found[f"{name}.weight"] == 1).all())
        assert not found[f"{name}.bias"].any()


@pytest.mark.parametrize(
    ("model_type", "gain"), [("gemma2", 0.0), ("gemma3_text", 0.0), ("llama", 1.0), ("olmo2", 1.0)]
)
def test_gains_start_where_they_change_nothing(wide, model_type, gain):
    found = weights(wide(model_type), replace(plan_depth(5, 2), fresh=("attention_norm", "mlp_norm", "final_norm")))
    parts = part_of(wide(model_type))
    norms = [name for name in found if parts[name].endswith("norm")]
    assert len(norms) >= 5
    assert all(bool((found[name] == gain).all()) for name in norms)


def test_fresh_weights_have_the_targets_width_and_the_families_spread(wide):
    folder = wide("llama")
    sizes = WidthTarget(hidden_size=64, intermediate_size=32, num_attention_heads=4)
    plan = plan_width(plan_depth(5, 2), family_of(folder.config), ModelShape.of(folder.config), sizes, None, "first")
    found = weights(folder, replace(plan, fresh=("mlp",)))
    name = "model.layers.1.mlp.down_proj.weight"
    assert found[name].shape == (64, 32)
    assert float(found[name].std()) == pytest.approx(0.02, rel=0.06)


@pytest.mark.parametrize("init", ["random", "zero_output"])
def test_grown_layers_start_as_the_family_starts_them(wide, init):
    found = weights(wide("gpt2"), plan_growth(["a"], 5, 7, init))
    at = {"random": (5, 6), "zero_output": (2, 6)}[init]
    for number in at:
        output = found[f"transformer.h.{number}.attn.c_proj.weight"]
        spread = 0.02 / sqrt(14) if init == "random" else 0.0
        assert float(output.std()) == pytest.approx(spread, rel=0.06)
        assert not found[f"transformer.h.{number}.mlp.c_proj.bias"].any()
        assert float(found[f"transformer.h.{number}.mlp.c_fc.weight"].std()) == pytest.approx(0.02, rel=0.06)


def test_the_rows_of_the_paper_code_mode(sources_root, tmp_path):
    """I5: Inheritune's own code leaves exactly wpe and ln_f fresh for GPT-2, wte and ln_f for Llama."""
    for model_type, fresh in (("gpt2", "position,final_norm"), ("llama", "embedding,final_norm")):
        tiny_model(model_type).save_pretrained(tmp_path / model_type)
        folder = open_folder(tmp_path / model_type)
        plan = complete_plan(plan_depth(5, 2), {"fresh": fresh, "seed": 2}, folder, None)
        assert plan.seed == 2
        names = differing(weights(folder, plan_depth(5, 2)), weights(folder, plan))
        wanted = {
            "gpt2": {"transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"},
            "llama": {"model.embed_tokens.weight", "model.norm.weight"},
        }
        assert names == wanted[model_type]


@pytest.mark.parametrize(
    ("model_type", "fresh", "words"),
    [("llama", "position", "position"), ("llama", "head", "head"), ("cohere2", "mlp_norm", "mlp_norm")],
)
def test_a_part_that_the_model_does_not_have_is_refused(tmp_path, model_type, fresh, words):
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=words):
        complete_plan(plan_depth(5, 2), {"fresh": fresh}, open_folder(tmp_path), None)
