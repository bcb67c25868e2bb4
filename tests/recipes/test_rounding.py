"""Budgets that whole steps cannot meet are said before anything is trained."""

import pytest

from scionlm import api
from scionlm.core.errors import DataError
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_sweep import load_request
from scionlm.recipes.presets import load_recipe, preset_names
from scionlm.recipes.rounding import rounded_budgets

SMALL = ["source=x", "data.dir=x", "inherit.layers=2"]


def messages(*overrides: str) -> list[str]:
    return rounded_budgets(load_recipe("inheritune", [*SMALL, *overrides]))


def test_less_than_a_step_is_said_with_what_is_trained_on_and_a_batch_that_fits():
    assert messages("train.tokens=8k") == [
        "train.tokens 8,000 is less than one step of train.global_batch_tokens 131,072: 131,072 are trained on; "
        "lower train.global_batch_tokens (e.g. 1024)"
    ]


@pytest.mark.parametrize(
    ("budget", "batch", "is_said"),
    [(110_000, 100_000, True), (1_000_001, 100_000, False), (909_091, 1_000_000, False), (909_090, 1_000_000, True)],
)
def test_a_tenth_more_is_where_it_is_said(budget, batch, is_said):
    found = messages(f"train.tokens={budget}", f"train.global_batch_tokens={batch}", "data.seq_len=1000")
    assert bool(found) == is_said


def test_the_batch_that_is_proposed_meets_the_budget():
    found = messages("train.tokens=200k")
    assert "no whole number of steps" in found[0]
    batch = found[0].partition("(e.g. ")[2].rstrip(")")
    assert not messages("train.tokens=200k", f"train.global_batch_tokens={batch}")


def test_a_single_sequence_that_is_too_long_already_is_what_to_lower():
    assert messages("train.tokens=600", "train.global_batch_tokens=1024")[0].endswith("lower data.seq_len")


def test_steps_and_times_are_no_budgets_of_tokens():
    assert not messages("train.steps=1")
    assert not messages("train.time=5 min")


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_grows(name):
    loaded = load_request(name)
    for recipe in [loaded] if isinstance(loaded, Recipe) else [run.recipe for run in loaded.runs]:
        assert rounded_budgets(recipe) == []


def test_plan_and_run_say_it_and_what_many_runs_share_once(tmp_path, capsys, tiny_folder):
    asked = [f"source={tiny_folder}", "train.tokens=8k", "train.global_batch_tokens=131072", "inherit.layers=2"]
    api.plan("strategies-mini", asked)
    assert capsys.readouterr().err.count("train.tokens 8,000 is less than one step") == 1
    (tmp_path / "no-data").mkdir()
    with pytest.raises(DataError):
        api.run("inheritune", [*asked, f"data.dir={tmp_path / 'no-data'}"], out=tmp_path / "run")
    assert "train.tokens 8,000 is less than one step" in capsys.readouterr().err
