"""A run that is stopped and gone on with is the run never stopped, to the bit, whatever it trains with."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from factories import model_folder
from scionlm.cli import main as cli
from scionlm.core.config import dump_yaml
from scionlm.core.errors import DivergenceError, StoppedError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.data.mixing.plan import REPLAYED, SamplePlan
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes import inheritune as inheritune_module
from scionlm.recipes import reweighting as reweighting_module
from scionlm.recipes import setting as setting_module
from scionlm.recipes import training as training_module
from scionlm.recipes.reweighting import Reweighter
from scionlm.recipes.run import run_recipe
from scionlm.train import learner as learner_module
from scionlm.train.average import Average
from scionlm.train.checkpoint import CheckpointStore, find_damage
from scionlm.train.guard import Guard
from scionlm.train.learner import Position
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer
from whole_runs import (
    SEQ_LEN,
    Watch,
    column,
    differing,
    last_state,
    metrics_of,
    outcome,
    quicken,
    recipe_of,
    run_stopped,
    weights_of,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("dropout") / "gpt2", model_type="gpt2")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, tiny_folder, data_folder):
    """A finished run, to be replayed and branched off."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    schedule = {"name": "constant", "warmup": 2}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        run_recipe(recipe_of(tiny_folder, data_folder.path, schedule=schedule, checkpoint__every=3), out)
    return out


def stages_with(state: str, **second) -> list[dict]:
    """Return three stages: other mixtures, rates and batches."""
    return [
        {"name": "a", "train": {"steps": 4}},
        {
            "name": "b", "train": {"steps": 3, "global_batch_tokens": SEQ_LEN * 5, "micro_batch_size": 2},
            "data": {"mixture": {"alpha": 0.2, "beta": 0.8}}, "optimizer": {"lr": 1e-3}, "optimizer_state": state,
            "schedule": {"name": "linear", "warmup": 1},
        } | second,
        {"name": "c", "train": {"steps": 3}, "schedule": {"name": "constant", "warmup": 0}, "optimizer_state": state},
    ]  # fmt: skip


