"""Grids: a run for every combination of values; runs of a sweep that go on with, branch off or replay earlier ones."""

import copy

import pytest
import yaml

from scionlm.core.config import dump_yaml
from scionlm.core.errors import UsageError
from scionlm.core.records import read_json
from scionlm.data.mixing.ledger import read_consumed
from scionlm.recipes import training as training_module
from scionlm.recipes.config_sweep import load_request, read_sweep
from scionlm.recipes.grid import expand
from scionlm.recipes.sweep import run_sweep
from scionlm.recipes.sweep_plan import plan_sweep
from whole_runs import SEQ_LEN, SEQUENCES, quicken

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


def names(grid):
    return [run["name"] for run in expand(grid)]


# What a grid comes to.


def test_the_last_key_moves_fastest():
    runs = expand({"optimizer": {"lr": [1e-3, 2e-3]}, "seed": [1, 2]})
    assert runs == [
        {"name": "lr0p001-seed1", "optimizer": {"lr": 1e-3}, "seed": 1},
        {"name": "lr0p001-seed2", "optimizer": {"lr": 1e-3}, "seed": 2},
        {"name": "lr0p002-seed1", "optimizer": {"lr": 2e-3}, "seed": 1},
        {"name": "lr0p002-seed2", "optimizer": {"lr": 2e-3}, "seed": 2},
    ]


def test_keys_of_one_section_and_of_sections_in_sections_go_together():
    grid = {"distill": {"weight": [0.5], "hidden": {"weight": [1.0, 2.0]}}, "schedule": {"name": ["wsd"], "decay": [3]}}
    assert expand(grid) == [
        {
            "name": f"distill0p5-hidden{number:g}-schedulewsd-decay3",
            "distill": {"weight": 0.5, "hidden": {"weight": number}},
            "schedule": {"name": "wsd", "decay": 3},
        }
        for number in (1.0, 2.0)
    ]


def test_runs_of_a_grid_share_nothing():
    first, second = expand({"optimizer": {"lr": [1e-3, 2e-3], "eps": [1e-6]}})
    first["optimizer"]["lr"] = 7
    assert second["optimizer"] == {"lr": 2e-3, "eps": 1e-6}


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        ({"replay": {"fraction": [0.05]}}, "replay0p05"),
        ({"replay": {"fraction": [0]}}, "replay0"),
        ({"replay": [None]}, "replaynone"),
        ({"schedule": {"warmup": [0.01]}}, "warmup0p01"),
        ({"optimizer": {"lr": [3e-5]}}, "lr3e_05"),
        ({"train": {"global_batch_tokens": [4096]}}, "globalbatchtokens4096"),
        ({"evaluate": {"every": ["10M tokens"]}}, "every10M_tokens"),
        ({"source": ["some/where/smollm2-135m"]}, "sourcesmollm2_135m"),
        ({"data": {"dir": ["data/prose/"]}}, "dataprose"),
        ({"branch": {"run": ["run:trunk"]}}, "branchrun_trunk"),
        ({"control": [True]}, "controlTrue"),
        ({"data": {"mixture": [{"alpha": 1.0}]}}, "mixturealpha_1p0"),
        ({"source": ["a-name-that-is-much-too-long-for-a-folder"]}, "sourceong_for_a_folder"),
    ],
)
def test_a_run_is_called_what_it_is(grid, name, shared):
    assert names(grid) == [name]
    run = {key: value for key, value in expand(grid)[0].items() if key == "name"}
    assert sweep_of(shared | {"runs": [run]}).runs[-1].folder == name, "it is a name of a folder"


