"""Sweeps: what a run takes from the top level, and several runs made, stopped and gone on with as one."""

import copy
import json
import os
import shutil
import signal

import pytest
import yaml

from scionlm import api
from scionlm.core.config import dump_yaml, load_yaml
from scionlm.core.errors import DataError, DivergenceError, StoppedError, StorageError, UsageError
from scionlm.core.records import read_json
from scionlm.recipes import child as child_module
from scionlm.recipes import origin as origin_module
from scionlm.recipes import training as training_module
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_sweep import load_request, read_sweep
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.recipes.siblings import is_in_sweep
from scionlm.recipes.sweep import run_sweep
from scionlm.recipes.sweep_plan import plan_sweep
from scionlm.train import step as step_module
from whole_runs import SEQ_LEN, SEQUENCES, column, quicken, timeless, weights_of

STEP = SEQ_LEN * SEQUENCES


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def shared(tiny_folder, data_folder):
    return shared_of(tiny_folder, data_folder)


def shared_of(tiny_folder, data_folder):
    return {
        "recipe": "sweep",
        "source": str(tiny_folder),
        "data": {"dir": str(data_folder.path), "mixture": {"alpha": 0.5, "beta": 0.5}, "seq_len": SEQ_LEN},
        "inherit": {"layers": 3},
        "train": {"steps": 3, "global_batch_tokens": STEP, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "evaluate": {"tokens_per_domain": 48, "every": 2},
    }


def sweep_of(config, *overrides, **more):
    return read_sweep(copy.deepcopy(config | more), "sweep.yaml", overrides)


def recipe_in(config, keys, *overrides):
    """Return the recipe of the only run."""
    return sweep_of(config, *overrides, runs=[{"name": "one"} | keys]).runs[0].recipe


# What a run takes from the top level.


def test_what_a_run_leaves_unset_comes_from_the_top_level(shared):
    recipe = recipe_in(shared, {"optimizer": {"weight_decay": 0.3}, "inherit": {"init": "random"}})
    assert (recipe.recipe, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("inheritune", 3e-3, 0.3)
    assert (recipe.inherit.layers, recipe.inherit.init) == (3, "random")


def test_keys_of_a_run_clear_what_they_exclude(shared):
    tokens = recipe_in(shared, {"train": {"tokens": 5 * STEP}}).train
    assert (tokens.tokens, tokens.steps) == (5 * STEP, None)
    assert recipe_in(shared, {"train": {"time": "1 hour"}}).train.steps is None
    strategic = shared | {"inherit": {"layers": 3, "strategy": "spaced"}}
    kept = recipe_in(strategic, {"inherit": {"keep": "0,2"}}).inherit
    assert (kept.keep, kept.layers, kept.strategy) == ("0,2", None, None)
    assert recipe_in(shared | {"inherit": {"keep": "0,2"}}, {"inherit": {"layers": 4}}).inherit.keep is None
    measured = recipe_in(shared | {"inherit": {"keep": "0,2"}}, {"inherit": {"strategy": "potent_prefix"}}).inherit
    assert (measured.keep, measured.strategy) == (None, "potent_prefix")
    sized = recipe_in(shared | {"inherit": {"width": "half"}}, {"inherit": {"intermediate_size": 8}}).inherit
    assert (sized.width, sized.intermediate_size) == (None, 8)
    assert recipe_in(shared, {"data": {"temperature": 2.0}}).data.mixture is None


def test_sections_are_merged_in_depth_values_taken_whole_and_null_is_null(shared):
    taught = shared | {"distill": {"weight": 0.5, "hidden": {"weight": 2.0}}}
    merged = recipe_in(taught, {"distill": {"temperature": 3.0, "hidden": {"loss": "cosine"}}})
    assert merged.distill is not None
    assert (merged.distill.weight, merged.distill.temperature) == (0.5, 3.0)
    assert merged.distill.hidden is not None
    assert (merged.distill.hidden.weight, merged.distill.hidden.loss) == (2.0, "cosine")
    assert recipe_in(taught, {"distill": None}).distill is None
    assert recipe_in(shared, {"data": {"mixture": {"beta": 1.0}}}).data.mixture == {"beta": 1.0}
    assert recipe_in(shared, {"stages": [{"name": "a", "train": {"steps": 2}}]}).total_steps == 2


def test_another_schedule_keeps_only_what_every_schedule_has(shared):
    top = shared | {"schedule": {"name": "wsd", "decay": 0.2, "warmup": 1}}
    schedule = recipe_in(top, {"schedule": {"name": "cosine"}}).schedule
    assert (schedule.name, schedule.warmup, schedule.decay) == ("cosine", 1, None)
    assert recipe_in(top, {"schedule": {"warmup": 2}}).schedule.decay == 0.2
    with pytest.raises(UsageError, match=r"run 'one'.*decay is for schedule.name wsd"):
        recipe_in(top, {"schedule": {"name": "cosine", "decay": 0.1}})


def test_a_run_that_names_its_recipe_has_nothing_of_what_is_for_others(shared):
    both = shared | {"target": {"num_hidden_layers": 3}, "prune": {"method": "masks", "steps": 2}}
    sheared = recipe_in(both, {"recipe": "shear"})
    assert sheared.inherit is None
    assert (sheared.target.num_hidden_layers, sheared.prune.steps) == (3, 2)
    inherited = recipe_in(both, {"recipe": "inheritune"})
    assert inherited.inherit.layers == 3
    assert (inherited.target, inherited.prune) == (None, None)
    with pytest.raises(UsageError, match="target is for recipe shear"):
        recipe_in(both, {})


def test_overrides_act_on_the_top_level_or_on_one_run(shared):
    runs = [{"name": "a"}, {"name": "b", "train": {"steps": 7}}]
    texts = (f"train.tokens={4 * STEP}", "runs.b.optimizer.lr=1e-3", "runs.b.train.steps=9")
    a, b = (run.recipe for run in sweep_of(shared, *texts, runs=runs).runs)
    assert (a.total_steps, a.train.steps, a.optimizer.lr) == (4, None, 3e-3)
    assert (b.total_steps, b.train.tokens, b.optimizer.lr) == (9, None, 1e-3)
    values = {"train.tokens": 4 * STEP, "runs.b.optimizer.lr": 1e-3, "runs.b.train.steps": 9}
    same = read_sweep(copy.deepcopy(shared | {"runs": runs}), "sweep.yaml", values)
    assert [run.recipe for run in same.runs] == [a, b]


def test_each_run_is_made_once_a_seed_and_descends_from_that_of_its_own_seed(shared):
    runs = [{"name": "a"}, {"name": "b", "source": "run:a"}]
    sweep = sweep_of(shared, runs=runs, seeds=[4, 5])
    assert [(run.folder, run.recipe.seed) for run in sweep.runs] == [
        ("a-seed4", 4), ("b-seed4", 4), ("a-seed5", 5), ("b-seed5", 5),
    ]  # fmt: skip
    parent = sweep.parent_of(sweep.runs[3])
    assert parent is not None
    assert parent.folder == "a-seed5"
    assert [run.folder for run in sweep_of(shared, runs=runs, seeds=[4]).runs] == ["a", "b"]
    assert [run.recipe.seed for run in sweep_of(shared, "seed=3", runs=runs).runs] == [3, 3]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"runs": [{"name": "a", "trian": {}}]}, r"run 'a': unknown key 'trian'; did you mean 'train'"),
        ({"runs": [{"name": "a"}, {"name": "b", "optimizer": {"lr": 0}}]}, r"run 'b': optimizer\.lr"),
        ({"runs": [{"name": "a"}, {"name": "A"}]}, "two runs are called 'A'"),
        ({"runs": [{"train": {}}]}, r"runs\.0: key 'name' is required"),
        ({"runs": [{"name": "../a"}]}, "name"),
        ({"runs": [{"name": "a.b"}]}, "name"),
        ({"runs": []}, "runs"),
        ({"runs": "a"}, "runs"),
        ({"runs": ["a"]}, "runs"),
        ({"runs": [{"name": "a"}], "trian": {}}, "unknown key 'trian'; did you mean 'train'"),
        ({"runs": [{"name": "a"}], "only": ["b"]}, "only names 'b'"),
        ({"runs": [{"name": "a"}], "only": []}, "only"),
        ({"runs": [{"name": "a"}], "seeds": [0, 0]}, "seeds: one of them stands twice"),
        ({"runs": [{"name": "a"}], "seeds": [0, -1]}, "seeds"),
        ({"runs": [{"name": "a"}], "seeds": [0], "seed": 1}, "set either seed"),
        ({"runs": [{"name": "a", "seed": 1}], "seeds": [0]}, "run 'a': it has a seed"),
        ({"runs": [{"name": "a", "source": "run:b"}, {"name": "b"}]}, "run 'a': source 'run:b' is no run before it"),
        ({"runs": [{"name": "first"}, {"name": "b", "source": "run:frist"}]}, "did you mean 'first'"),
        ({"runs": [{"name": "a", "inherit": None}]}, r"run 'a': inherit"),
        ({"runs": [{"name": "a", "recipe": "sweep"}]}, r"run 'a': recipe"),
    ],
)
def test_what_is_wrong_is_named_with_its_run(shared, more, words):
    with pytest.raises(UsageError, match=words):
        sweep_of(shared, **more)
    with pytest.raises(UsageError, match="names no run of it; did you mean 'abc'"):
        sweep_of(shared, "runs.abd.seed=1", runs=[{"name": "abc"}])


