"""Lengths given as time: turned into steps once, when the run begins, and kept on resuming."""

import pytest

from scionlm.core.config import load_yaml
from scionlm.core.errors import StoppedError, UsageError
from scionlm.core.signals import StopRequest
from scionlm.recipes import calibrate
from scionlm.recipes.lengths import has_times
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.recipes.timing import resolve_times
from whole_runs import quicken


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def settings(tiny_folder, data_folder):
    return {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": None, "data.seq_len": 24,
        "inherit.layers": 2, "train.global_batch_tokens": 96, "train.precision": "fp32", "control": False,
        "evaluate.tokens_per_domain": 100,
    }  # fmt: skip


def test_every_kind_of_length_becomes_steps(settings):
    recipe = load_recipe(
        "inheritune-mini",
        settings | {
            "train.time": "100 s", "schedule.name": "wsd", "schedule.warmup": "10 s", "schedule.decay": "20 s",
            "evaluate.every": "1 min", "average.start": "0.5 min",
        },
    )  # fmt: skip
    assert has_times(recipe.model_dump(mode="json"))
    resolved = resolve_times(recipe, [0.5])
    assert not has_times(resolved.model_dump(mode="json"))
    assert (resolved.total_steps, resolved.train.time) == (200, "100 s")
    assert (resolved.schedule.warmup, resolved.schedule.decay) == (20, 40)
    assert (resolved.evaluate.every, resolved.average.start) == (120, 60)
    assert resolve_times(resolved, [9.0]) == resolved


def test_a_stage_goes_by_its_own_speed(settings):
    stages = [
        {"name": "short", "train": {"time": "10 s"}},
        {"name": "long", "data": {"seq_len": 48}, "train": {"time": "10 s"}, "schedule": {"warmup": "1 s"}},
    ]
    resolved = resolve_times(load_recipe("inheritune-mini", settings | {"stages": stages}), [0.1, 0.2])
    assert [stage.total_steps for stage in resolved.resolved_stages] == [100, 50]
    assert resolved.resolved_stages[1].schedule.warmup == 5


def test_a_top_level_budget_that_no_stage_uses_is_not_measured(settings):
    stages = [{"name": "a", "train": {"steps": 4}}, {"name": "b", "train": {"tokens": 960}}]
    recipe = load_recipe("inheritune-mini", settings | {"train.time": "1 hour", "stages": stages})
    assert not has_times(recipe.model_dump(mode="json"))
    stages[1] = {"name": "b"}
    recipe = load_recipe("inheritune-mini", settings | {"train.time": "1 hour", "stages": stages})
    assert has_times(recipe.model_dump(mode="json"))


def test_what_does_not_fit_is_found_once_the_steps_are_known(settings):
    recipe = load_recipe("inheritune-mini", settings | {"train.time": "10 s", "schedule.warmup": "20 s"})
    with pytest.raises(UsageError, match=r"schedule\.warmup 40 is longer than the run of 20 steps"):
        resolve_times(recipe, [0.5])


def test_rounds_of_a_time_keep_within_a_limit_of_tokens():
    recipe = load_recipe("inheritune-grow-mini", ["train.time=0.01 s", "grow.max_tokens=5M"])
    assert len(plan_recipe(recipe, "h100")["rounds"]) == 1 + 5 + 1
    assert len(plan_recipe(recipe, "a100")["rounds"]) == 1 + 6 + 1, "slower: all of them fit"
    with pytest.raises(UsageError, match=r"grow\.max_tokens 5,000,000: one round takes"):
        plan_recipe(load_recipe("inheritune-grow-mini", ["train.time=10 min", "grow.max_tokens=5M"]), "h100")


@pytest.mark.parametrize("time", ["12 parsecs", "100", 100, "1M tokens"])
def test_a_time_must_be_one(settings, time):
    with pytest.raises(UsageError, match=r"train\.time"):
        load_recipe("inheritune-mini", settings | {"train.time": time})


def test_a_run_measures_once_and_a_resumed_one_keeps_its_steps(settings, tmp_path, monkeypatch):
    speeds = iter([0.01])
    monkeypatch.setattr(calibrate, "measure_steps", lambda *_: calibrate.Speed([next(speeds)], [0.0], None))
    settings |= {"train.time": "0.1 s", "schedule.warmup": "0.02 s"}
    checks = iter([False] * 9)

    class Stop(StopRequest):
        @property
        def requested(self):
            return next(checks, True)

        @requested.setter
        def requested(self, value):
            pass

    recipe = load_recipe("inheritune-mini", settings)
    with monkeypatch.context() as stopping:
        stopping.setattr("scionlm.recipes.run.StopRequest", Stop)
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
    config = load_yaml(tmp_path / "run" / "config.yaml")
    assert (config["train"]["steps"], config["schedule"]["warmup"]) == (10, 2)
    with pytest.raises(UsageError, match=r"train\.time \('0\.1 s' -> '0\.2 s'\)"):
        run_recipe(load_recipe("inheritune-mini", settings | {"train.time": "0.2 s"}), tmp_path / "run")
    result = run_recipe(recipe, tmp_path / "run")
    assert result["training"]["steps"] == 10