MOVING = {
    "rule": "paper", "every": 2, "tokens_per_domain": 40, "step_size": 40.0, "reference": {"alpha": 4.0, "beta": 4.1},
}  # fmt: skip
SCHEDULES = {
    "constant": {"warmup": 3, "start_lr_ratio": 0.5},
    "linear": {"min_lr_ratio": 0.0},
    "cosine": {"warmup": 0.25},
    "one_minus_sqrt": {},
    "exponential": {"half_life": 3},
    "inverse_sqrt": {"warmup": 2},
    "wsd": {"warmup": 1, "decay": 3},
    "infinite": {"warmup": 1, "cooldown": 3, "decay": 2, "cooldown_shape": "inverse_sqrt"},
    "neox_cosine": {"warmup": 2},
}
FEATURES = {
    "plain": {},
    "ramp": {"data.mixture": {"alpha": 0.8, "beta": 0.2}, "data.ramp": {"start": {"beta": 1.0}, "over": 6}},
    "temperature": {"data.mixture": None, "data.temperature": 3.0},
    "reweight": {"reweight": MOVING},
    "reweight by the best": {"reweight": MOVING | {"rule": "bounded", "reference": "best", "every": 3}},
    "reweight by the source": {"reweight": MOVING | {"rule": "doremi", "reference": "source"}},
    "exhausted": {"data.max_epochs": {"alpha": 0.035}, "data.exhausted": "redistribute"},
    "replay": {"replay": {"run": "EARLIER", "fraction": 0.3}},
    "replay from an offset": {"replay": {"run": "EARLIER", "fraction": 0.3, "order": "offset", "offset": 0.8}},
    "replay reshuffled, twice": {"replay": {"run": "EARLIER", "fraction": 0.7, "order": "reshuffled", "repeat": True},
                                 "train.steps": 14},
    "replay and reweight": {"replay": {"run": "EARLIER", "fraction": 0.3}, "reweight": MOVING},
    "proxy": {"replay": {"data": "DATA", "fraction": 0.3, "order": "reshuffled"}},
    "odd micro-batches": {"train.micro_batch_size": 3, "train.global_batch_tokens": SEQ_LEN * 7},
    "document mask": {"data.document_mask": True},
    "document mask and best fit": {"data.document_mask": True, "data.packing": "best_fit", "data.seq_len": 48,
                                   "train.global_batch_tokens": 48 * 4},
    "muon": {"optimizer.name": "muon"},
    "muon and ema": {"optimizer.name": "muon", "average": {"decay": 0.9}},
    "ema": {"average": {"method": "ema", "decay": 0.8, "start": 2}},
    "ema of every second": {"average": {"method": "ema", "decay": 0.8, "every": 2}},
    "uniform": {"average": {"method": "uniform", "start": 0.3, "every": 2}},
    "scales": {"optimizer.lr_scales": {"0": 0.5, "embedding": 0.0}, "optimizer.decay": "all", "optimizer.grad_clip": 0.0},
    "bf16": {"train.precision": "bf16"},
    "bf16, muon, accumulation": {"train.precision": "bf16", "optimizer.name": "muon", "train.micro_batch_size": 3},
    "dropout": {"source": "GPT2", "inherit.layers": 3},
    "dropout and accumulation": {"source": "GPT2", "inherit.layers": 3, "train.micro_batch_size": 3},
    "dropout, ema, reweight": {"source": "GPT2", "inherit.layers": 3, "average": {"decay": 0.5}, "reweight": MOVING},
    "random": {"inherit.init": "random"},
    "control": {"control": True},
    "control of moving weights": {"control": True, "reweight": MOVING},
    "stages": {"stages": stages_with("keep")},
    "stages that reset": {"stages": stages_with("reset")},
    "stages that keep the moments": {"stages": stages_with("moments")},
    "stages of muon": {"stages": stages_with("moments"), "optimizer.name": "muon"},
    "stages from muon to adamw": {"stages": stages_with("reset", optimizer={"name": "muon", "lr": 1e-3})},
    "stages with an average": {"stages": stages_with("keep"), "average": {"method": "uniform", "start": 3}},
    "stages that replay": {"stages": stages_with("keep", replay={"stage": "a", "fraction": 0.4})},
    "stages that replay by the top level": {"stages": stages_with("keep"), "replay": {"run": "EARLIER", "fraction": 0.2}},
    "stages that reweight": {"stages": stages_with("keep", reweight=MOVING)},
    "stages that all reweight": {"stages": stages_with("reset"), "reweight": MOVING},
    "stages of other lengths": {"stages": stages_with("keep", data={"seq_len": 12}, train={"steps": 3})},
    "stages with dropout": {"stages": stages_with("moments"), "source": "GPT2", "inherit.layers": 3},
    "stages with a control": {"stages": stages_with("keep", reweight=MOVING), "control": True},
    "branch": {"branch": {"run": "EARLIER"}, "schedule": {"name": "linear", "warmup": 0}},
    "branch with the moments": {"branch": {"run": "EARLIER", "step": 6}, "optimizer_state": "moments"},
    "branch of stages": {"branch": {"run": "EARLIER", "step": 3}, "stages": stages_with("keep")},
} | {f"schedule {name}": {"schedule": {"name": name} | keys} for name, keys in SCHEDULES.items()}  # fmt: skip