def test_a_single_recipe_is_told_from_a_sweep(shared, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(shared | {"runs": [{"name": "a"}]}))
    with pytest.raises(UsageError, match="is a sweep of several runs"):
        load_recipe(str(path))
    assert not isinstance(load_request(str(path), ["train.steps=4"]), Recipe)
    assert isinstance(load_request("inheritune-mini"), Recipe)


# Whole sweeps.

RUNS = [
    {"name": "wide", "inherit": {"layers": 4}},
    {"name": "narrow", "train": {"tokens": 2 * STEP}},
    {"name": "second", "source": "run:wide", "inherit": {"layers": 2}},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, data_folder):
    """A sweep over two seeds, made by `api.run`."""
    root = tmp_path_factory.mktemp("sweep")
    path, out = root / "sweep.yaml", root / "out"
    path.write_text(dump_yaml(shared_of(tiny_folder, data_folder) | {"seeds": [0, 1], "runs": RUNS}))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        return api.run(str(path), out=out), out


FOLDERS = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("wide", "narrow", "second")]


def test_a_sweep_makes_ordinary_runs_and_one_comparison(finished, shared, tmp_path):
    result, out = finished
    assert [(run["name"], run["seed"], run["state"]) for run in result["runs"]] == [
        (name, seed, "done") for seed in (0, 1) for name in ("wide", "narrow", "second")
    ]
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(FOLDERS)
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 2 * (3 + 2 + 3))
    assert read_json(out / "manifest.json")["seeds"] == [0, 1]
    for folder in FOLDERS:
        assert read_json(out / "runs" / folder / "status.json")["state"] == "done"
        assert (out / "runs" / folder / "report.html").exists()
    record = read_json(out / "compare.json")
    assert result == record | {"recipe": "sweep", "runs": result["runs"]}
    assert {row["name"]: row["state"] for row in record["rows"]} == dict.fromkeys(FOLDERS, "done")
    assert sorted((group["name"], group["n"]) for group in record["groups"]) == [
        ("narrow", 2), ("second", 2), ("wide", 2),
    ]  # fmt: skip
    assert (out / "compare.html").read_text().startswith("<!DOCTYPE html>")
    assert "narrow" in (out / "compare.md").read_text()
    alone = sweep_of(shared, "seed=1", runs=RUNS).runs[1].recipe
    run_recipe(alone, tmp_path / "alone")
    assert weights_of(tmp_path / "alone") == weights_of(out / "runs" / "narrow-seed1")
    assert weights_of(tmp_path / "alone") != weights_of(out / "runs" / "narrow-seed0")


