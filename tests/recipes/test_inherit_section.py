"""The `inherit:` section: what is refused, which plan comes out, and which weights that plan inherits."""

import time

import pytest
import torch

from factories import tiny_model
from scionlm.analysis.ranking import CRITERIA
from scionlm.core.errors import UsageError
from scionlm.families import ModelShape, family_of
from scionlm.families.shape import expected_tensors
from scionlm.recipes.config_inherit import InheritConfig
from scionlm.recipes.measured import MEASURED, strategy_reason
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.selection import plan_of
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.depth import STRATEGIES
from scionlm.surgery.surgery import open_surgery

KINDS = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function that gives a source by its kind."""
    made, root = {}, tmp_path_factory.mktemp("sources")

    def get(kind="llama-tied"):
        if kind not in made:
            model_type, changes = KINDS[kind]
            tiny_model(model_type, **changes).save_pretrained(root / kind)
            made[kind] = open_folder(root / kind)
        return made[kind]

    return get


def recipe(inherit, **more):
    settings = {"source": "source", "data.dir": "data", "train.steps": 3, "inherit": inherit}
    return load_recipe("inheritune", settings | more)


def weights(source, plan):
    """Return the child's tensors by name, without ties."""
    with open_surgery([source], plan) as surgery:
        state = surgery.build(torch.float32).state_dict()
        surgery.prove(surgery.build(torch.float32))
        return {op.place.name: state[op.place.name] for op in surgery.operations}


def part_of(source):
    return {place.name: place.spec.part for place in expected_tensors(source.config)}


def fresh_in(source, asked):
    """Return the names of what is not the source's in a child with all layers."""
    theirs = load_hf_model(source).state_dict()
    mine = weights(source, plan_of(asked, source))
    assert set(mine) == set(part_of(source))
    return {name for name in mine if not torch.equal(mine[name], theirs[name])}


# --- what is refused ---


@pytest.mark.parametrize(
    ("inherit", "words"),
    [
        ({}, "either layers"),
        ({"layers": None, "strategy": "taylor"}, "either layers"),
        ({"layers": 2, "keep": "0-1"}, "keep names the layers"),
        ({"keep": "0-1", "strategy": "taylor"}, "keep names the layers"),
        ({"layers": "haf"}, r"inherit\.layers: neither a number of layers nor `half`"),
        ({"layers": 2, "strategy": "tailor"}, "inherit.strategy: 'tailor' is unknown; did you mean 'taylor'"),
        ({"layers": 2, "strategy": "frist"}, "did you mean 'first'"),
        ({"strategy": "potent_prefx"}, "did you mean 'potent_prefix'"),
        ({"layers": 2, "strategy": "taylor:3"}, "nothing behind a colon"),
        ({"strategy": "first", "width": "half"}, "either layers"),
        ({"layers": 2, "repeat": True}, "without keep"),
        ({"layers": 2, "analysis": "looked"}, "first is not measured"),
        ({"layers": 2, "fresh": ["mpl"]}, "did you mean 'mlp'"),
        ({"layers": 2, "width": "half", "hidden_size": 16}, "leave hidden_size out"),
        ({"layers": 2, "width": "third"}, r"inherit\.width"),
        ({"layers": 2, "importance": "activation"}, "no size is to be cut"),
        ({"layers": 2, "importance": "magnitud", "hidden_size": 8}, r"inherit\.importance"),
        ({"layers": 2, "hiden_size": 8}, "did you mean 'inherit.hidden_size'|did you mean 'hidden_size'"),
    ],
)
def test_a_wrong_section_is_refused_by_name(inherit, words):
    with pytest.raises(UsageError, match=words):
        recipe(inherit)