@pytest.fixture
def make(tiny_folder, data_folder, with_dropout, earlier):
    """Return a recipe by the name of its feature, or by its settings."""

    def filled(value):
        words = {"EARLIER": earlier, "DATA": data_folder.path, "GPT2": with_dropout}
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return str(words.get(value, value)) if isinstance(value, str) else value

    def make(feature: str = "plain", **changes):
        settings = {key.replace(".", "__"): filled(value) for key, value in FEATURES[feature].items()}
        return recipe_of(tiny_folder, data_folder.path, **settings | changes)

    return make


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Run a recipe, stopped at some steps; return its folder and what was watched."""

    def go(recipe, name, stop_at=()):
        with monkeypatch.context() as patch:
            watch = Watch(patch, stop_at)
            assert run_stopped(recipe, tmp_path / name, watch) == len(watch.stop_at)
        return tmp_path / name, watch

    return go


def same(whole, parts, recipe) -> None:
    (mine, watch), (theirs, stopped) = whole, parts
    assert differing(outcome(mine, recipe), outcome(theirs, recipe)) == set()
    assert watch.samples == stopped.samples
    assert watch.rows() == stopped.rows()


@pytest.mark.parametrize("feature", FEATURES)
def test_stopped_twice_and_gone_on_with_is_never_stopped(make, go, feature):
    recipe = make(feature)
    whole = go(recipe, "whole")
    steps = len(whole[1].batches)
    assert steps == recipe.total_steps * (2 if recipe.control else 1)
    stop_at = random.Random(zlib.crc32(feature.encode())).sample(range(1, steps), 2)
    same(whole, go(recipe, "parts", stop_at), recipe)


def test_the_features_do_what_they_are_called(make, go):
    """Not that two runs agree because nothing of it happened."""
    found = {}
    for feature in ("plain", "ramp", "reweight", "exhausted", "muon", "ema", "uniform", "dropout", "bf16", "branch"):
        found[feature] = go(make(feature), feature.replace(" ", "-"))
    assert len({weights_of(out) for out, _ in found.values()}) == len(found)
    count = {
        name: sum(s.domain == "alpha" for step in watch.samples for s in step) for name, (_, watch) in found.items()
    }
    assert count["plain"] == 16
    assert count["exhausted"] == 10
    assert count["ramp"] < 16
    assert count["reweight"] != 16
    for name in ("replay", "proxy", "stages that replay"):
        out, watch = go(make(name), f"again-{name}".replace(" ", "-"))
        replayed = [s for step in watch.samples for s in step if s.domain.startswith(REPLAYED)]
        assert len(replayed) >= 6, name
    out, _ = go(make("replay reshuffled, twice"), "twice")
    assert read_json(out / "result.json")["training"]["epochs"]["replay"] > 1


@pytest.mark.parametrize("step", range(1, 10))
def test_stopped_at_any_step_of_stages(make, go, step):
    recipe = make("stages that replay", average={"decay": 0.7}, optimizer__name="muon")
    same(go(recipe, "whole"), go(recipe, "parts", [step]), recipe)


def test_stopped_at_every_step(make, go):
    recipe = make("stages that reweight", control=True)
    steps = 2 * recipe.total_steps
    same(go(recipe, "whole"), go(recipe, "parts", range(1, steps + 1)), recipe)


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6])
def test_stopped_inside_an_evaluation(make, go, tmp_path, monkeypatch, number):
    """The source's, the first, one on the way, one between stages, and the last."""
    recipe = make("stages", evaluate__every=2)
    whole = go(recipe, "whole")
    calls, losses_of = iter(range(1, 100)), setting_module.losses_of

    def stopped(*arguments, **keywords):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses_of(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "losses_of", stopped)
        patch.setattr(inheritune_module, "losses_of", stopped)
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
    run_recipe(recipe, tmp_path / "parts")
    assert differing(outcome(whole[0], recipe), outcome(tmp_path / "parts", recipe)) == set()


class Killed(BaseException):
    """The process is gone: nothing is saved any more."""


def test_stopped_inside_a_reweighting_and_then_killed(make, go, tmp_path, monkeypatch):
    recipe = make("reweight")
    whole = go(recipe, "whole")
    losses_of, update = reweighting_module.losses_of, Reweighter.update

    def stopped(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses_of(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(reweighting_module, "losses_of", stopped)
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")

    def killed(self, *arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SamplePlan, "take", killed)
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path / "parts")
    assert Reweighter.update is update
    run_recipe(recipe, tmp_path / "parts")
    assert differing(outcome(whole[0], recipe), outcome(tmp_path / "parts", recipe)) == set()


# What would show.


def forgetful(name):
    """Return where a resume forgets something: (object, attribute, replacement)."""
    going_on = training_module.Sampling.going_on

    def without_cursors(self, state):
        for key in vars(self):
            if key != "cursors":
                setattr(self, key, state.get(key, getattr(self, key)))

    assert going_on
    return {
        "optimizer": (Optimizer, "load", lambda self, tensors, carry="keep": None),
        "average": (Average, "load", lambda self, tensors, count: None),
        "average's count": (Average, "load", lambda self, tensors, count: [
            mean.copy_(tensors[name]) for name, mean in self._mean.items()
        ]),
        "guard": (Guard, "restore", lambda self, state: None),
        "cursors": (Position, "restore", without_cursors),
        "random state": (learner_module, "restore_random_state", lambda states: None),
        "plan": (SamplePlan, "restore", lambda self, state: None),
        "position": (Position, "restore", lambda self, state: None),
        "replay": (LedgerReplay, "restore", lambda self, state, draws: None),
        "reweighting": (Reweighter, "restore", lambda self, state: None),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "feature", "stop_at", "shows"),
    [
        ("optimizer", "plain", 3, "weights"),
        ("optimizer", "muon", 3, "weights"),
        ("optimizer", "stages", 6, "weights"),
        ("average", "ema", 5, "weights"),
        ("average", "uniform", 6, "weights"),
        ("average's count", "uniform", 6, "weights"),
        ("cursors", "stages", 6, "weights"),
        ("random state", "dropout", 3, "weights"),
        ("plan", "plain", 3, "weights"),
        ("position", "plain", 3, "metrics"),
        ("replay", "replay", 5, "weights"),
        ("reweighting", "reweight", 5, "metrics"),
    ],
)
def test_what_a_resume_forgets_shows(make, go, tmp_path, monkeypatch, lost, feature, stop_at, shows):
    """Negative controls of the tests above."""
    recipe = make(feature)
    whole, _ = go(recipe, "whole")
    with monkeypatch.context() as patch:
        Watch(patch, [stop_at])
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
        patch.setattr(*forgetful(lost))
        run_recipe(recipe, tmp_path / "parts")
    mine, theirs = (outcome_or_less(out, recipe) for out in (whole, tmp_path / "parts"))
    assert mine[shows] != theirs[shows]


