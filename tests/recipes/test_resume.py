"""A run that is stopped and gone on with is the run never stopped, to the bit, whatever it trains with."""

import contextlib
import os
import random
import select
import shlex
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch

from features import FEATURES, MOVING, stages_with
from scionlm.cli import main as cli
from scionlm.core.config import dump_yaml
from scionlm.core.errors import DivergenceError, ScionError, StoppedError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.data.mixing.plan import REPLAYED, SamplePlan
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes import child as child_module
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
    run_stopped,
    weights_of,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return where runs that were never stopped are kept, and those that there are."""
    return tmp_path_factory.mktemp("wholes"), {}


@pytest.fixture
def whole(kept, go):
    """Run a recipe without a stop, or return the run of before; its folder and what was watched."""
    root, runs = kept

    def whole(recipe):
        key = dump_yaml(recipe.model_dump(mode="json"))
        if key not in runs:
            runs[key] = go(recipe, root / str(len(runs)))
        return runs[key]

    return whole


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
def test_stopped_twice_and_gone_on_with_is_never_stopped(make, go, whole, feature):
    recipe = make(feature)
    steps = len(whole(recipe)[1].batches)
    assert steps == recipe.total_steps * (2 if recipe.control else 1)
    stops = 1 if feature.startswith("schedule ") else 2
    stop_at = random.Random(zlib.crc32(feature.encode())).sample(range(1, steps), stops)
    same(whole(recipe), go(recipe, "parts", stop_at), recipe)


def test_the_features_do_what_they_are_called(make, whole):
    """Not that two runs agree because nothing of it happened."""
    found = {}
    for feature in (
        "plain",
        "ramp",
        "reweight",
        "exhausted",
        "muon",
        "ema",
        "uniform",
        "dropout",
        "bf16",
        "branch",
        "distill",
    ):
        found[feature] = whole(make(feature))
    assert len({weights_of(out) for out, _ in found.values()}) == len(found)
    alphas = {
        name: [sum(s.domain == "alpha" for s in step) for step in watch.samples] for name, (_, watch) in found.items()
    }
    assert alphas["plain"] == [2] * 8
    assert sum(alphas["exhausted"]) == 10
    assert sum(alphas["ramp"][:2]) <= 2
    assert sum(alphas["ramp"][-2:]) >= 6
    assert alphas["reweight"] != alphas["plain"]
    for name in ("replay", "proxy", "stages that replay"):
        _, watch = whole(make(name))
        replayed = [s for step in watch.samples for s in step if s.domain.startswith(REPLAYED)]
        assert len(replayed) >= 6, name
    out, _ = whole(make("replay reshuffled, twice"))
    assert read_json(out / "result.json")["training"]["epochs"]["replay"] > 1


@pytest.mark.parametrize("step", [1, 4, 7, 9])
def test_stopped_at_any_step_of_stages(make, go, whole, step):
    recipe = make("stages that replay", average={"decay": 0.7}, optimizer__name="muon")
    same(whole(recipe), go(recipe, "parts", [step]), recipe)


def test_stopped_at_every_step(make, go, whole):
    recipe = make("stages that reweight", control=True)
    steps = 2 * recipe.total_steps
    same(whole(recipe), go(recipe, "parts", range(1, steps + 1)), recipe)


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6])
def test_stopped_inside_an_evaluation(make, whole, tmp_path, monkeypatch, number):
    """The source's, the first, one on the way, one between stages, and the last."""
    recipe = make("stages", evaluate__every=2)
    expected, _ = whole(recipe)
    calls, losses_of = iter(range(1, 100)), setting_module.losses_of

    def stopped(*arguments, **keywords):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses_of(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "losses_of", stopped)
        patch.setattr(child_module, "losses_of", stopped)
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
    run_recipe(recipe, tmp_path / "parts")
    assert differing(outcome(expected, recipe), outcome(tmp_path / "parts", recipe)) == set()


class Killed(BaseException):
    """The process is gone: nothing is saved any more."""