def test_a_run_that_names_another_takes_its_result_of_the_same_seed(finished):
    _, out = finished
    for seed in (0, 1):
        parent = out / "runs" / f"wide-seed{seed}"
        child = out / "runs" / f"second-seed{seed}"
        assert yaml.safe_load((child / "config.yaml").read_text())["source"] == str(parent / "model")
        source, ended = read_json(child / "result.json")["source"], read_json(parent / "result.json")
        assert source["num_hidden_layers"] == 4
        for domain, loss in source["domains"].items():
            assert loss["nll"] == pytest.approx(ended["domains"][domain]["nll"], abs=1e-9)


def test_a_source_is_measured_once_by_all_runs_that_would_measure_the_same(shared, tmp_path, monkeypatch, capsys):
    measured = []
    real = child_module.losses_of

    def counted(setting, token_nll, title, *more):
        measured.append((setting.folder.name, title))
        return real(setting, token_nll, title, *more)

    def written(setting, model):
        return [{"domain": name, "prompt": "", "text": f"seed {setting.recipe.seed}"} for name in setting.held_out]

    monkeypatch.setattr(child_module, "losses_of", counted)
    monkeypatch.setattr(child_module, "samples_of", written)  # the tiny model writes nothing at all
    more = {"name": "more", "evaluate": {"tokens_per_domain": 32}}
    sweep = sweep_of(shared, seeds=[0, 1], runs=[{"name": "one"}, more, {"name": "next", "source": "run:one"}])
    run_sweep(sweep, tmp_path / "out")
    runs = tmp_path / "out" / "runs"
    sources = [name for name, title in measured if title not in ("evaluating child", "evaluating control")]
    assert sources == ["one-seed0", "more-seed0", "next-seed0", "next-seed1"]
    assert "source.json: taken from run one-seed0, which has measured the same" in capsys.readouterr().err

    first, second = (read_json(runs / f"one-seed{seed}" / "source.json") for seed in (0, 1))
    run_recipe(sweep_of(shared, "seed=1", runs=[{"name": "one"}]).runs[0].recipe, tmp_path / "alone")
    alone = read_json(tmp_path / "alone" / "source.json")
    assert second["domains"] == first["domains"] == alone["domains"]
    assert second["samples"] == alone["samples"] != first["samples"]
    assert "conditions" not in alone
    results = [read_json(folder / "result.json") for folder in (runs / "one-seed1", tmp_path / "alone")]
    assert results[0]["source"] == results[1]["source"]


