"""Models from scratch, alone and as the reference of others: first weights, resume, and what is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file

from factories import VOCAB_SIZE
from scionlm.core.errors import StoppedError, StorageError, UsageError
from scionlm.core.records import read_json
from scionlm.families.models import random_model
from scionlm.recipes import child as child_module
from scionlm.recipes import training as training_module
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.reference import reference_recipe
from scionlm.recipes.run import run_recipe
from scionlm.report import render_report
from scionlm.schedules import Sizes, build_schedule
from whole_runs import SETTINGS, Watch, column, metrics_of, quicken, run_stopped, timeless, weights_of

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
TRAIN = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")} | {"train.steps": 3}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def scratch(data_folder):
    """Return a recipe that trains from scratch."""

    def scratch(model=MODEL, **changes):
        settings = {key.replace("__", "."): value for key, value in changes.items()}
        return load_recipe("scratch", TRAIN | {"data.dir": str(data_folder.path), "model": model} | settings)

    return scratch


@pytest.fixture
def heir(data_folder):
    """Return a recipe that trains its reference first."""

    def heir(reference=None, **changes):
        settings = {key.replace("__", "."): value for key, value in changes.items()}
        first = {"model": MODEL} | (reference or {})
        base = TRAIN | {"data.dir": str(data_folder.path), "inherit.layers": 2, "reference": first}
        return load_recipe("inheritune", base | settings)

    return heir


def test_the_first_weights_are_the_familys_own(scratch, tmp_path, monkeypatch):
    kept = {}

    def watching(setting, make_model, *rest):
        kept.update(make_model(setting).state_dict())
        return train_model(setting, make_model, *rest)

    train_model = child_module.train_model
    monkeypatch.setattr(child_module, "train_model", watching)
    result = run_recipe(scratch(), tmp_path / "run")
    config = MODEL | {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
    wanted = random_model(config, seed=0).state_dict()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    before = [loss["nll"] for loss in result["before"].values()]
    assert before == pytest.approx([math.log(VOCAB_SIZE)] * 2, abs=0.05)
    assert result["source"] is None
    assert result["model"]["num_hidden_layers"] == 4


def test_the_result_is_an_ordinary_folder_with_the_datas_tokenizer(scratch, data_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_recipe(scratch(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.eos_token_id == data_folder.tokenizer.separator_id
    assert len(tokenizer) == data_folder.tokenizer.vocab_size
    assert next(iter(load_file(tmp_path / "run/model/model.safetensors").values())).dtype == torch.float32
    assert "from scratch" in (tmp_path / "run/model/README.md").read_text()
    assert "from random weights" in render_report(tmp_path / "run")
    assert "source" not in read_json(tmp_path / "run/manifest.json")


def test_no_stop_changes_anything(scratch, tmp_path, monkeypatch):
    run_recipe(scratch(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        assert run_stopped(scratch(), tmp_path / "parts", Watch(patch, [1, 2, 3])) == 3
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert timeless(read_json(tmp_path / "parts/result.json")) == timeless(read_json(tmp_path / "whole/result.json"))


def test_no_stop_changes_stages_that_share_one_schedule(scratch, tmp_path, monkeypatch):
    stages = [
        {"name": "long", "train": {"steps": 3}},
        {"name": "large", "train": {"steps": 2, "global_batch_tokens": 24 * 8}},
    ]
    recipe = scratch(stages=stages, schedule={"over": "run", "warmup": 1})
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        assert run_stopped(recipe, tmp_path / "parts", Watch(patch, range(1, 6))) == 5
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    whole = build_schedule("cosine", Sizes(3 + 2 * 2, 1, floor=0.1))
    wanted = [3e-3 * whole.at(t) for t in (1, 2, 3, 5, 7)]
    assert column(tmp_path / "parts", "optim/lr") == column(tmp_path / "whole", "optim/lr") == wanted
    longer = [{"name": "long", "train": {"steps": 3}}, {"name": "large", "train": {"steps": 3}}]
    with pytest.raises(UsageError, match="with other settings"):
        run_recipe(scratch(stages=longer, schedule={"over": "run", "warmup": 1}), tmp_path / "whole", allow_change=True)


def test_a_reference_is_a_run_from_scratch(heir, scratch, tmp_path):
    run_recipe(heir({"train": {"steps": 5}, "optimizer": {"lr": 1e-3}}), tmp_path / "run")
    run_recipe(scratch(train__steps=5, optimizer__lr=1e-3), tmp_path / "alone")
    assert weights_of(tmp_path / "run/reference") == weights_of(tmp_path / "alone")
    assert metrics_of(tmp_path / "run/reference") == metrics_of(tmp_path / "alone")
    assert read_json(tmp_path / "run/reference/status.json")["state"] == "done"


def test_its_children_inherit_from_it(heir, tmp_path, monkeypatch):
    kept = {}

    def watching(setting, make_model, out, *rest):
        def made(its_setting):
            model = make_model(its_setting)
            kept[out.name] = {key: value.clone() for key, value in model.state_dict().items()}
            return model

        return train_model(setting, made, out, *rest)

    train_model = child_module.train_model
    monkeypatch.setattr(child_module, "train_model", watching)
    result = run_recipe(heir(control=True), tmp_path / "run")
    trained = load_file(tmp_path / "run/reference/model/model.safetensors")
    assert all(torch.equal(kept["run"][k], v) for k, v in trained.items() if k in kept["run"])
    assert not any(
        torch.equal(kept["control"][k], v) for k, v in trained.items() if k in kept["control"] and v.dim() > 1
    )
    assert result["source"]["name"] == "reference"
    wanted = read_json(tmp_path / "run/reference/result.json")["domains"]
    assert result["source"]["domains"] == wanted


def test_rounds_are_measured_beside_a_reference_and_its_cost(heir, tmp_path):
    run_recipe(heir(grow={"by": 1, "max_layers": 3, "until": "end"}), tmp_path / "run")
    reference = read_json(tmp_path / "run/rounds.json")["reference"]
    training = read_json(tmp_path / "run/reference/training.json")
    assert [reference[key] for key in ("tokens", "flops")] == [training[key] for key in ("tokens", "flops")]


def test_stopped_in_a_reference_and_in_its_child(heir, tmp_path, monkeypatch):
    recipe = heir(distill={"weight": 0.5})
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        assert run_stopped(recipe, tmp_path / "parts", Watch(patch, range(1, 7))) == 6
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert weights_of(tmp_path / "parts/reference") == weights_of(tmp_path / "whole/reference")


def test_a_reference_that_is_done_is_not_compared_again(heir, tmp_path, monkeypatch):
    """What the child's run settled, or what may change of it, is nothing to the reference."""
    with monkeypatch.context() as patch:
        Watch(patch, [4])
        with pytest.raises(StoppedError):
            run_recipe(heir(), tmp_path / "run")
    result = run_recipe(heir(checkpoint__every=1, train__parallel="ddp"), tmp_path / "run")
    assert result["model"]["num_hidden_layers"] == 2