def test_stopped_inside_a_reweighting_and_then_killed(make, whole, tmp_path, monkeypatch):
    recipe = make("reweight")
    expected, _ = whole(recipe)
    losses_of = reweighting_module.losses_of

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
    run_recipe(recipe, tmp_path / "parts")
    assert differing(outcome(expected, recipe), outcome(tmp_path / "parts", recipe)) == set()


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
        "optimizer": (Optimizer, "load", lambda self, tensors, carry="keep", some=False: None),
        "average": (Average, "load", lambda self, tensors, count: None),
        "average's count": (Average, "load", lambda self, saved, count: saved.fill(self._mean)),
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
def test_what_a_resume_forgets_shows(make, whole, tmp_path, monkeypatch, lost, feature, stop_at, shows):
    """Negative controls of the tests above."""
    recipe = make(feature)
    expected, _ = whole(recipe)
    with monkeypatch.context() as patch:
        Watch(patch, [stop_at])
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
        patch.setattr(*forgetful(lost))
        run_recipe(recipe, tmp_path / "parts")
    read = {"weights": weights_of, "metrics": metrics_of}[shows]
    assert read(tmp_path / "parts") != read(expected)


# Updates that are not finite.


def poison(patch, watch, steps, what="loss") -> None:
    """Make the loss, a gradient or (from then on) a weight not finite at some steps, counted over all runs."""
    forward, done = Objective.forward, set()

    def poisoned(self, *arguments):
        step = len(watch.batches)
        if step in steps and what == "weight" and step not in done:
            done.add(step)
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = float("nan")
        loss, *rest = forward(self, *arguments)
        if step in steps and what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss * float("nan") if step in steps and what == "loss" else loss, *rest

    patch.setattr(Objective, "forward", poisoned)


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
        with pytest.raises(DivergenceError, match=r"step 5 .*\b3.* in a row"):
            run_recipe(recipe, tmp_path / "run")


@pytest.mark.parametrize(("what", "skip"), [("loss", 0), ("gradient", 0), ("weight", 0), ("weight", 2)])
def test_a_run_that_goes_bad_names_step_and_samples_and_keeps_its_checkpoints(
    make, whole, tmp_path, monkeypatch, capsys, what, skip
):
    recipe = make(checkpoint__every=2, train__skip_nonfinite=skip, evaluate__every=0)
    expected, _ = whole(recipe)
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
    assert differing(outcome(expected, recipe), outcome(out, recipe)) == set()


def test_weights_that_an_evaluation_finds_broken_are_a_divergence_too(make, tmp_path, monkeypatch):
    recipe = make(train__skip_nonfinite=3, evaluate__every=3)
    with monkeypatch.context() as patch:
        poison(patch, Watch(patch), {5}, "weight")
        with pytest.raises(ScionError, match="step 6") as caught:
            run_recipe(recipe, tmp_path / "run")
    assert caught.value.exit_code == 3
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 3


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


def test_hash_seed_folder_time_zone_and_language_change_nothing(asked, whole, tmp_path):
    recipe, words = asked("stages that reweight", optimizer__name="muon", average={"decay": 0.5})
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    changes = {"PYTHONHASHSEED": "77", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "scionlm", *words, str(tmp_path / "there")]
    done = subprocess.run(command, cwd=elsewhere, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    expected, _ = whole(recipe)
    assert differing(outcome(expected, recipe), outcome(tmp_path / "there", recipe)) == set()


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


def test_an_interrupt_ends_a_run_with_the_step_that_it_comes_in(asked, whole, tmp_path):
    recipe, words = asked("plain")
    out = tmp_path / "run"
    with Child([*words, str(out)], slow=3, seconds=0.3) as child:
        child.process.send_signal(signal.SIGINT)
        code, said = child.end()
    assert code == 75
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 3)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    assert f"to go on: scion {' '.join(words)} {out}" in said
    assert "Traceback" not in said
    run_recipe(recipe, out)
    assert differing(outcome(whole(recipe)[0], recipe), outcome(out, recipe)) == set()


def test_a_second_interrupt_ends_a_run_at_once_and_harms_nothing(asked, whole, tmp_path):
    recipe, words = asked("plain", checkpoint__every=2)
    out = tmp_path / "run"
    with Child([*words, str(out)], slow=6, seconds=300) as child:
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.process.poll() is None, "the first one waits for the step"
        child.process.send_signal(signal.SIGINT)
        code, _ = child.end()  # which waits for a minute, of the five that the step takes
    assert code == 130
    newest = CheckpointStore(out / "checkpoints", 1).all()[-1]
    assert (newest.name, find_damage(newest)) == ("step-00000004", [])
    run_recipe(recipe, out)
    assert differing(outcome(whole(recipe)[0], recipe), outcome(out, recipe)) == set()