def test_values_that_read_alike_and_names_that_are_too_long_are_still_told_apart(shared):
    assert names({"source": ["runs/small/model", "runs/big/model"]}) == ["sourcesmall", "sourcebig"]
    alike = [f"{n}-and-the-very-same-ending" for n in (1, 2, 3)]
    found = names({"source": alike, "seed": [1]})
    assert len(set(found)) == 3
    many = {key: [0.123456, 0.234567] for key in ("lr", "weight_decay", "eps", "momentum", "grad_clip")}
    found = names({"optimizer": many, "schedule": {"min_lr_ratio": [0.1], "warmup": [0.01, 0.02]}})
    assert len(set(found)) == len(found) == 2**6
    assert max(map(len, found)) == 80
    runs = [{"name": name} for name in found]
    assert [run.folder for run in sweep_of(shared | {"runs": runs}).runs] == found


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"optimizer": {"lr": []}}, r"grid\.optimizer\.lr: \[\] is no list of values"),
        ({"optimizer": {"lr": 1e-3}}, r"grid\.optimizer\.lr: 0\.001 is no list of values; write \[0\.001, \.\.\.\]"),
        ({"seed": None}, r"grid\.seed: None is no list"),
        ({"optimizer": {"lr": [1e-3], "eps": "small"}}, r"grid\.optimizer\.eps: 'small' is no list"),
    ],
)
def test_what_is_no_list_of_values_is_refused_by_name(shared, grid, words):
    with pytest.raises(UsageError, match=words):
        sweep_of(shared | {"grid": grid})


# In a sweep.


@pytest.fixture
def shared(earlier, data_folder):
    return shared_of(earlier, data_folder)


def shared_of(earlier, data_folder):
    return {
        "recipe": "sweep",
        "kind": "continual",
        "source": str(earlier / "model"),
        "data": {"dir": str(data_folder.path), "mixture": {"beta": 1.0}, "seq_len": SEQ_LEN},
        "upstream": {"domains": ["alpha"]},
        "train": {"steps": 2, "global_batch_tokens": SEQ_LEN * SEQUENCES, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "evaluate": {"tokens_per_domain": 48, "every": 0},
    }


def sweep_of(config, *overrides):
    return read_sweep(copy.deepcopy(config), "sweep.yaml", overrides)


def of_reference(shared, **reference):
    """Return the sweep with a reference that is trained first, on another domain."""
    first = {"model": MODEL, "data": {"mixture": {"alpha": 1.0}}} | reference
    return {key: value for key, value in shared.items() if key != "source"} | {"reference": first}


def test_runs_that_are_listed_come_before_those_of_the_grid_and_all_are_of_the_kind(shared):
    grid = {"optimizer": {"lr": [1e-3, 2e-3]}, "replay": [None, {"domains": ["alpha"]}]}
    sweep = sweep_of(shared | {"runs": [{"name": "plain"}], "grid": grid})
    assert [run.folder for run in sweep.runs] == [
        "plain", "lr0p001-replaynone", "lr0p001-replaydomains_alpha", "lr0p002-replaynone",
        "lr0p002-replaydomains_alpha",
    ]  # fmt: skip
    assert {run.recipe.recipe for run in sweep.runs} == {"continual"}
    assert [run.recipe.optimizer.lr for run in sweep.runs] == [3e-3, 1e-3, 1e-3, 2e-3, 2e-3]
    assert [run.recipe.replay is not None for run in sweep.runs] == [False, False, True, False, True]
    assert [run.recipe.total_steps for run in sweep.runs] == [2] * 5


def test_the_command_line_changes_a_grid(shared):
    grid = {"optimizer": {"lr": [1e-3, 2e-3]}}
    three = sweep_of(shared | {"grid": grid}, "grid.optimizer.lr=[1e-4, 2e-4, 3e-4]")
    assert [run.recipe.optimizer.lr for run in three.runs] == [1e-4, 2e-4, 3e-4]
    more = sweep_of(shared | {"grid": grid}, "grid.schedule.warmup=[0, 1]", "train.steps=3")
    assert [run.name for run in more.runs] == [f"lr0p00{lr}-warmup{warmup}" for lr in (1, 2) for warmup in (0, 1)]
    assert [run.recipe.total_steps for run in more.runs] == [3] * 4
    fresh = sweep_of(shared, "grid.seed=[4, 5]")
    assert [run.recipe.seed for run in fresh.runs] == [4, 5]
    instead = sweep_of(shared | {"grid": grid}, "grid=null", "runs=[{name: only}]")
    assert [run.name for run in instead.runs] == ["only"]
    again = read_sweep(three.config, "config.yaml")
    assert again.runs == three.runs, "its config.yaml is the same sweep"


def test_a_sweep_in_a_file_may_be_a_grid_alone(shared, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(shared | {"grid": {"replay": {"domains": [["alpha"]], "fraction": [0, 0.25]}}}))
    request = load_request(str(path), ["grid.replay.fraction=[0.5]"])
    assert [run.recipe.replay.fraction for run in request.runs] == [0.5]
    assert [run.recipe.replay.fraction for run in load_request(str(path)).runs] == [0, 0.25]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, r"set runs \(a list\) or grid"),
        ({"grid": {}}, r"set runs \(a list\) or grid"),
        ({"grid": {"optimizer": {}}}, r"grid\.optimizer: {} is no list of values"),
        ({"grid": {"optimizer": {"lr": [1e-3, 0.001]}}}, "two runs are called 'lr0p001'"),
        ({"runs": [{"name": "lr0p001"}], "grid": {"optimizer": {"lr": [1e-3]}}}, "two runs are called 'lr0p001'"),
        ({"grid": {"optimizer": {"lrr": [1e-3]}}}, r"run 'lrr0p001': unknown key 'optimizer\.lrr'; did you mean 'lr'"),
        ({"grid": {"optimizer": {"lr": [2.0]}}}, r"run 'lr2': optimizer\.lr"),
        ({"kind": "continued", "runs": [{"name": "a"}]}, "kind"),
        ({"runs": [{"name": "a", "inherit": {"layers": 1}}]}, "run 'a': recipe continual .* leave inherit out"),
    ],
)
def test_what_is_wrong_with_a_grid_is_named(shared, more, words):
    with pytest.raises(UsageError, match=words):
        sweep_of(shared | more)