def outcome_or_less(out, recipe):
    return {"weights": weights_of(out), "metrics": metrics_of(out)}


# Updates that are not finite.


def poison(patch, watch, steps, what="loss") -> None:
    """Make the loss, a gradient or (from then on) a weight not finite at some steps, counted over all runs."""
    token_nll, done = Objective.token_nll, set()

    def poisoned(self, *arguments):
        nll = token_nll(self, *arguments)
        step = len(watch.batches)
        if not torch.is_grad_enabled() or step not in steps:
            return nll
        if what == "weight" and step not in done:
            done.add(step)
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = float("nan")
            return token_nll(self, *arguments)
        if what == "gradient":
            nll.register_hook(lambda gradient: gradient * float("inf"))
            return nll
        return nll * float("nan")

    patch.setattr(Objective, "token_nll", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stop_at", [[3], [4], [5], [3, 4, 5]])
def test_updates_that_were_left_out_are_left_out_again(make, tmp_path, monkeypatch, capsys, what, stop_at):
    recipe = make("ema")
    results = {}
    for name, stops in (("whole", ()), ("parts", stop_at)):
        with monkeypatch.context() as patch:
            watch = Watch(patch, stops)
            poison(patch, watch, {3, 4, 7}, what)
            assert run_stopped(recipe, tmp_path / name, watch) == len(stops)
        results[name] = outcome(tmp_path / name, recipe)
    assert differing(*results.values()) == set()
    assert results["whole"]["result"]["training"]["skipped_updates"] == 3
    assert column(tmp_path / "parts", "train/skipped_updates") == [1, 2, 3]
    assert len(watch.batches) == 8, "they count as steps, and their samples as seen"
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 6
    assert all("samples alpha:" in line or "samples beta:" in line for line in said)


def test_a_skipped_update_moves_nothing(make, tmp_path, monkeypatch):
    """All updates but the first are left out: weights, moments and average are those of a run of one step."""
    average = {
        "average": {"method": "uniform"},
        "train__skip_nonfinite": 9,
        "schedule": {"name": "constant", "warmup": 0},
    }
    one, many = make(train__steps=1, **average), make(**average)
    run_recipe(one, tmp_path / "one")
    with monkeypatch.context() as patch:
        poison(patch, Watch(patch), set(range(2, 9)))
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        poison(patch, watch, set(range(2, 9)))
        run_recipe(many, tmp_path / "many")
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "many")
    assert last_state(tmp_path / "one")[1] == last_state(tmp_path / "many")[1]


@pytest.mark.parametrize("forget", [False, True])
def test_updates_left_out_in_a_row_are_counted_over_a_stop(make, tmp_path, monkeypatch, forget):
    recipe = make(train__skip_nonfinite=2)
    with monkeypatch.context() as patch:
        watch = Watch(patch, [4])
        poison(patch, watch, {3, 4, 5})
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
        if forget:  # negative control
            patch.setattr(*forgetful("guard"))
            run_recipe(recipe, tmp_path / "run")
            return
        with pytest.raises(DivergenceError, match="step 5 .*3th update in a row"):
            run_recipe(recipe, tmp_path / "run")


