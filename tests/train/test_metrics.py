"""What goes into the metrics of a run, and to the trackers, on which training does not depend."""

import errno
import json
import math
import os
import signal
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_train import LR, RUNTIME, SCHEDULE, SEQ_LEN, SEQUENCES, STEPS, Run, Stop, equal, make_stage

from scionlm.core.errors import StoppedError, StorageError, UsageError
from scionlm.core.machine import peak_memory_bytes
from scionlm.core.records import JsonlWriter, read_json, read_jsonl
from scionlm.data import Ledger
from scionlm.families import flops_per_token
from scionlm.recipes import training as training_module
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.train import loop as loop_module
from scionlm.train import metrics as metrics_module
from scionlm.train import step as step_module
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.learner import Position
from scionlm.train.loop import Session, fit, take_up
from scionlm.train.metrics import Metrics, open_tracker
from scionlm.train.saver import Saver
from whole_runs import quicken

PROMISED = {
    "step", "tokens", "train/nll_nats", "optim/lr", "optim/grad_norm", "speed/tokens_per_s", "speed/data_share",
    "memory/peak_bytes", "time/elapsed_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


class FakeTracker:
    """Notes what it is given, and fails when it is told to."""

    def __init__(self, fails_at: int | None = None, fails_to_close: bool = False) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.closed = 0
        self._fails_at, self._fails_to_close = fails_at, fails_to_close

    def log(self, step, values):
        if step == self._fails_at:
            raise ConnectionError("the server is\n  away")
        self.logged.append((step, values))

    def close(self):
        self.closed += 1
        if self._fails_to_close:
            raise RuntimeError("cannot finish")


def train(run: Run, trackers=None, stop_after: int | None = None, flops_per_token=0.0, **session) -> Metrics:
    """Train a run with trackers."""
    metrics = Metrics(JsonlWriter(run.folder / "metrics.jsonl", "metrics"), trackers)
    ledger = Ledger(run.folder / "ledger.jsonl", {})
    store = CheckpointStore(run.folder / "checkpoints", keep=2)
    stop = Stop(run.plan, stop_after and stop_after * SEQUENCES)
    around = Session("test", STEPS, 3, run._evaluate, metrics, Saver(store, 1000), stop, RUNTIME, **session)
    stage, position = make_stage(run.plan, ledger, flops_per_token=flops_per_token), Position()
    take_up(store.newest(), run.learner, stage, position, around)
    try:
        fit(run.learner, stage, position, around)
    finally:
        metrics.close()
        ledger.close()
    return metrics


def lines_of(folder: Path) -> list[dict]:
    return read_jsonl(folder / "metrics.jsonl")


def updates_of(folder: Path) -> list[dict]:
    return [line for line in lines_of(folder) if "train/nll_nats" in line]


def metrics_of(folder: Path, trackers=None, beat=None) -> Metrics:
    return Metrics(JsonlWriter(folder / "metrics.jsonl", "metrics"), trackers, beat)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def test_every_line_of_an_update_has_what_is_promised_and_no_more_keys_than_its_domains_ask_for(tmp_path, data_folder):
    run = Run(tmp_path / "a", data_folder)
    train(run)
    lines = updates_of(run.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= PROMISED
        assert line.keys() - PROMISED <= {"train/alpha/nll_nats", "train/beta/nll_nats"}
        assert line.keys() - PROMISED
        assert all(math.isfinite(line[key]) for key in line)
        assert line["tokens"] == line["step"] * SEQUENCES * SEQ_LEN
        assert line["optim/lr"] == LR * SCHEDULE(line["step"] - 1)
        assert 0 <= line["speed/data_share"] < 1
        assert line["speed/tokens_per_s"] > 0
        assert 2**20 < line["memory/peak_bytes"] <= peak_memory_bytes()
        assert isinstance(line["memory/peak_bytes"], int)


def test_the_loss_of_a_step_is_the_mean_of_its_domains(tmp_path, data_folder):
    run = Run(tmp_path / "a", data_folder)
    batches = []
    take = run.plan.take

    def taking(count):
        batches.append(take(count))
        return batches[-1]

    run.plan.take = taking
    train(run)
    for samples, line in zip(batches, updates_of(run.folder), strict=True):
        names = [sample.domain for sample in samples]
        mean = sum(line[f"train/{name}/nll_nats"] for name in names) / SEQUENCES
        assert mean == pytest.approx(line["train/nll_nats"], rel=1e-5)
        assert {f"train/{name}/nll_nats" for name in names} == line.keys() - PROMISED


def test_speed_and_share_of_waiting_follow_from_the_clock(tmp_path, data_folder, monkeypatch):
    """Three seconds for the data and one for the update: by a clock that does as it is told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = Run(tmp_path / "a", data_folder)
    batch = run.plan.batch

    def slowly(samples):
        clock.now += 3.0
        return batch(samples)

    def forward(model, arguments, result):
        if torch.is_grad_enabled():
            clock.now += 0.5  # for each of two micro-batches

    run.plan.batch = slowly
    run.objective.register_forward_hook(forward)
    train(run, peak_flops=720.0, flops_per_token=5.0)
    for line in updates_of(run.folder):
        assert line["speed/data_share"] == 0.75
        assert line["speed/tokens_per_s"] == SEQUENCES * SEQ_LEN / 4
        assert line["time/elapsed_s"] == 4 * line["step"]
        assert line["speed/mfu"] == (SEQUENCES * SEQ_LEN / 4) * 5 / 720


@pytest.mark.parametrize("peak", [None, 2e9, 1e15])
def test_the_utilization_is_there_where_a_peak_is_known_and_is_the_formula(tmp_path, data_folder, peak):
    run = Run(tmp_path / "a", data_folder)
    config = run.objective.model.config
    matrices = sum(p.numel() for n, p in run.objective.model.named_parameters() if p.ndim == 2 and "layers" in n)
    head = config.vocab_size * config.hidden_size  # tied: it is multiplied all the same
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * SEQ_LEN
    per_token = 6 * (matrices + head) + attention
    hf_config = config.to_dict()
    assert flops_per_token(hf_config, SEQ_LEN) == per_token
    train(run, flops_per_token=per_token, peak_flops=peak)
    for line in updates_of(run.folder):
        if peak is None:
            assert "speed/mfu" not in line
        else:
            assert line["speed/mfu"] == pytest.approx(line["speed/tokens_per_s"] * per_token / peak, rel=1e-12)
    assert len(updates_of(run.folder)) == STEPS


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path, data_folder):
    run = Run(tmp_path / "a", data_folder, skip=1)
    spoil_step(run, 3)
    train(run)
    lines = updates_of(run.folder)
    assert [line["step"] for line in lines if line["train/nll_nats"] is None] == [3]
    assert all(line.keys() >= PROMISED for line in lines)
    assert lines[2]["train/skipped_updates"] == 1


def spoil_step(run: Run, step: int) -> None:
    """Make the loss of a step NaN."""

    def spoil(module, inputs, out):
        now = run.plan.state()["slot"] == step * SEQUENCES and torch.is_grad_enabled()
        return (out[0] * math.nan, *out[1:]) if now else None

    run.objective.register_forward_hook(spoil)


def test_a_beat_tells_the_step_every_fifteen_seconds_and_no_more_often(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    beats = []
    metrics = metrics_of(tmp_path, beat=beats.append)
    for step in range(1, 41):
        clock.now = float(step)
        metrics.write({"step": step})
    metrics.close()
    assert beats == [15, 30]


def test_a_beat_that_the_disk_has_no_room_for_does_not_end_a_run(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    beats = []

    def beat(step):
        beats.append(step)
        if step == 15:
            raise StorageError("the disk is full")

    metrics = metrics_of(tmp_path, beat=beat)
    for step in range(1, 41):
        clock.now = float(step)
        metrics.write({"step": step})
    metrics.close()
    assert beats == [15, 30]
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 41))


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_the_finite_numbers_of_every_step_and_is_closed(tmp_path, data_folder):
    run, tracker = Run(tmp_path / "a", data_folder, skip=1), FakeTracker()
    spoil_step(run, 3)
    train(run, {"fake": tracker})
    lines = lines_of(run.folder)
    assert [step for step, _ in tracker.logged] == [line["step"] for line in lines]
    for (_, values), line in zip(tracker.logged, lines, strict=True):
        assert values == {k: v for k, v in line.items() if "/" in k and v is not None}
        assert all(type(value) is float and math.isfinite(value) for value in values.values())
    assert "train/nll_nats" not in dict(tracker.logged)[3]
    assert {step for step, values in tracker.logged if "eval/alpha/nll_nats" in values} == {0, 3, 6}
    assert tracker.closed == 1


def test_words_and_lists_do_not_go_to_a_tracker(tmp_path):
    tracker = FakeTracker()
    metrics = metrics_of(tmp_path, {"fake": tracker})
    metrics.write(
        {"step": 3, "tokens": 72, "a/word": "x", "a/list": [1.0], "a/none": None, "a/inf": math.inf, "a/b": 2}
    )
    metrics.close()
    assert tracker.logged == [(3, {"a/b": 2.0})]


def test_a_tracker_that_fails_is_named_once_and_left_out_and_training_goes_on(tmp_path, data_folder, capsys):
    plain = Run(tmp_path / "plain", data_folder)
    train(plain)
    capsys.readouterr()
    run = Run(tmp_path / "a", data_folder)
    failing, steady = FakeTracker(fails_at=4), FakeTracker()
    train(run, {"failing": failing, "steady": steady})
    words = capsys.readouterr().err
    assert words.count("warning: failing failed and is left out from now on: the server is away\n") == 1
    assert words.count("failing") == 1
    assert [step for step, _ in failing.logged] == [0, 1, 2, 3, 3]
    assert failing.closed == 0
    assert [step for step, _ in steady.logged][-1] == STEPS
    assert steady.closed == 1
    assert len(updates_of(run.folder)) == STEPS
    assert equal(run.weights, plain.weights)


def test_a_tracker_that_cannot_be_closed_does_not_fail_the_run(tmp_path, capsys):
    first, second = FakeTracker(fails_to_close=True), FakeTracker()
    metrics = metrics_of(tmp_path, {"first": first, "second": second})
    metrics.write({"step": 1, "a/b": 1.0})
    metrics.close()
    assert "first failed and is left out from now on: cannot finish" in capsys.readouterr().err
    assert (first.closed, second.closed) == (1, 1)


def test_a_long_message_of_a_tracker_is_cut(tmp_path, capsys):
    class Wordy(FakeTracker):
        def log(self, step, values):
            raise ValueError("word " * 1000)

    metrics = metrics_of(tmp_path, {"wordy": Wordy()})
    metrics.write({"step": 1})
    metrics.close()
    assert 100 < len(capsys.readouterr().err) < 300


def test_an_interrupt_inside_a_tracker_is_not_taken_for_its_failure(tmp_path):
    class Interrupted(FakeTracker):
        def log(self, step, values):
            raise KeyboardInterrupt

    metrics = metrics_of(tmp_path, {"fake": Interrupted()})
    with pytest.raises(KeyboardInterrupt):
        metrics.write({"step": 1})
    metrics.close()


def test_trackers_are_finished_also_where_the_file_cannot_be_closed(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    writer, tracker = JsonlWriter(tmp_path / "metrics.jsonl", "metrics"), FakeTracker()
    writer._file.close()
    writer._file = Full()
    metrics = Metrics(writer, {"fake": tracker})
    metrics.write({"step": 1, "a/b": 1.0})
    assert tracker.logged == [(1, {"a/b": 1.0})]  # a full disk is nothing to it
    with pytest.raises(StorageError):
        metrics.close()
    assert tracker.closed == 1


class FakeServer:
    """What wandb and trackio have in common, and where they differ: wandb goes on with a run by its id alone, trackio
    by its name, and has no ids."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.runs: dict[str, SimpleNamespace] = {}

    def _open(self, key: str, resume: str | None, asked: dict) -> SimpleNamespace:
        self.asked.append(asked)
        if resume == "allow" and key in self.runs:
            return self.runs[key]
        run = SimpleNamespace(lines=[], finished=0)
        run.log = lambda values, step=None: run.lines.append((step, values))

        def finish():
            run.finished += 1

        run.finish = finish
        self.runs[key] = run
        return run

    def wandb(self) -> ModuleType:
        def init(
            entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
            group=None, job_type=None, mode=None, resume=None, reinit=None, settings=None,
        ):  # fmt: skip
            asked = {"project": project, "name": name, "id": id, "config": config, "resume": resume}
            return self._open(id or f"random-{len(self.runs)}", resume, asked)

        module = ModuleType("wandb")
        module.init = init
        return module

    def trackio(self) -> ModuleType:
        def init(
            project, name=None, group=None, space_id=None, dataset_id=None, config=None, resume="never", settings=None,
            private=None, embed=True,
        ):  # fmt: skip
            asked = {"project": project, "name": name, "config": config, "resume": resume}
            return self._open(f"{project}/{name}", resume, asked)

        module = ModuleType("trackio")
        module.init = init
        return module


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch) -> SimpleNamespace:
    server = FakeServer()
    monkeypatch.setitem(sys.modules, request.param, getattr(server, request.param)())
    return SimpleNamespace(name=request.param, server=server)


def test_a_run_of_wandb_or_trackio_has_its_folders_name_and_the_recipe(tmp_path, package):
    run, config = tmp_path / "projects" / "child-3", {"recipe": "inheritune", "seed": 5}
    tracker = open_tracker(package.name, run, config)
    tracker.log(7, {"train/nll_nats": 2.5})
    tracker.log(8, {"train/nll_nats": 2.25, "optim/lr": 1e-3})
    (asked,) = package.server.asked
    assert (asked["project"], asked["name"], asked["config"]) == ("projects", "child-3", config)
    (there,) = package.server.runs.values()
    assert there.lines == [(7, {"train/nll_nats": 2.5}), (8, {"train/nll_nats": 2.25, "optim/lr": 1e-3})]
    assert there.finished == 0
    tracker.close()
    assert there.finished == 1


def test_a_run_that_goes_on_goes_on_there_too_and_another_run_is_another(tmp_path, package):
    for _ in range(3):
        open_tracker(package.name, tmp_path / "a" / "run", {}).close()
    assert len(package.server.runs) == 1
    open_tracker(package.name, tmp_path / "a" / "other", {}).close()
    open_tracker(package.name, tmp_path / "a" / "run" / "control", {}).close()
    assert len(package.server.runs) == 3


def test_a_relative_folder_is_the_same_run(tmp_path, package, monkeypatch):
    (tmp_path / "a" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "run")
    open_tracker(package.name, Path(), {})
    assert (package.server.asked[0]["project"], package.server.asked[0]["name"]) == ("a", "run")


def test_tensorboard_reads_what_was_written_into_the_run_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = metrics_of(tmp_path, {"tensorboard": open_tracker("tensorboard", tmp_path, {})})
    metrics.write({"step": 2, "tokens": 9, "train/nll_nats": 2.5, "optim/grad_norm": math.nan, "optim/lr": 0.125})
    metrics.write({"step": 3, "tokens": 12, "train/nll_nats": 2.25})
    metrics.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    scalars = {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars == {"train/nll_nats": [(2, 2.5), (3, 2.25)], "optim/lr": [(2, 0.125)]}


MODULES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


@pytest.mark.parametrize("name", MODULES)
def test_a_package_that_is_not_there_is_a_usage_error_that_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # importing it fails
    what = r"'scionlm\[track\]'" if name == "tensorboard" else name
    with pytest.raises(UsageError, match=rf"{name} is not installed; pip install {what}") as caught:
        open_tracker(name, tmp_path, {})
    assert caught.value.exit_code == 2


def test_what_the_message_says_to_install_is_there_to_be_installed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "track" in extras
    assert {name.split(">")[0].split("[")[0] for name in extras["track"]} & set(MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Through a recipe
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_settings(tiny_folder, data_folder) -> dict:
    return {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": {"alpha": 0.6, "beta": 0.4},
        "data.seq_len": 24, "inherit.layers": 2, "train.tokens": 24 * 4 * 6, "train.global_batch_tokens": 24 * 4,
        "train.precision": "fp32", "evaluate.tokens_per_domain": 100, "control": False,
    }  # fmt: skip


def test_a_recipe_tracks_its_run_over_a_stop_and_measures_its_utilization(
    tmp_path, recipe_settings, monkeypatch, package
):
    monkeypatch.setattr(training_module, "peak_flops", lambda runtime: (1e12, "a test"))
    original, count = step_module.micro_batches, iter(range(1, 100))

    def stopping(batch, size):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, size)

    monkeypatch.setattr(step_module, "micro_batches", stopping)
    out, recipe = tmp_path / "run", load_recipe("inheritune-mini", recipe_settings | {"track": [package.name]})
    with pytest.raises(StoppedError):
        run_recipe(recipe, out)
    run_recipe(recipe, out)
    assert [asked["name"] for asked in package.server.asked] == ["run"] * 3  # the last losses are of what was exported
    assert all(asked["config"]["inherit"]["layers"] == 2 for asked in package.server.asked)
    logged = [step for run in package.server.runs.values() for step, line in run.lines if "train/nll_nats" in line]
    assert logged == [1, 2, 3, 4, 5, 6]
    evaluated = [
        step for run in package.server.runs.values() for step, line in run.lines if "eval/alpha/nll_nats" in line
    ]
    assert (evaluated[0], evaluated[-1]) == (0, 6)
    assert evaluated == [line["step"] for line in read_jsonl(out / "metrics.jsonl") if "eval/alpha/nll_nats" in line]
    assert sum(run.finished for run in package.server.runs.values()) == 3
    hf_config = json.loads((out / "model" / "config.json").read_text())
    per_token = flops_per_token(hf_config, 24)
    lines = updates_of(out)
    assert len(lines) == 6
    for line in lines:
        assert line["speed/mfu"] == pytest.approx(line["speed/tokens_per_s"] * per_token / 1e12, rel=1e-9)
    training = read_json(out / "training.json")
    assert training["peak_flops"] == {"flops_per_s": 1e12, "known_from": "a test"}
    assert training["flops"] == per_token * 24 * 4 * 6


def test_a_missing_package_is_found_before_anything_is_computed(tmp_path, recipe_settings, monkeypatch):
    """Evaluating the source takes minutes, and a wrong request leaves no folder."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run_recipe(load_recipe("inheritune-mini", recipe_settings | {"track": ["wandb"]}), tmp_path / "run")
    assert not (tmp_path / "run" / "source.json").exists()
    assert not (tmp_path / "run").exists()