@pytest.mark.parametrize(
    "text", ["a: &x 1\nb: *x\n", "- a list\n", "{", "caf\xe9", None], ids=["alias", "list", "broken", "latin", "folder"]
)
def test_a_config_of_somebody_elses_above_a_run_is_none_of_its_business(tiny_folder, data_folder, tmp_path, text):
    path = tmp_path / "config.yaml"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode("latin-1"))
    assert not is_in_sweep(tmp_path / "runs" / "mine")


def test_sources_that_differ_in_their_configuration_alone_are_measured_each(shared, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    (other / "config.json").write_text(json.dumps(config))
    run_sweep(sweep_of(shared, runs=[{"name": "a"}, {"name": "b", "source": str(other)}]), tmp_path / "out")
    a, b = (read_json(tmp_path / "out" / "runs" / name / "source.json")["domains"] for name in "ab")
    assert all(a[name]["nll"] != b[name]["nll"] for name in a)


def test_a_ramp_in_time_gets_its_steps_when_its_run_begins(shared, tmp_path):
    ramp = {"data": {"ramp": {"start": {"beta": 1.0}, "over": "1 s"}}}
    run_sweep(sweep_of(shared, runs=[{"name": "one"} | ramp]), tmp_path / "out")
    over = load_yaml(tmp_path / "out" / "runs" / "one" / "config.yaml")["data"]["ramp"]["over"]
    assert isinstance(over, int)


def test_a_finished_sweep_given_again_changes_nothing(finished, monkeypatch):
    _, out = finished
    monkeypatch.chdir(out.parent)
    (out / "runs" / "narrow-seed1" / "report.html").unlink()
    before = {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file() and path.name != ".lock"}
    api.run("out/config.yaml", out="out")  # by another path
    assert before == {path: path.read_bytes() for path in before}
    assert read_json(out / "status.json")["state"] == "done"
    assert (out / "runs" / "narrow-seed1" / "report.html").exists()


def test_stopped_anywhere_a_sweep_goes_on_to_the_same_bits(finished, shared, tmp_path, monkeypatch):
    _, whole = finished
    out, sweep = tmp_path / "out", sweep_of(shared, runs=RUNS, seeds=[0, 1])
    original, count, stops = step_module.micro_batches, 0, {1, 5, 9}

    def spy(batch, size):
        nonlocal count
        count += 1
        if count in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, size)

    monkeypatch.setattr(step_module, "micro_batches", spy)
    for _ in stops:
        with pytest.raises(StoppedError, match="to go on: "):
            run_sweep(sweep, out)
        status = read_json(out / "status.json")
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
    run_sweep(sweep, out)
    assert count == 2 * (3 + 2 + 3)
    for folder in FOLDERS:
        mine, theirs = out / "runs" / folder, whole / "runs" / folder
        # A child's file names its source, which lies elsewhere.
        assert timeless(read_json(mine / "result.json")["domains"]) == read_json(theirs / "result.json")["domains"]
        assert column(mine, "train/nll_nats") == column(theirs, "train/nll_nats")
        assert weights_of(mine) == weights_of(theirs)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([{"name": "a"}, {"name": "b", "inherit": {"layers": 9}}], "run b: .*5 layers"),
        ([{"name": "a"}, {"name": "b", "data": {"dir": "nowhere"}}], "run b: .*scion prepare"),
        ([{"name": "a"}, {"name": "b", "source": "./nowhere"}], "run b: .*nowhere"),
    ],
)
def test_what_cannot_be_made_shows_before_anything_starts_and_leaves_nothing(shared, tmp_path, runs, words):
    with pytest.raises(UsageError, match=words):
        run_sweep(sweep_of(shared, runs=runs), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_would_run_out_shows_before_anything_starts_too(shared, tmp_path):
    limits = {"max_epochs": 0.5, "exhausted": "stop"}
    proxy = {"data": shared["data"]["dir"], "domains": ["alpha"], "fraction": 0.5}
    for more, words in (
        ({"data": limits, "train": {"steps": 500}}, "run b: domain 'alpha' would be gone through"),
        ({"recipe": "continual", "replay": proxy, "train": {"steps": 500}}, "run b: replay.fraction 0.5 comes to"),
    ):
        with pytest.raises((DataError, UsageError), match=words):
            run_sweep(sweep_of(shared, runs=[{"name": "a"}, {"name": "b"} | more]), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_diverged_run_does_not_end_the_sweep(shared, tmp_path, monkeypatch, capsys):
    original, broken, ended = training_module.Objective.forward, False, []

    def forward(self, *arguments):
        loss, *rest = original(self, *arguments)
        return loss * float("nan") if broken else loss, *rest

    def after(folder):
        nonlocal broken
        ended.append(folder.name)
        broken = folder.name == "good"

    monkeypatch.setattr(training_module.Objective, "forward", forward)
    runs = [{"name": "good"}, {"name": "bad"}, {"name": "of-bad", "source": "run:bad"}, {"name": "last"}]
    sweep, out = sweep_of(shared, "train.steps=2", "train.skip_nonfinite=0", runs=runs), tmp_path / "out"
    result = run_sweep(sweep, out, after_run=after)
    states = {"good": "done", "bad": "diverged", "of-bad": "waiting", "last": "done"}
    assert {run["name"]: run["state"] for run in result["runs"]} == states
    assert ended == ["good", "bad", "last"]
    assert read_json(out / "runs" / "bad" / "status.json")["exit_code"] == 3
    assert read_json(out / "status.json")["state"] == "done"
    assert "of-bad is left out: run bad, its source, diverged" in capsys.readouterr().err
    # Given again it stays so; with another rate it gets another chance, and the run that waited for it is made.
    ended.clear()
    run_sweep(sweep, out, after_run=after)
    assert ended == []
    changed = sweep_of(shared, "train.steps=2", "train.skip_nonfinite=0", "runs.bad.optimizer.lr=1e-3", runs=runs)
    with pytest.raises(UsageError, match=r"run bad: .*optimizer\.lr"):
        run_sweep(changed, out)
    monkeypatch.setattr(training_module.Objective, "forward", original)
    result = run_sweep(changed, out, allow_change=True)
    assert {run["state"] for run in result["runs"]} == {"done"}


def test_a_sweep_of_which_every_run_diverges_has_failed(shared, tmp_path, monkeypatch):
    original = training_module.Objective.forward

    def forward(self, *arguments):
        loss, *rest = original(self, *arguments)
        return loss * float("nan"), *rest

    monkeypatch.setattr(training_module.Objective, "forward", forward)
    sweep = sweep_of(shared, "train.skip_nonfinite=0", runs=[{"name": "a"}])
    for _ in range(2):
        with pytest.raises(DivergenceError, match="all runs"):
            run_sweep(sweep, tmp_path / "out")
        status = read_json(tmp_path / "out" / "status.json")
        assert (status["state"], status["exit_code"]) == ("failed", 3)


def test_any_other_failure_ends_the_sweep_and_stands_in_its_status(shared, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_model", full)
        with pytest.raises(StorageError, match=r"run a: .*the disk is full"):
            run_sweep(sweep_of(shared, runs=[{"name": "a"}, {"name": "b"}]), tmp_path / "out")
    status = read_json(tmp_path / "out" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert not (tmp_path / "out" / "runs" / "b").exists()


def test_only_some_runs_then_more_then_other_settings_then_more_seeds(shared, tmp_path):
    out, runs = tmp_path / "out", [{"name": "a"}, {"name": "b", "source": "run:a"}, {"name": "c"}]
    with pytest.raises(UsageError, match="run b: its source run:a is not there yet; name that run in only too"):
        run_sweep(sweep_of(shared, runs=runs, only=["b"]), out)
    assert not out.exists()
    run_sweep(sweep_of(shared, runs=runs, only=["a"]), out)
    assert [path.name for path in (out / "runs").iterdir()] == ["a"]
    first = weights_of(out / "runs" / "a")
    with pytest.raises(UsageError, match=r"run c: optimizer\.lr \(0\.003 -> 0\.001\).*--allow-change"):
        run_sweep(sweep_of(shared, "runs.c.optimizer.lr=1e-3", runs=runs), out)
    with pytest.raises(UsageError, match=r"run a: .*is finished, with other settings: optimizer\.lr"):
        run_sweep(sweep_of(shared, "runs.a.optimizer.lr=1e-3", runs=runs, only=["b"]), out, allow_change=True)
    with pytest.raises(UsageError, match=r"run c \(seed 0\) is gone"):
        run_sweep(sweep_of(shared, runs=runs[:2]), out)
    changed = sweep_of(shared, "runs.c.optimizer.lr=1e-3", runs=[*runs, {"name": "d"}], only=["b", "c", "d"])
    run_sweep(changed, out, allow_change=True)
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["a", "b", "c", "d"]
    config = yaml.safe_load((out / "runs" / "c" / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 1e-3
    # More seeds than one: what is there counts as that of the first.
    more = sweep_of(shared, "runs.c.optimizer.lr=1e-3", runs=[*runs, {"name": "d"}], only=["a"], seeds=[0, 1])
    result = run_sweep(more, out)
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["a", "a-seed1", "b", "c", "d"]
    assert weights_of(out / "runs" / "a") == first
    assert [run["state"] for run in result["runs"]] == ["done"] * 5 + ["waiting"] * 3


def test_runs_without_data_share_the_demos_prepared_once(shared, tmp_path, monkeypatch, data_folder, capsys):
    prepared = []

    def prepare(tokenizer, folder):
        prepared.append((tokenizer, folder))
        shutil.copytree(data_folder.path, folder, dirs_exist_ok=True)

    monkeypatch.setattr(origin_module, "prepare_demo_data", prepare)
    runs = [{"name": "a"}, {"name": "b", "source": "run:a", "inherit": {"layers": 2}}]
    sweep, out = sweep_of(shared, "data.dir=null", "train.steps=1", runs=runs), tmp_path / "out"
    run_sweep(sweep, out)
    assert prepared == [(shared["source"], out / "data")]
    assert capsys.readouterr().err.count("no data.dir: training on the demo's text") == 1
    for name in ("a", "b"):
        assert yaml.safe_load((out / "runs" / name / "config.yaml").read_text())["data"]["dir"] == str(out / "data")
        assert not (out / "runs" / name / "data").exists()
    run_sweep(sweep, out)
    assert len(prepared) == 1


def test_a_folder_of_another_kind_is_refused_either_way(finished, earlier, shared):
    _, out = finished
    with pytest.raises(UsageError, match="holds a run of recipe inheritune, not a sweep"):
        run_sweep(sweep_of(shared, runs=[{"name": "a"}]), earlier)
    with pytest.raises(UsageError, match="is not a recipe that this Scion reads"):
        run_recipe(sweep_of(shared, runs=[{"name": "a"}]).runs[0].recipe, out)


def test_a_plan_adds_up_its_runs_and_knows_the_shape_of_sources_to_come(shared):
    sweep = sweep_of(shared, runs=RUNS, seeds=[0, 1])
    found = plan_sweep(sweep)
    assert [run["num_tokens"] for run in found["runs"]] == [3 * STEP, 2 * STEP, 3 * STEP] * 2
    for key in ("num_tokens", "flops", "seconds"):
        assert found[key] == sum(run[key] for run in found["runs"])
    assert found["num_parameters"] == max(run["num_parameters"] for run in found["runs"])
    assert found["memory_bytes_per_device"] == max(run["memory_bytes_per_device"] for run in found["runs"])
    assert [run["source"] for run in found["runs"][1:3]] == [shared["source"], "run:wide"]
    too_many = sweep_of(shared, "runs.second.inherit.layers=5", runs=RUNS)
    with pytest.raises(UsageError, match="4 layers"):
        plan_sweep(too_many)