@pytest.mark.parametrize(("what", "skip"), [("loss", 0), ("gradient", 0), ("weight", 0), ("weight", 2)])
def test_a_run_that_goes_bad_names_step_and_samples_and_keeps_its_checkpoints(
    make, go, tmp_path, monkeypatch, capsys, what, skip
):
    recipe = make(checkpoint__every=2, train__skip_nonfinite=skip)
    whole, _ = go(recipe, "whole")
    out = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.model_dump(mode="json")))
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        poison(patch, watch, set(range(5, 9)), what)
        capsys.readouterr()
        assert cli.run(["run", str(tmp_path / "recipe.yaml"), "-o", str(out)]) == 3
    bad = 5 + skip
    message = read_json(out / "status.json")
    assert (message["state"], message["exit_code"]) == ("failed", 3)
    sample = watch.samples[bad - 1][0]
    assert f"not finite at step {bad} (samples {sample.domain}:{sample.draw}, " in message["message"]
    assert "lower optimizer.lr" in message["message"]
    assert f"error: {message['message'][:60]}" in capsys.readouterr().err
    newest = CheckpointStore(out / "checkpoints", 1).newest()
    assert newest is not None
    assert all(torch.isfinite(tensor).all() for tensor in newest.tensors("optimizer").values())
    if what == "weight" and skip:
        return  # the damage was saved: there is no way back by going on
    assert newest.state["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in newest.tensors("weights").values())
    run_recipe(recipe, out)  # what was wrong is gone
    assert differing(outcome(whole, recipe), outcome(out, recipe)) == set()


# Evaluation takes nothing from training.


def test_evaluations_take_no_random_number_and_no_sample(make, go, monkeypatch):
    often, never = make("dropout", evaluate__every=1), make("dropout", evaluate__every=0)
    (first, one), (second, other) = go(often, "often"), go(never, "never")
    evaluated = [[line["step"] for line in metrics_of(out) if "eval/alpha/nll_nats" in line] for out in (first, second)]
    assert evaluated == [list(range(9)), [0, 8]]
    assert weights_of(first) == weights_of(second)
    assert one.rows() == other.rows()
    assert last_state(first)[0]["random"] == last_state(second)[0]["random"]
    assert column(first, "train/nll_nats") == column(second, "train/nll_nats")
    losses_of = training_module.losses_of

    def greedy(*arguments, **keywords):
        torch.rand(1)
        return losses_of(*arguments, **keywords)

    monkeypatch.setattr(training_module, "losses_of", greedy)  # negative control
    third, _ = go(often, "greedy")
    assert weights_of(third) != weights_of(first)


def test_measurements_of_moving_weights_take_nothing_either(make, go, monkeypatch):
    still = MOVING | {"every": 1, "step_size": 1e-12, "rule": "paper"}
    recipe, quiet = make("dropout", reweight=still), make("dropout", reweight=still | {"every": 4})
    (first, _), (second, _) = go(recipe, "often"), go(quiet, "seldom")
    assert weights_of(first) == weights_of(second)


# Other processes.


def environment(**changes) -> dict:
    return {**os.environ, "PYTHONHASHSEED": "0", **changes}


@pytest.fixture
def asked(make, tmp_path):
    """Return a recipe in a file, and the words to run it by."""

    def asked(feature="stages that reweight", **changes):
        recipe = make(feature, **changes)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(dump_yaml(recipe.model_dump(mode="json", exclude_unset=True)))
        return recipe, ["run", str(path), "-o"]

    return asked


def test_hash_seed_folder_time_zone_and_language_change_nothing(asked, tmp_path):
    recipe, words = asked()
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    children = []
    for number, (folder, changes) in enumerate(
        [
            (tmp_path, {"PYTHONHASHSEED": "1"}),
            (
                elsewhere,
                {"PYTHONHASHSEED": "77", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"},
            ),
        ]
    ):
        command = [sys.executable, "-m", "scionlm", *words, str(tmp_path / f"out{number}")]
        pipe = subprocess.PIPE
        children.append(subprocess.Popen(command, cwd=folder, env=environment(**changes), stdout=pipe, stderr=pipe))
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said.decode()
    run_recipe(recipe, tmp_path / "here")
    results = [outcome(tmp_path / name, recipe) for name in ("out0", "out1", "here")]
    for result in results:
        del result["result"]["samples"]  # the texts that are written only there
    assert differing(results[0], results[1]) == set()
    assert differing(results[0], results[2]) == set()


# A process whose steps take long, and that says when it is in one.
SLOW = """
import sys, time
from scionlm.cli import main
from scionlm.train import step
original, steps, slow = step.micro_batches, 0, {slow}
def micro_batches(batch, size):
    global steps
    steps += 1
    if steps == slow:
        print("in step", steps, flush=True)
        until = time.monotonic() + {seconds}
        while time.monotonic() < until:
            time.sleep(0.01)
    return original(batch, size)
step.micro_batches = micro_batches
sys.exit(main.run(sys.argv[1:]))
"""


class Child:
    """A process in the middle of a step."""

    def __init__(self, words, slow, seconds):
        code = SLOW.format(slow=slow, seconds=seconds)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        out = self.process.stdout
        assert select.select([out], [], [], 120)[0]
        assert out.readline().decode() == f"in step {slow}\n", self.process.communicate()[1].decode()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=60)[1].decode()
        return self.process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_the_step_that_it_comes_in(asked, go, tmp_path, number):
    recipe, words = asked("plain")
    out = tmp_path / "run"
    with Child([*words, str(out)], slow=3, seconds=0.3) as child:
        child.process.send_signal(number)
        code, said = child.end()
    assert code == 75
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 3)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    assert f"to go on: scion {' '.join(words)} {out}" in said
    assert "Traceback" not in said
    whole, _ = go(recipe, "whole")
    run_recipe(recipe, out)
    assert differing(outcome(whole, recipe), outcome(out, recipe)) == set()


