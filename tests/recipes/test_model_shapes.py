"""Known models by name: their configurations, whose vocabulary counts, and how their first weights are drawn."""

import json

import pytest
import torch
from transformers import AutoConfig

from factories import VOCAB_SIZE
from scionlm.core.config import load_yaml
from scionlm.core.errors import UsageError
from scionlm.core.records import read_json
from scionlm.families import count_parameters
from scionlm.families.models import empty_model, random_model
from scionlm.recipes import child as child_module
from scionlm.recipes.config_sweep import load_request
from scionlm.recipes.model_shapes import KNOWN_MODELS, KNOWN_SHAPES, init_of, model_config
from scionlm.recipes.origin import check_model, open_source
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.reference import reference_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import SETTINGS, quicken

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
TRAIN = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")} | {"train.steps": 2}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def scratch(data_folder):
    def scratch(model, **changes):
        settings = {key.replace("__", "."): value for key, value in changes.items()}
        return load_recipe("scratch", TRAIN | {"data.dir": str(data_folder.path), "model": model} | settings)

    return scratch


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tinyllama-1.1b", 1_100_048_384),
        ("tinyllama-120m", 121_129_728),
        ("pythia-1.4b", 1_414_647_808),
        ("pythia-1b", 1_011_781_632),
        ("pythia-410m", 405_334_016),
        ("pythia-160m", 162_322_944),
        ("pythia-70m", 70_426_624),
        ("gpt2-xl", 1_557_611_200),
        ("gpt2-large", 774_030_080),
        ("gpt2-medium", 354_823_168),
        ("gpt2", 124_439_808),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_known_models_have_the_published_parameters(name, parameters):
    config = model_config({"shape": name})
    assert count_parameters(config)["total"] == parameters
    with torch.device("meta"):
        model = empty_model(config, torch.float32)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters
    check_model({"shape": name}, "model")  # and every key is one of transformers'


def test_no_known_model_is_left_out_above():
    assert set(KNOWN_MODELS) <= set(KNOWN_SHAPES)
    assert len(KNOWN_MODELS) == 12


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        # As the files on the hub have it, with the older names of the rotary settings.
        ("tinyllama-1.1b", {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000,
                            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
                            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "max_position_embeddings": 2048,
                            "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False}),
        ("pythia-410m", {"model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 50304,
                         "num_hidden_layers": 24, "num_attention_heads": 16, "layer_norm_eps": 1e-05,
                         "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25,
                         "hidden_act": "gelu", "tie_word_embeddings": False, "use_parallel_residual": True}),
        ("gpt2", {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
                  "vocab_size": 50257, "layer_norm_epsilon": 1e-05, "initializer_range": 0.02, "resid_pdrop": 0.1,
                  "embd_pdrop": 0.1, "attn_pdrop": 0.1, "activation_function": "gelu_new", "n_inner": None}),
    ],
)  # fmt: skip
def test_known_models_are_what_transformers_makes_of_the_published_files(name, theirs):
    mine, published = (AutoConfig.for_model(**config).to_dict() for config in (model_config({"shape": name}), theirs))
    legacy = {"rotary_pct", "rotary_emb_base", "rope_theta"}
    differing = {key for key in mine | published if mine.get(key) != published.get(key)}
    assert differing - legacy == set()


def test_the_real_smollm2_is_the_known_one():
    from scionlm.sources import resolve

    theirs = resolve("smollm2-135m", weights=False).config
    mine = model_config({"shape": "smollm2-135m"})
    for key in (mine.keys() & theirs.keys()) - {"initializer_range"}:  # a GGUF does not say how training began
        assert mine[key] == (pytest.approx(theirs[key]) if isinstance(theirs[key], float) else theirs[key]), key
    assert {"hidden_size", "rms_norm_eps", "rope_parameters", "vocab_size", "tie_word_embeddings"} <= theirs.keys()