@pytest.mark.parametrize(
    ("inherit", "words"),
    [
        ({"layers": 6}, "layers: 6"),
        ({"layers": 0, "strategy": "taylor"}, "layers: 0 cannot be chosen by taylor"),
        ({"layers": 6, "strategy": "greedy"}, "5 layers"),
        ({"keep": "0-1,1"}, "stands twice"),
        ({"keep": [9], "repeat": True}, "layer 9 does not exist"),
        ({"layers": 2, "hidden_size": 64}, "hidden_size: 64 is not between"),
        ({"layers": 2, "num_attention_heads": 3}, "num_attention_heads 3"),
        ({"layers": 2, "fresh": ["position"]}, "fresh: .* has no position"),
        ({"layers": 2, "fresh": ["head"]}, "fresh: .* has no head"),
        ({"layers": 2, "strategy": "taylor", "analysis": "nowhere"}, "nowhere holds no finished analysis"),
    ],
)
def test_what_the_source_does_not_have_is_refused_before_anything_is_loaded(folder, inherit, words):
    asked, source = recipe(inherit), folder()
    began = time.process_time()
    with pytest.raises(UsageError, match=words):
        plan_of(asked, source)
    assert time.process_time() - began < 1


def test_an_unknown_fidelity_is_refused():
    with pytest.raises(UsageError, match="fidelity"):
        recipe({"layers": 2}, fidelity="paper")


# --- which layers ---


def test_half_is_half_and_at_least_one(folder, tmp_path):
    assert plan_of(recipe({"layers": "half"}), folder()).keep == (0, 1)
    assert plan_of(recipe({"layers": "half", "strategy": "last"}), folder()).keep == (3, 4)
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    assert plan_of(recipe({"layers": "half"}), open_folder(tmp_path)).keep == (0,)


def test_a_layer_is_inherited_twice_where_that_is_asked_for(folder):
    plan = plan_of(recipe({"keep": "0-1,0-1", "repeat": True}), folder())
    assert plan.keep == (0, 1, 0, 1)
    found = weights(folder(), plan)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(1)], found[name.format(3)])
    assert not torch.equal(found[name.format(1)], found[name.format(2)])


@pytest.mark.parametrize("strategy", [*CRITERIA, "angular_block", "greedy"])
def test_what_stands_in_for_a_measured_plan_has_its_shape(folder, strategy):
    assert len(plan_of(recipe({"layers": 3, "strategy": strategy}), folder()).layers) == 3


@pytest.mark.parametrize(("layers", "number"), [(None, 2), (4, 4), ("half", 2)])
@pytest.mark.parametrize("strategy", ["potent_prefix", "before_lazy_group"])
def test_half_stands_in_for_a_number_that_is_not_known(folder, strategy, layers, number):
    assert len(plan_of(recipe({"layers": layers, "strategy": strategy}), folder()).layers) == number


def test_width_or_parts_alone_keep_every_layer(folder):
    for inherit in ({"width": "half"}, {"intermediate_size": 8}, {"fresh": ["mlp"]}):
        assert plan_of(recipe(inherit), folder()).keep == (0, 1, 2, 3, 4)
    assert plan_of(recipe({"strategy": "every:2"}), folder()).keep == (0, 2, 4)


def test_every_strategy_has_a_reason():
    assert not set(STRATEGIES) & set(MEASURED)
    reasons = [strategy_reason(name) for name in (*STRATEGIES, *MEASURED)]
    assert "as listed" not in reasons
    assert len(set(reasons)) == len(reasons)
    assert CRITERIA["removal"] in strategy_reason("removal")
    assert strategy_reason("explicit") == "as listed"
    assert "half" in strategy_reason("potent_prefix:half")
    assert "at most 3" in strategy_reason("before_lazy_group:3")
    assert strategy_reason("first_last:2") == STRATEGIES["first_last"][1]