def test_a_second_interrupt_ends_a_run_at_once_and_harms_nothing(asked, go, tmp_path):
    recipe, words = asked("plain", checkpoint__every=2)
    out = tmp_path / "run"
    with Child([*words, str(out)], slow=6, seconds=300) as child:
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.process.poll() is None, "the first one waits for the step"
        child.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code, _ = child.end()
        assert time.monotonic() - began < 5
    assert code == 130
    newest = CheckpointStore(out / "checkpoints", 1).all()[-1]
    assert (newest.name, find_damage(newest)) == ("step-00000004", [])
    whole, _ = go(recipe, "whole")
    run_recipe(recipe, out)
    assert differing(outcome(whole, recipe), outcome(out, recipe)) == set()


def test_a_run_folder_is_one_processs_alone_until_that_is_gone(asked, go, tmp_path, capsys):
    recipe, words = asked("plain", checkpoint__every=2)
    out = tmp_path / "run"
    with Child([*words, str(out)], slow=4, seconds=300) as child:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(UsageError, match="in use by another"):
            run_recipe(recipe, out)
        capsys.readouterr()
        assert cli.run([*words, str(out)]) == 2
        assert "in use by another scion process" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        child.process.kill()
        assert child.end()[0] == -signal.SIGKILL
    assert (out / ".lock").exists(), "what the dead process left is no obstacle"
    whole, _ = go(recipe, "whole")
    run_recipe(recipe, out)
    assert differing(outcome(whole, recipe), outcome(out, recipe)) == set()


def test_the_command_line_itself_stops_within_a_step(make, tmp_path):
    """With nothing of ours inside it."""
    steps = 4000
    recipe = make(train__steps=steps, train__global_batch_tokens=SEQ_LEN * 64, train__micro_batch_size=64)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.model_dump(mode="json", exclude_unset=True)))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "scionlm", "run", "recipe.yaml", "-o", "run"]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)

    def trained() -> list[dict]:
        path = out / "metrics.jsonl"
        return [line for line in read_jsonl(path) if "train/nll_nats" in line] if path.exists() else []

    try:
        until = time.monotonic() + 120
        while len(trained()) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        lines = trained()
        child.send_signal(signal.SIGTERM)
        began = time.monotonic()
        said = child.communicate(timeout=60)[1].decode()
        seconds = time.monotonic() - began
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 75, said
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert "to go on: scion run recipe.yaml -o run" in status["message"]
    assert status["message"] in said
    step = max(line["time/elapsed_s"] for line in lines) / len(lines)
    assert status["step"] - lines[-1]["step"] <= 2 + 0.1 / step
    assert seconds < 10
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{status['step']:08d}"]
    assert (
        json.loads((out / "checkpoints" / f"step-{status['step']:08d}" / "state.json").read_text())["step"]
        == status["step"]
    )


def test_a_relative_path_of_the_run_is_no_part_of_it(make, go, tmp_path, monkeypatch):
    recipe = make("stages that replay")
    whole, _ = go(recipe, "whole")
    monkeypatch.chdir(tmp_path)
    run_recipe(recipe, Path("relative"))
    assert weights_of(Path("relative")) == weights_of(whole)