def test_a_run_of_another_recipe_has_nothing_of_what_is_for_others(shared):
    """And keys of other recipes at the top level do not come in the way of those that name their own."""
    inherits = {key: value for key, value in shared.items() if key != "kind"} | {"inherit": {"layers": 1}}
    child, onwards = sweep_of(inherits | {"runs": [{"name": "a"}, {"name": "b", "recipe": "continual"}]}).runs
    assert (child.recipe.recipe, child.recipe.inherit.layers) == ("inheritune", 1)
    assert (onwards.recipe.recipe, onwards.recipe.inherit) == ("continual", None)


def test_a_sweep_of_models_from_scratch_shares_all_that_these_have(shared):
    average = {"method": "uniform", "start": 1}
    kept = {key: value for key, value in shared.items() if key != "source"}
    stages = [{"name": "a", "data": {"mixture": {"alpha": 1.0}}}, {"name": "b"}]
    config = kept | {"kind": "scratch", "model": MODEL, "average": average, "stages": stages}
    one, two = (run.recipe for run in sweep_of(config | {"grid": {"seed": [1, 2]}}).runs)
    assert (one.recipe, one.model, one.seed, two.seed) == ("scratch", MODEL, 1, 2)
    assert one.average is not None
    assert [stage.name for stage in one.resolved_stages] == ["a", "b"]


# Runs that need an earlier one.