def test_a_run_folder_is_one_processs_alone_until_that_is_gone(asked, whole, tmp_path, capsys):
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
    run_recipe(recipe, out)
    assert differing(outcome(whole(recipe)[0], recipe), outcome(out, recipe)) == set()


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
        while len(trained()) < 3 and time.monotonic() < until and child.poll() is None:
            time.sleep(0.01)
        lines = trained()
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[1].decode()
    finally:
        child.kill()
        child.wait()
    assert len(lines) >= 3, said
    assert child.returncode == 75, said
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert f"{status['message']}; to go on: scion run recipe.yaml -o run" in said
    assert "error" not in said  # it was asked for
    step = max(line["time/elapsed_s"] for line in lines) / len(lines)
    assert status["step"] - lines[-1]["step"] <= 2 + 0.1 / step
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{status['step']:08d}"]


# Going on with something changed.


def test_a_change_of_any_kind_of_setting_is_named(make, tmp_path, monkeypatch):
    recipe = make("stages")
    run_until(recipe, tmp_path / "run", 2, monkeypatch)
    for key, value, words in (
        ("optimizer.betas", [0.8, 0.9], r"optimizer\.betas \(\[0\.9, 0\.95\] -> \[0\.8, 0\.9\]\)"),
        ("stages", stages_with("reset"), "started with other settings: stages .*--allow-change"),
        ("average", {"decay": 0.5}, "started with other settings: average"),
        ("inherit.keep", [0, 2], "cannot change"),
        ("data.ramp", {"start": {"alpha": 1.0}, "over": 3}, "cannot change"),
    ):
        changes = {key.replace(".", "__"): value} | ({"inherit__layers": None} if key == "inherit.keep" else {})
        with pytest.raises(UsageError, match=words):
            run_recipe(make("stages", **changes), tmp_path / "run")


IN_A_STAGE = {
    "the mixture": ({"data": {"mixture": {"alpha": 0.9, "beta": 0.1}}}, "the mixture is not the checkpoint's"),
    "the windows": ({"data": {"packing": "best_fit"}}, "its text and how it is cut up cannot change"),
    "moving weights": ({"reweight": MOVING}, "reweight cannot be set or left out"),
}


@pytest.mark.parametrize("what", IN_A_STAGE)
def test_what_cannot_change_inside_a_stage_is_refused_and_the_run_goes_on_without(
    make, whole, tmp_path, monkeypatch, what
):
    keys, words = IN_A_STAGE[what]
    recipe, out = make("stages"), tmp_path / "run"
    run_until(recipe, out, 2, monkeypatch)
    first, *others = stages_with("keep")
    with pytest.raises(UsageError, match=words):
        run_recipe(make("stages", stages=[first | keys, *others]), out, allow_change=True)
    run_recipe(recipe, out, allow_change=True)
    assert differing(outcome(whole(recipe)[0], recipe), outcome(out, recipe)) == set()


def test_another_optimizer_is_refused_with_what_can_be_done(make, tmp_path, monkeypatch):
    run_until(make("plain"), tmp_path / "run", 2, monkeypatch)
    for more in ({}, {"optimizer_state": "reset"}):
        with pytest.raises(UsageError, match=r"optimizer\.name cannot change inside a stage; keep it, or use another"):
            run_recipe(make("plain", optimizer__name="muon", **more), tmp_path / "run", allow_change=True)


def test_the_command_that_goes_on_can_be_pasted(make, tmp_path, monkeypatch):
    words = ["run", "recipe.yaml", "checkpoint.every=10 min", "data.mixture={a: 1}", "-o", "a folder"]
    monkeypatch.setattr("sys.argv", ["scion", *words])
    Watch(monkeypatch, [2])
    with pytest.raises(StoppedError) as caught:
        run_recipe(make("plain"), tmp_path / "run")
    assert shlex.split(str(caught.value).partition("to go on: ")[2]) == ["scion", *words]