# --- parts ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fresh_is_not_the_sources_and_everything_else_is(folder, kind):
    source, fresh = folder(kind), ["mlp", "mlp_norm"]
    wanted = {name for name, part in part_of(source).items() if part in fresh}
    assert wanted
    assert fresh_in(source, recipe({"layers": 5, "fresh": fresh})) == wanted
    assert fresh_in(source, recipe({"layers": 5})) == set()


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2"])
def test_sub_modules_are_disjoint_and_cover_the_layers(folder, kind):
    source, parts = folder(kind), part_of(folder(kind))
    layers = family_of(source.config).layers
    every = {name for name in parts if name.startswith(layers)}
    ablations = {
        "attention": ["mlp", "mlp_norm", "attention_norm"],
        "mlp": ["attention", "mlp_norm", "attention_norm"],
        "norms": ["attention", "mlp"],
    }
    taken = [every - fresh_in(source, recipe({"layers": 5, "fresh": fresh})) for fresh in ablations.values()]
    assert all(taken)
    assert sum(map(len, taken)) == len(set.union(*taken))
    assert set.union(*taken) == every


@pytest.mark.parametrize(
    ("kind", "in_text", "in_code"),
    [
        ("gpt2", {"final_norm", "position"}, {"final_norm", "position"}),
        ("gpt2-untied", {"final_norm", "position"}, {"final_norm", "position", "embedding"}),
        ("llama-tied", {"final_norm"}, {"final_norm"}),
        ("llama-untied", {"final_norm"}, {"final_norm", "embedding"}),
    ],
)
def test_the_papers_modes_leave_exactly_what_they_say_fresh(folder, kind, in_text, in_code):
    """I5: Inheritune's code leaves wpe and ln_f of GPT-2 fresh, wte and ln_f of an untied Llama."""
    source, parts = folder(kind), part_of(folder(kind))
    wanted = {"paper-text": in_text, "paper-code": in_code, "recommended": set()}
    for fidelity, fresh in wanted.items():
        found = fresh_in(source, recipe({"layers": 5}, fidelity=fidelity))
        assert found == {name for name, part in parts.items() if part in fresh}, fidelity


def test_fidelity_and_named_parts_are_joined(folder):
    plan = plan_of(recipe({"layers": 2, "fresh": ["mlp", "final_norm"]}, fidelity="paper-code"), folder("llama-untied"))
    assert plan.fresh == ("embedding", "mlp", "final_norm")