def test_a_reference_may_have_data_of_its_own(shared):
    sweep = sweep_of(of_reference(shared, train={"tokens": 960}, schedule={"name": "wsd"}) | {"grid": {"seed": [3]}})
    reference, run = sweep.runs
    assert (reference.name, reference.recipe.recipe, reference.recipe.model) == ("reference", "scratch", MODEL)
    assert (reference.recipe.data.mixture, run.recipe.data.mixture) == ({"alpha": 1.0}, {"beta": 1.0})
    assert reference.recipe.data.dir == run.recipe.data.dir
    assert reference.recipe.data.seq_len == SEQ_LEN
    assert (reference.recipe.total_steps, run.recipe.total_steps) == (10, 2)
    assert (reference.recipe.schedule.name, run.recipe.schedule.name) == ("wsd", "cosine")
    assert (run.recipe.source, run.parents) == ("run:reference", {"source": "reference"})


def test_a_model_from_scratch_beside_a_reference_has_its_shape(shared):
    runs = [{"name": "anew", "recipe": "scratch", "train": {"steps": 5}}, {"name": "onwards"}]
    _, anew, onwards = (run.recipe for run in sweep_of(of_reference(shared) | {"runs": runs}).runs)
    assert (anew.recipe, anew.model, anew.source, anew.total_steps) == ("scratch", MODEL, None, 5)
    assert anew.data.mixture == {"beta": 1.0}, "on what is new"
    assert anew.upstream is not None
    assert anew.upstream.domains == ["alpha"], "measured on what is old"
    assert onwards.model is None
    other = MODEL | {"num_hidden_layers": 1}
    runs = [{"name": "smaller", "recipe": "scratch", "model": other}]
    assert sweep_of(of_reference(shared) | {"runs": runs}).runs[1].recipe.model == other


def test_runs_name_what_they_branch_off_and_replay(shared):
    config = of_reference(shared) | {
        "replay": {"run": "run:reference", "fraction": 0.25},
        "runs": [{"name": "trunk"}, {"name": "end", "source": None, "branch": {"run": "run:trunk"}, "replay": None}],
    }
    _, trunk, end = sweep_of(config).runs
    assert trunk.parents == {"source": "reference", "replay.run": "reference"}
    assert end.parents == {"source": "trunk", "branch.run": "trunk"}
    assert end.parent == "trunk"


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([{"name": "a", "replay": {"run": "run:b"}}, {"name": "b"}], r"run 'a': replay\.run 'run:b' is no run before"),
        ([{"name": "a", "branch": {"run": "run:a"}}], r"run 'a': branch\.run 'run:a' is no run before it"),
        ([{"name": "first"}, {"name": "b", "replay": {"run": "run:fist"}}], "did you mean 'first'"),
        ([{"name": "a", "replay": {"run": "run:reference"}}], r"replay\.run 'run:reference' is no run before it"),
    ],
)
def test_a_run_that_needs_a_later_one_is_refused(shared, runs, words):
    with pytest.raises(UsageError, match=words):
        sweep_of(shared | {"runs": runs})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, earlier, data_folder):
    """A sweep over two seeds: a reference, models that go on with it, and one that branches off."""
    out = tmp_path_factory.mktemp("grid") / "out"
    shared = of_reference(shared_of(earlier, data_folder)) | {"upstream": None}
    config = shared | {
        "replay": {"run": "run:reference"},
        "optimizer_state": "keep",
        "runs": [
            {"name": "trunk"},
            {"name": "end", "branch": {"run": "run:trunk"}, "replay": {"run": "run:trunk", "fraction": 0.25}},
        ],
        "grid": {"replay": {"fraction": [0, 0.25]}},
        "seeds": [0, 1],
    }
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        result = run_sweep(sweep_of(config), out)
    return out, result, config