def test_the_vocabulary_is_the_models_then_the_datas_then_the_published_one(scratch, tmp_path):
    name = {"shape": "tinyllama-120m"}
    assert open_source(scratch(name), None).config["vocab_size"] == VOCAB_SIZE
    assert open_source(scratch(name | {"vocab_size": None}), None).config["vocab_size"] == VOCAB_SIZE
    assert open_source(scratch(name | {"vocab_size": 4096}), None).config["vocab_size"] == 4096
    elsewhere = scratch("tinyllama-120m", data__dir=str(tmp_path / "not prepared yet"))
    assert open_source(elsewhere, None).config["vocab_size"] == 32000
    assert open_source(elsewhere, None).name == "tinyllama-120m"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tinylama-120m", r"model: shape 'tinylama-120m' is unknown; did you mean 'tinyllama-120m'\? \(known: tinyll"),
        ({"shape": "llama"}, r"shape 'llama' is unknown; did you mean 'tinyllama-120m'|shape 'llama' is unknown"),
        ({"shape": None}, "shape None is unknown"),
        ({"shape": "gpt2", "model_type": "llama"}, "model_type 'llama': shape gpt2 is of gpt2; leave it out"),
        ({"shape": "gpt2", "hidden_size": 3}, "model.hidden_size is no setting of gpt2"),
        ({"shape": "tinyllama-120m", "num_attention_heads": 5}, "768 is not divisible by num_attention_heads 5"),
        ({"shape": "tinyllama-120m", "vocab_size": 10}, "no embedding for token 319 .* model.vocab_size=320"),
    ],
)
def test_names_and_changes_that_cannot_be_are_refused(model, message, scratch, tmp_path):
    from scionlm.core.errors import DataError

    with pytest.raises((UsageError, DataError), match=message):
        run_recipe(scratch(model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_override_reaches_into_a_known_model(data_folder):
    texts = [f"data.dir={data_folder.path}", "train.steps=1", "data.seq_len=16", "train.global_batch_tokens=32"]
    recipe = load_recipe("scratch", [*texts, "model.shape=gpt2", "model.n_layer=3"])
    assert recipe.model == {"shape": "gpt2", "n_layer": 3}
    assert open_source(recipe, None).config["n_layer"] == 3


def test_a_known_model_brings_its_own_first_weights_unless_it_is_told_otherwise(scratch):
    assert scratch("tinyllama-1.1b").initialization == "tinyllama"
    assert scratch("pythia-70m").initialization == "gpt_neox"
    assert scratch("gpt2").initialization == "transformers"
    assert scratch({"model_type": "llama"}).initialization == "transformers"
    assert scratch("pythia-70m", init="transformers").initialization == "transformers"
    assert scratch({"model_type": "llama"}, init="tinyllama").initialization == "tinyllama"
    with pytest.raises(UsageError, match="init"):
        scratch("gpt2", init="xavier")
    assert init_of(None) == "transformers"


def test_a_run_begins_with_them_and_says_so(scratch, tmp_path, monkeypatch):
    kept = {}

    def watching(setting, make_model, *rest):
        kept.update(make_model(setting).state_dict())
        return train_model(setting, make_model, *rest)

    train_model = child_module.train_model
    monkeypatch.setattr(child_module, "train_model", watching)
    recipe = scratch({"shape": "tinyllama-1.1b"} | TINY, seed=5)
    result = run_recipe(recipe, tmp_path / "run")
    config = read_json(tmp_path / "run/manifest.json")["model"]
    wanted = random_model(config, 5, init="tinyllama").state_dict()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert result["initialization"] == "tinyllama"
    assert "Initialized at random as TinyLlama was" in (tmp_path / "run/model/README.md").read_text()
    assert load_recipe(str(tmp_path / "run/config.yaml")) == run_again(tmp_path / "run")
    assert "shape" not in json.loads((tmp_path / "run/model/config.json").read_text())


def test_the_first_weights_are_the_same_on_two_devices(scratch, pair, tmp_path):
    recipe = scratch({"shape": "tinyllama-1.1b"} | TINY, train__steps=1)
    alone = run_recipe(recipe, tmp_path / "alone")
    answers = pair.run(recipe, tmp_path / "pair")
    assert [answer["error"] for answer in answers] == [None, None]
    both = read_json(tmp_path / "pair/result.json")
    for name, loss in alone["before"].items():
        assert both["before"][name]["nll"] == pytest.approx(loss["nll"], rel=1e-6)


def run_again(out):
    """Return the recipe of a finished run, after running its own config.yaml again, which changes nothing."""
    recipe = load_recipe(str(out / "config.yaml"))
    run_recipe(recipe, out)
    assert load_yaml(out / "config.yaml")["model"]["shape"] == "tinyllama-1.1b"
    return recipe


def test_a_reference_and_the_control_of_its_child_begin_as_the_known_model_did(data_folder):
    base = TRAIN | {"data.dir": str(data_folder.path), "inherit.layers": 1, "control": True}
    recipe = load_recipe("inheritune", base | {"reference": {"model": {"shape": "pythia-70m"}}})
    assert recipe.initialization == "gpt_neox"
    assert reference_recipe(recipe).initialization == "gpt_neox"
    told = load_recipe("inheritune", base | {"reference": {"model": "pythia-70m"}, "init": "tinyllama"})
    assert reference_recipe(told).initialization == "tinyllama"


def test_in_a_sweep_the_control_of_a_known_reference_begins_as_it_did(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("""
recipe: sweep
reference: {model: pythia-70m}
data: {dir: data, seq_len: 16}
train: {steps: 2, global_batch_tokens: 32}
inherit: {layers: 2}
runs:
  - {name: child}
  - {name: control, inherit: {init: random}}
  - {name: other, recipe: scratch, model: gpt2}
""")
    found = {run.name: run.recipe.initialization for run in load_request(str(path)).runs}
    assert found == {"reference": "gpt_neox", "child": "gpt_neox", "control": "gpt_neox", "other": "transformers"}