def test_fresh_weights_are_those_of_the_recipes_seed(folder):
    one, again, other = (
        weights(folder(), plan_of(recipe({"layers": 2, "fresh": ["mlp"]}, seed=seed), folder())) for seed in (3, 3, 4)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


# --- width ---


def test_half_width_takes_the_first_half_of_everything(folder):
    source = folder()
    plan = plan_of(recipe({"width": "half"}), source)
    theirs, mine = load_hf_model(source).state_dict(), weights(source, plan)
    assert plan.hidden == tuple(range(16))
    assert {layer.heads for layer in plan.layers} == {(0, 1)}
    assert {layer.kv_heads for layer in plan.layers} == {(0,)}
    assert {layer.ffn for layer in plan.layers} == {tuple(range(24))}
    layer = "model.layers.3."
    for name, (rows, columns) in {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.o_proj": (16, 16),
        "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    }.items():  # fmt: skip
        found = mine[f"{layer}{name}.weight"]
        assert torch.equal(found, theirs[f"{layer}{name}.weight"][:rows, :columns])
        assert not torch.equal(found, theirs[f"{layer}{name}.weight"][-rows:, -columns:])


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_half_width_is_short_for_its_sizes(folder, kind):
    source, shape = folder(kind), ModelShape.of(folder(kind).config)
    sizes = {
        "layers": 5, "hidden_size": shape.hidden_size // 2, "num_attention_heads": shape.num_attention_heads // 2,
        "intermediate_size": shape.intermediate_size // 2,
    }  # fmt: skip
    plan = plan_of(recipe({"width": "half"}), source)
    assert plan == plan_of(recipe(sizes), source)
    assert plan != plan_of(recipe(sizes | {"intermediate_size": 8}), source)
    assert weights(source, plan)


def test_key_value_heads_that_are_no_whole_half_all_stay(tmp_path):
    tiny_model(num_attention_heads=4, num_key_value_heads=1).save_pretrained(tmp_path)
    plan = plan_of(recipe({"width": "half"}), open_folder(tmp_path))
    assert (plan.layers[0].heads, plan.layers[0].kv_heads) == ((0, 1), None)


def test_an_odd_width_is_not_halved(tmp_path):
    tiny_model(intermediate_size=47).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"inherit\.width: half of .* intermediate_size 47 is no whole number"):
        plan_of(recipe({"width": "half"}), open_folder(tmp_path))


# --- overrides ---

GIVEN = ["source=x", "data.dir=d", "train.steps=3"]


@pytest.mark.parametrize(
    "word",
    ["layers=2", "layers=half", "keep=0-2", "strategy=potent_prefix", "strategy=every:2", "width=half",
     "hidden_size=16", "fresh=[mlp]"],
)  # fmt: skip
def test_a_bare_recipe_needs_something_that_says_how_many(word):
    assert load_recipe("inheritune", [*GIVEN, f"inherit.{word}"])


def overridden(*words):
    return load_recipe("inheritune-mini", [f"inherit.{word}" for word in words]).inherit


def test_a_key_clears_what_it_excludes():
    assert overridden() == InheritConfig(layers=8, strategy="first_last")
    assert overridden("keep=0-2") == InheritConfig(keep="0-2")
    assert overridden("strategy=taylor") == InheritConfig(layers=8, strategy="taylor")
    assert overridden("strategy=potent_prefix") == InheritConfig(strategy="potent_prefix")
    assert overridden("strategy=potent_prefix", "layers=4") == InheritConfig(layers=4, strategy="potent_prefix")
    assert overridden("width=half") == InheritConfig(layers=8, strategy="first_last", width="half")
    with pytest.raises(UsageError, match="keep names"):
        overridden("keep=0-2", "layers=3")
    whole = load_recipe("inheritune-mini", ["inherit.layers=3", "inherit={keep: 0-2}", "inherit.fresh=[mlp]"])
    assert whole.inherit == InheritConfig(keep="0-2", fresh=["mlp"])


def test_a_file_with_keep_takes_a_number_of_layers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "recipe: inheritune\nsource: x\ntrain: {steps: 3}\n"
        "inherit: {keep: [0, 0], repeat: true, hidden_size: 8, num_attention_heads: 2}\n"
    )
    sizes = {"hidden_size": 8, "num_attention_heads": 2}
    assert load_recipe(str(path)).inherit == InheritConfig(keep=[0, 0], repeat=True, **sizes)
    assert load_recipe(str(path), ["inherit.layers=3"]).inherit == InheritConfig(layers=3, **sizes)
    half = load_recipe(str(path), ["inherit.strategy=removal", "inherit.layers=half", "inherit.width=half"])
    assert half.inherit == InheritConfig(layers="half", strategy="removal", width="half")


def test_a_single_layer_may_be_kept_by_its_number():
    assert InheritConfig.model_validate({"keep": 0}) == InheritConfig(keep="0")
    assert load_recipe("inheritune-mini", ["inherit.keep=12"]).inherits.keep == "12"
    with pytest.raises(UsageError, match=r"inherit\.keep: true is not a value for it"):
        load_recipe("inheritune-mini", ["inherit.keep=true"])


def test_the_bare_recipe_keeps_half_of_the_layers_where_nothing_says_how_many():
    def bare(*words):
        return load_recipe("inheritune", ["source=x", "data.dir=d", "train.steps=3", *words]).inherit

    assert bare() == InheritConfig(layers="half")
    assert bare("inherit.strategy=spaced") == InheritConfig(layers="half", strategy="spaced")
    assert bare("inherit.keep=0-2") == InheritConfig(keep="0-2")
    assert bare("inherit.width=half") == InheritConfig(width="half")
    assert bare("inherit.strategy=potent_prefix") == InheritConfig(strategy="potent_prefix")
    assert bare("inherit.layers=3") == InheritConfig(layers=3)