def test_a_sweep_carries_out_what_its_runs_need_of_each_other(finished):
    out, result, _ = finished
    assert {run["state"] for run in result["runs"]} == {"done"}
    names = ["trunk", "end", "replay0", "replay0p25"]
    assert [run["name"] for run in result["runs"]] == ["reference", *names, *names]
    for seed in (0, 1):

        def config_of(name, seed=seed):
            return yaml.safe_load((out / "runs" / f"{name}-seed{seed}" / "config.yaml").read_text())

        reference, trunk = out / "runs" / "reference", out / "runs" / f"trunk-seed{seed}"
        assert config_of("replay0p25")["source"] == str(reference / "model")
        assert config_of("replay0p25")["replay"]["run"] == str(reference)
        end = config_of("end")
        assert (end["branch"]["run"], end["replay"]["run"]) == (str(trunk), str(trunk))
        consumed = read_consumed(out / "runs" / f"end-seed{seed}")
        assert sum(consumed.counts.values()) == 6, "two of eight are replayed"
        assert read_json(out / "runs" / f"end-seed{seed}" / "manifest.json")["branch"]["step"] == 2


def test_every_share_of_a_grid_measures_the_same_upstream(finished):
    out, _, _ = finished
    for name in ("replay0", "replay0p25"):
        record = read_json(out / "runs" / f"{name}-seed0" / "result.json")["forgetting"]
        assert record["upstream"]["domains"] == ["alpha"]
        assert record["downstream"]["domains"] == ["beta"]


def test_a_finished_sweep_of_a_grid_given_again_changes_nothing(finished):
    out, _, config = finished
    before = {path: path.read_bytes() for path in (out / "runs").rglob("*.json*")}
    run_sweep(sweep_of(config), out)
    assert before == {path: path.read_bytes() for path in before}


def test_a_run_with_a_model_as_its_source_may_replay_a_run_that_is_yet_to_be_made(shared, tmp_path):
    runs = [{"name": "first"}, {"name": "second", "replay": {"run": "run:first", "fraction": 0.25}}]
    sweep = sweep_of(shared | {"upstream": None, "runs": runs})
    result = run_sweep(sweep, tmp_path / "out")
    assert [run["state"] for run in result["runs"]] == ["done", "done"]
    assert read_json(tmp_path / "out" / "runs" / "second" / "result.json")["upstream"] == ["beta"]
    assert plan_sweep(sweep)["runs"][1]["source"] == shared["source"]


@pytest.mark.parametrize("second", [{"replay": {"run": "run:first"}}, {"branch": {"run": "run:first"}}])
def test_what_a_run_needs_must_be_there_or_be_made_now(shared, tmp_path, second):
    runs = [{"name": "first"}, {"name": "second"} | second]
    with pytest.raises(UsageError, match=r"run second: .*run:first is not there yet; name that run in only too"):
        run_sweep(sweep_of(shared | {"runs": runs, "only": ["second"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_replays_one_that_diverged_is_left_out(shared, tmp_path, monkeypatch, capsys):
    forward = training_module.Objective.forward
    broken = True

    def after(folder):
        nonlocal broken
        broken = False

    def diverging(self, *arguments):
        loss, *rest = forward(self, *arguments)
        return loss * float("nan") if broken else loss, *rest

    monkeypatch.setattr(training_module.Objective, "forward", diverging)
    runs = [{"name": "bad"}, {"name": "of-bad", "replay": {"run": "run:bad"}}, {"name": "good"}]
    sweep = sweep_of(shared | {"runs": runs}, "train.skip_nonfinite=0")
    result = run_sweep(sweep, tmp_path / "out", after_run=after)
    assert {run["name"]: run["state"] for run in result["runs"]} == {
        "bad": "diverged", "of-bad": "waiting", "good": "done",
    }  # fmt: skip
    assert "of-bad is left out: run bad, its replay.run, diverged" in capsys.readouterr().err


def test_an_override_of_a_run_where_none_is_listed_is_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("recipe: sweep\nkind: inheritune\nsource: s\ngrid: {optimizer.lr: [1.0e-3, 1.0e-4]}\n")
    with pytest.raises(UsageError, match=r"override runs\.lr0p001\.\.\. names a run, but the sweep lists none"):
        load_request(str(path), ["runs.lr0p001.train.tokens=1M"])