def run_until(recipe, out, step, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        Watch(patch, [step])
        with pytest.raises(StoppedError):
            run_recipe(recipe, out)


LESS = {
    "fewer steps": ("plain", {"train__steps": 4}, "stage main would end with step 4"),
    "as many steps as were made": ("plain", {"train__steps": 6}, None),
    "a shorter stage": ("stages", {"stages": [("a", 4), ("b", 1)]}, "stage b would end with step 5"),
    "shorter stages": ("stages", {"stages": [("a", 2), ("b", 3), ("c", 3)]}, "cannot be made longer or shorter"),
    "a longer stage": ("stages", {"stages": [("a", 7), ("b", 3), ("c", 3)]}, "cannot be made longer or shorter"),
    "fewer stages": ("stages", {"stages": [("a", 4)]}, "stages can be added only"),
    "stages in another order": ("stages", {"stages": [("b", 3), ("a", 4), ("c", 3)]}, "stages before a are finished"),
}


@pytest.mark.parametrize("what", LESS)
def test_a_run_that_has_got_further_than_it_may_ends_or_is_refused(make, whole, tmp_path, monkeypatch, what):
    feature, changes, refused = LESS[what]
    if "stages" in changes:
        changes = {"stages": [{"name": name, "train": {"steps": steps}} for name, steps in changes["stages"]]}
    run_until(make(feature), tmp_path / "run", 6, monkeypatch)
    taken, take = iter(range(30)), SamplePlan.take

    def limited(self, count):
        assert next(taken, None) is not None, "it goes on for ever"
        return take(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(SamplePlan, "take", limited)
        if refused is None:
            result = run_recipe(make(feature, **changes), tmp_path / "run", allow_change=True)
        else:
            with pytest.raises(UsageError, match=refused):
                run_recipe(make(feature, **changes), tmp_path / "run", allow_change=True)
    if refused is not None:  # then it is as if it had not been asked for
        run_recipe(make(feature), tmp_path / "run")
        ends = outcome(whole(make(feature))[0], make(feature)), outcome(tmp_path / "run", make(feature))
        assert differing(*ends) == set()
        return
    lines = [line for line in metrics_of(tmp_path / "run") if "optim/lr" in line]
    assert [line["step"] for line in lines] == list(range(1, result["training"]["steps"] + 1))
    assert all(0 <= line["optim/lr"] <= 3e-3 for line in lines)


def test_more_steps_and_another_rate_are_gone_on_with_where_that_is_allowed(make, tmp_path, monkeypatch):
    constant = {"name": "constant", "warmup": 0}
    run_until(make(schedule=constant), tmp_path / "run", 6, monkeypatch)
    with pytest.raises(UsageError, match="--allow-change"):
        run_recipe(make(schedule=constant, train__steps=12), tmp_path / "run")
    longer = make(schedule=constant, train__steps=12, optimizer__lr=1e-3)
    run_recipe(longer, tmp_path / "run", allow_change=True)
    assert column(tmp_path / "run", "optim/lr") == [3e-3] * 6 + [1e-3] * 6


@pytest.mark.parametrize("feature", ["stages", "ramp"])
def test_lengths_in_time_stay_what_they_became(make, tmp_path, monkeypatch, feature):
    stages = [{"name": "a", "train": {"steps": 4}, "schedule": {"warmup": "0.001 s"}}, {"name": "b"}]
    timed = {"stages": stages} if feature == "stages" else {"data__ramp": {"start": {"beta": 1.0}, "over": "1 s"}}
    recipe = make(**timed)
    run_until(recipe, tmp_path / "run", 2, monkeypatch)
    kept = (tmp_path / "run" / "config.yaml").read_text()
    run_until(recipe, tmp_path / "run", 1, monkeypatch)
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    run_recipe(make(**timed, optimizer__lr=1e-3), tmp_path / "run", allow_change=True)
    now = (tmp_path / "run" / "config.yaml").read_text()
    assert [a for a, b in zip(kept.splitlines(), now.splitlines(), strict=True) if a != b] == ["  lr: 0.003"]


def test_what_a_branch_began_with_stays_though_its_run_goes_on(make, whole, tmp_path, monkeypatch):
    """Killed before a first checkpoint: it begins anew from the same place, or says that it cannot."""
    trunk = make(checkpoint__every=2)
    run_until(trunk, tmp_path / "trunk", 5, monkeypatch)
    schedule = {"name": "linear", "warmup": 0}
    branch = make(branch={"run": str(tmp_path / "trunk")}, train__steps=4, schedule=schedule)
    run_recipe(branch, tmp_path / "at once")

    def killed(self, count):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SamplePlan, "take", killed)
        with pytest.raises(Killed):
            run_recipe(branch, tmp_path / "branch")
    run_recipe(trunk, tmp_path / "trunk")
    with contextlib.suppress(UsageError):
        run_recipe(branch, tmp_path / "branch")
        assert weights_of(tmp_path / "branch") == weights_of(tmp_path / "at once")