def test_a_reference_that_fails_takes_nothing_away(heir, tmp_path, monkeypatch):
    def full(*arguments):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "fit", full)
        with pytest.raises(StorageError):
            run_recipe(heir(), tmp_path / "run")
    assert read_json(tmp_path / "run/status.json")["state"] in ("running", "failed")
    run_recipe(heir(), tmp_path / "run")
    assert read_json(tmp_path / "run/status.json")["state"] == "done"


def test_a_mistyped_key_leaves_nothing_behind(scratch, tmp_path):
    recipe = scratch(MODEL | {"hiden_size": 3, "vocab_size": 300}, data__dir=None, data__mixture=None)
    with pytest.raises(UsageError, match="hiden_size"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reference_takes_from_the_child_what_it_leaves_open(heir):
    recipe = reference_recipe(heir({"train": {"tokens": "1k"}, "schedule": {"name": "constant"}}, seed=3))
    assert (recipe.train.tokens, recipe.train.steps) == (1000, None)
    assert recipe.schedule.name == "constant"
    assert (recipe.seed, recipe.optimizer.lr, recipe.data.seq_len) == (3, 3e-3, 24)
    assert recipe.model == MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"hiden_size": 3}}, "model.hiden_size is no setting of llama; did you mean 'hidden_size'"),
        ({"model": {"hidden_size": 3}}, "model.model_type is required"),
        ({"model": MODEL | {"model_type": "mamba"}}, "model_type 'mamba'"),
        (
            {"model": MODEL | {"num_attention_heads": 3}},
            "model: hidden_size 32 is not divisible",
        ),
        ({"model": MODEL | {"vocab_size": 10}}, "no embedding for token 319 .* model.vocab_size=320"),
        ({"source": "somewhere"}, "recipe scratch inherits nothing; leave source out"),
        ({"distill": {}}, "has no source to learn from"),
        ({"control": True}, "begins with it already"),
        ({"model": MODEL | {"hidden_act": "foo"}}, "model: transformers refuses it"),
        ({"model": MODEL | {"tie_word_embeddings": "maybe"}}, "model: transformers refuses it"),
        ({"reweight": {"reference": "source"}}, "has no source to measure"),
        ({"model": None}, "needs model"),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message, scratch, tmp_path):
    from scionlm.core.errors import DataError

    with pytest.raises((UsageError, DataError), match=message):
        run_recipe(scratch(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "somewhere"}, "set either source"),
        ({"reference.model": None}, "reference.model"),
        ({"model": MODEL}, "model is for recipe scratch"),
        ({"stages": [{"name": "a"}, {"name": "b"}]}, "a reference is trained in one stage"),
        ({"reference": {"model": MODEL, "train": {"time": "1 min"}}}, "reference: its lengths are steps"),
        ({"inherit.layers": 5}, "the source has 4 layers"),
        ({"reference": {"model": MODEL, "train": {"step": 4}}}, "reference: unknown key 'train.step'"),
    ],
)
def test_references_that_cannot_be_are_refused(changes, message, heir, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_recipe(heir(**{key.replace(".", "__"): value for key, value in changes.items()}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_ranks_train_a_reference_and_its_child(heir, pair, tmp_path):
    run_recipe(heir(), tmp_path / "alone")
    answers = pair.run(heir(train__parallel="fsdp"), tmp_path / "pair")
    assert [answer["error"] for answer in answers] == [None, None]
    for part in ("", "reference"):
        mine, theirs = (read_json(tmp_path / out / part / "result.json")["domains"] for out in ("pair", "alone"))
        for name, loss in mine.items():
            assert loss["nll"] == pytest.approx(theirs[name]["nll"], rel=1e-5)
