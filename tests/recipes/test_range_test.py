"""`scion plan --find-lr`: a few steps at a rising rate on a tiny model, of which nothing stays."""

import hashlib
import json
import tempfile
from dataclasses import replace

import pytest
import torch
from test_scratch import MODEL

from scionlm import api
from scionlm.cli.main import run
from scionlm.core.errors import BrokenModelError, UsageError
from scionlm.planning.range_curve import range_rates, read_curve
from scionlm.recipes import range_test as module
from scionlm.recipes.range_test import range_test
from scionlm.train.optimizer import Optimizer
from whole_runs import SETTINGS, Watch

FEATURES = [
    "stages that replay", "replay", "branch of stages", "branch with a teacher of its own", "muon",
    "distill, faded before a stage that resets", "dropout and accumulation",
]  # fmt: skip


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


@pytest.fixture
def overrides(tiny_folder, data_folder):
    return SETTINGS | {"source": str(tiny_folder), "data.dir": str(data_folder.path)}


@pytest.fixture
def rates_seen(monkeypatch):
    """The rates of the steps that an optimizer makes."""
    seen, step = [], Optimizer.step

    def seeing(optimizer, lr, divisor=1.0):
        seen.append(lr)
        step(optimizer, lr, divisor)

    monkeypatch.setattr(Optimizer, "step", seeing)
    return seen


def test_rates_are_tried_until_the_loss_rises_and_nothing_stays(
    overrides, tiny_folder, data_folder, tmp_path, monkeypatch, rates_seen
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = contents(tiny_folder), contents(data_folder.path)
    found = api.plan("inheritune", overrides, find_lr=True)
    test = found["lr_range_test"]
    assert found["num_steps"] == 8, "the rest is the plan of the recipe, not of the test"
    assert json.loads(json.dumps(test)) == test
    assert 20 < test["steps"] <= len(range_rates())
    assert test["lrs"] == range_rates()[: len(test["lrs"])]
    assert rates_seen[: len(test["lrs"])] == test["lrs"]
    assert len(test["lrs"]) == len(test["losses"]) == len(test["smoothed"])
    assert test["watched_tokens"] == SETTINGS["train.global_batch_tokens"]
    reading = read_curve(test["before"], test["lrs"], test["losses"])
    assert (reading.lr_lowest, reading.proposal, reading.why) == (test["lr_lowest"], test["proposal"], test["why"])
    assert 1e-5 < test["lr_lowest"] < test["lr_diverges"]
    assert 1e-5 < test["proposal"] < test["lr_diverges"]
    assert (contents(tiny_folder), contents(data_folder.path)) == before
    assert not list(tmp_path.iterdir())


def test_the_first_rate_changes_next_to_nothing_and_the_same_recipe_gives_the_same_curve(make, monkeypatch):
    monkeypatch.setattr(module, "range_rates", lambda: range_rates()[:3])
    first, again = range_test(make()), range_test(make())
    assert first == again
    assert first["losses"] == pytest.approx([first["before"]] * 3, abs=0.01)
    assert first["losses"] != [first["before"]] * 3


def test_what_is_watched_is_not_trained_on_and_the_recipes_own_batches_follow(make, monkeypatch):
    monkeypatch.setattr(module, "range_rates", lambda: range_rates()[:2])
    watch = Watch(monkeypatch)
    range_test(make())
    assert len(watch.samples) == 3
    assert len({sample for batch in watch.samples for sample in batch}) == sum(map(len, watch.samples))
    assert {len(batch) for batch in watch.samples} == {make().resolved_stages[0].sequences_per_step}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_recipes(make, feature, monkeypatch):
    monkeypatch.setattr(module, "range_rates", lambda: range_rates()[:2])
    assert range_test(make(feature))["steps"] == 2


def test_a_model_from_scratch_is_tried_too(overrides, monkeypatch):
    monkeypatch.setattr(module, "range_rates", lambda: range_rates()[:2])
    own = {key: value for key, value in overrides.items() if key not in ("source", "inherit.layers")}
    found = api.plan("scratch", own | {"model": MODEL, "train.micro_batch_size": "auto"}, find_lr=True)
    assert found["lr_range_test"]["steps"] == 2


def test_a_gradient_that_is_not_finite_ends_the_test(make, monkeypatch):
    steps = iter(range(100))
    train_step = module.train_step

    def not_applied(*arguments):
        result = train_step(*arguments)
        return replace(result, applied=False) if next(steps) == 4 else result

    monkeypatch.setattr(module, "train_step", not_applied)
    found = range_test(make())
    assert (found["steps"], len(found["lrs"]), len(found["losses"])) == (5, 4, 4)
    assert found["lr_diverges"] == range_rates()[4]


def test_broken_weights_are_no_matter_of_rates(make, monkeypatch):
    make_model = module.make_model

    def broken(setting):
        model = make_model(setting)
        torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
        return model

    monkeypatch.setattr(module, "make_model", broken)
    with pytest.raises(BrokenModelError, match="before the first step"):
        range_test(make())


def test_what_is_needed_is_said(overrides):
    with pytest.raises(UsageError, match=r"set data\.dir=FOLDER.*scion prepare"):
        api.plan("inheritune", overrides | {"data.dir": None, "data.mixture": None}, find_lr=True)
    with pytest.raises(UsageError, match="the one model that a recipe begins with"):
        api.plan("inheritune-grow-mini", {}, find_lr=True)
    with pytest.raises(UsageError, match="--find-lr measures one device"):
        api.plan("inheritune", overrides, devices=2, find_lr=True)
    with pytest.raises(UsageError, match="--find-lr measures one recipe, not a sweep"):
        api.plan("strategies-mini", {}, find_lr=True)


@pytest.fixture
def plan_printed(overrides, monkeypatch, capsys):
    """Return what `scion plan --find-lr` prints where the test has found certain losses."""

    def plan_printed(losses, *flags):
        record = module.as_record(5.0, range_rates()[: len(losses)], losses) | {"watched_tokens": 96}
        monkeypatch.setattr(module, "range_test", lambda recipe: record)
        words = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        assert run(["plan", "inheritune", *words, "--find-lr", *flags]) == 0
        return record, capsys.readouterr().out

    return plan_printed


def test_what_is_printed(plan_printed):
    fall = [5.0 - 0.02 * number for number in range(40)]
    record, text = plan_printed([*fall, 4.5, 5.1, 6.0, 7.0])
    assert f"proposal: optimizer.lr={record['proposal']:g} (the recipe has 0.003)" in text
    assert record["why"] in " ".join(text.split())
    rows = [line.split() for line in text.split("range test")[1].split("proposal")[0].splitlines()]
    marked = {" ".join(row[3:]): float(row[0]) for row in rows if len(row) > 3 and row[1].startswith(("4.", "5."))}
    assert marked["lowest"] == pytest.approx(record["lr_lowest"], rel=0.05)
    assert marked["clearly higher"] == pytest.approx(record["lr_diverges"], rel=0.05)
    assert len(rows) < 30
    record, text = plan_printed([*fall, 4.5, 5.1, 6.0, float("inf")], "--json")
    assert json.loads(text)["lr_range_test"] == record
    record, text = plan_printed([float("inf")])
    assert "no proposal" in text
    assert "optimizer.lr=" not in text


def test_help_says_what_it_does(capsys):
    assert run(["plan", "--help"]) == 0
    assert "--find-lr" in capsys.readouterr().out
