"""When it saves, and what a full disk does: the old checkpoint stays, training goes on, no line is lost."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import SEQUENCES, STEPS, Run, equal

from scionlm.core.duration import Duration
from scionlm.core.errors import StorageError
from scionlm.core.records import JsonlWriter, read_jsonl
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.parallel.runtime import Runtime
from scionlm.train import saver as module
from scionlm.train.checkpoint import CheckpointStore, find_damage
from scionlm.train.saver import Saver

quick = settings(max_examples=100)
TENSORS = {"weights": {"a": torch.ones(1000)}}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def disk(monkeypatch) -> SimpleNamespace:
    """A disk with as much room as it is told."""
    disk = SimpleNamespace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=disk.free))
    return disk


class Steady:
    """A record that is always on the disk."""

    def flush(self) -> None:
        pass


def save(saver: Saver, step: int, must: bool = False, **changes) -> None:
    saver.save({"step": step}, TENSORS, [Steady()], must=must, **changes)


def steps_in(store: CheckpointStore) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in store.all()]


# ---------------------------------------------------------------------------------------------------------------------
# When
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(every=st.integers(1, 9), start=st.integers(0, 30), steps=st.integers(1, 60))
def test_with_a_number_of_steps_it_is_due_so_many_after_the_last(every, start, steps):
    saver = Saver(CheckpointStore(Path("nowhere"), 1), every)
    saver.begin(start, saved=True)
    saved = []
    for step in range(start, start + steps):
        if saver.is_due(step):
            saved.append(step)
            saver.begin(step, saved=True)
    assert saved == list(range(start + every, start + steps, every))


@quick
@given(every=st.floats(0.5, 100), pace=st.floats(0.1, 30))
def test_with_a_time_it_is_due_when_so_much_has_passed_since_the_last(every, pace):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        saver = Saver(CheckpointStore(Path("nowhere"), 1), every)
        saver.begin(0, saved=False)
        since = clock.now
        for step in range(1, 50):
            clock.now += pace
            due = clock.now - since >= every
            assert saver.is_due(step) == due
            if due:
                saver.begin(step, saved=True)
                since = clock.now


def test_a_whole_number_of_seconds_is_a_time_and_not_a_number_of_steps(clock):
    saver = Saver.of(CheckpointStore(Path("nowhere"), 1), Duration.parse("60 s"), 100, 10)
    assert not saver.is_due(99)
    clock.now += 59.9
    assert not saver.is_due(1)
    clock.now += 0.2
    assert saver.is_due(1)


@pytest.mark.parametrize(
    ("every", "steps"), [(7, 7), ("7 steps", 7), (0.1, 20), ("1k tokens", 10), (0, 1), (0.0001, 1), ("10 tokens", 1)]
)
def test_a_duration_becomes_steps_of_the_whole_run_and_at_least_one(every, steps):
    saver = Saver.of(CheckpointStore(Path("nowhere"), 1), Duration.parse(every), 200, 100)
    assert [saver.is_due(step) for step in range(steps + 1)] == [False] * steps + [True]


def test_those_for_good_are_due_at_their_steps_however_seldom_the_others_are():
    saver = Saver(CheckpointStore(Path("nowhere"), 1), 1000, keep_every=4)
    assert [step for step in range(13) if saver.is_due(step)] == [4, 8, 12]
    saver.begin(8, saved=True)
    assert not saver.is_due(8)  # it has just been saved
    assert saver.is_due(12)


@pytest.mark.parametrize("every", [3, 1000])
def test_those_for_good_stay_beside_the_newest(tmp_path, every):
    store = CheckpointStore(tmp_path, keep=2)
    saver = Saver(store, every, keep_every=5)
    for step in range(1, 23):
        if saver.is_due(step):
            save(saver, step)
    assert steps_in(store) == {3: [5, 10, 13, 15, 18, 20], 1000: [5, 10, 15, 20]}[every]


def test_without_keep_every_only_the_newest_stay(tmp_path):
    """The control of the test above."""
    store = CheckpointStore(tmp_path, keep=2)
    saver = Saver(store, 5)
    for step in range(1, 23):
        if saver.is_due(step):
            save(saver, step)
    assert steps_in(store) == [15, 20]


def test_a_run_keeps_for_good_what_it_was_asked_to(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr("test_train.Saver", lambda store, every: Saver(store, every, keep_every=3))
    Run(tmp_path / "a", data_folder, checkpoint_every=1).fit()
    assert steps_in(CheckpointStore(tmp_path / "a" / "checkpoints", 2)) == [3, 5, 6, 7, 8]


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path):
    order = []
    store = CheckpointStore(tmp_path, keep=1)

    class Record:
        def flush(self):
            order.append(steps_in(store))

    Saver(store, 1).save({"step": 4}, TENSORS, [Record(), Record()], must=True)
    assert order == [[], []]
    assert steps_in(store) == [4]


def test_a_record_that_cannot_be_written_holds_the_checkpoint_back(tmp_path, clock, capsys):
    store = CheckpointStore(tmp_path, keep=1)
    saver = Saver(store, 1)

    class Full:
        def flush(self):
            raise StorageError("cannot use metrics.jsonl: the disk is full")

    saver.save({"step": 4}, TENSORS, [Steady(), Full()], must=False)
    assert steps_in(store) == []
    assert "metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        saver.save({"step": 5}, TENSORS, [Full()], must=True)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint_and_the_warning_names_path_and_bytes(tmp_path, disk, clock, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    saver = Saver(store, 1)
    save(saver, 3)
    disk.free = 1234
    save(saver, 4)
    words = capsys.readouterr().err
    assert words.startswith("warning: ")
    assert str(tmp_path / "checkpoints") in words
    assert "it needs 4.1 KiB, 1.21 KiB are free" in words  # 1000 float32 numbers and a twentieth
    assert "step 4; the last checkpoint is of step 3" in words
    assert "next try in 10 s" in words
    assert saver.saved_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]
    assert find_damage(tmp_path / "checkpoints" / "step-00000003") == []


@pytest.mark.parametrize("free", [0, 4000, 4199])
def test_too_little_room_is_found_before_anything_is_written(tmp_path, disk, free):
    disk.free = free
    with pytest.raises(StorageError, match=r"needs 4\.1 KiB"):
        save(Saver(CheckpointStore(tmp_path / "a" / "checkpoints", 1), 1), 1, must=True)
    assert list(tmp_path.iterdir()) == []


def test_enough_room_is_enough(tmp_path, disk):
    """The control of the test above."""
    disk.free = 4200
    save(Saver(CheckpointStore(tmp_path / "checkpoints", 1), 1), 1, must=True)
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()


def test_without_any_checkpoint_the_warning_says_so(tmp_path, disk, clock, capsys):
    disk.free = 0
    save(Saver(CheckpointStore(tmp_path, 1), 1), 4)
    assert "there is no checkpoint yet" in capsys.readouterr().err


def test_it_waits_twice_as_long_each_time_and_gives_up_at_the_fifth(tmp_path, disk, clock, capsys):
    saver = Saver(CheckpointStore(tmp_path, 1), 1)
    save(saver, 1)
    disk.free = 0
    step = 2
    assert saver.is_due(step)
    for wait in (10, 20, 40, 80):
        save(saver, step)
        assert f"next try in {wait} s" in capsys.readouterr().err
        clock.now += wait - 0.1
        assert not saver.is_due(step + 1)
        assert not saver.is_due(step + 1000)  # steps do not count now
        clock.now += 0.2
        step += 1
        assert saver.is_due(step)
    with pytest.raises(StorageError, match=r"step 6; the last checkpoint is of step 1") as caught:
        save(saver, step)
    assert caught.value.exit_code == 74
    assert steps_in(saver.store) == [1]


def test_what_must_be_saved_raises_at_once(tmp_path, disk, clock, capsys):
    saver = Saver(CheckpointStore(tmp_path, 1), 1)
    save(saver, 1)
    disk.free = 0
    with pytest.raises(StorageError, match="the last checkpoint is of step 1") as caught:
        save(saver, 2, must=True)
    assert caught.value.exit_code == 74
    assert capsys.readouterr().err == ""
    assert steps_in(saver.store) == [1]


@pytest.mark.parametrize("failures", [1, 2, 4])
def test_when_room_returns_it_saves_and_counts_anew(tmp_path, disk, clock, capsys, failures):
    saver = Saver(CheckpointStore(tmp_path, 1), 5)
    for _ in range(2):  # the second time it has as many tries as the first
        first = (saver.saved_step or 0) + 5
        disk.free = 0
        for number in range(failures):
            save(saver, first + number)
            clock.now += 1000
        assert saver.saved_step == (first - 5 or None)
        disk.free = 10**12
        assert saver.is_due(first + failures)
        save(saver, first + failures)
        assert saver.saved_step == first + failures
        assert not saver.is_due(first + failures + 4)
        assert saver.is_due(first + failures + 5)
        assert "next try in 10 s" in capsys.readouterr().err
    assert steps_in(saver.store) == [2 * (5 + failures)]


@pytest.mark.parametrize("call", [1, 2, 3], ids=["weights", "optimizer", "average"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        pytest.param(None, id="SafetensorError"),
    ],
    ids=lambda error: error and errno.errorcode[error.errno],
)
def test_a_disk_that_fills_up_while_it_is_written_to_leaves_the_old_checkpoint_alone(
    tmp_path, clock, capsys, monkeypatch, call, error
):
    from safetensors import SafetensorError

    from scionlm.train import checkpoint

    store = CheckpointStore(tmp_path, keep=1)
    saver = Saver(store, 1)
    some = {name: {"a": torch.ones(100)} for name in ("weights", "optimizer", "average")}
    saver.save({"step": 1}, some, [], must=True)
    calls, real = iter(range(1, 100)), checkpoint.save_file

    def full(tensors, path):
        if next(calls) == call:
            Path(path).write_bytes(b"half of it")
            raise error or SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        saver.save({"step": 2}, some, [], must=False)
        words = capsys.readouterr().err
        assert str(tmp_path) in words
        assert re.search("disk is full|quota|No space left", words, re.IGNORECASE)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # nothing half written either
        assert find_damage(tmp_path / "step-00000001") == []
    clock.now += 10
    assert saver.is_due(3)
    saver.save({"step": 3}, some, [], must=False)
    assert steps_in(store) == [3]


def test_training_goes_on_over_a_full_disk_and_ends_with_the_same_bits(
    tmp_path, data_folder, disk, capsys, monkeypatch
):
    monkeypatch.setattr(module, "_FIRST_WAIT_SECONDS", 0.0)
    whole = Run(tmp_path / "whole", data_folder)
    whole.fit()
    capsys.readouterr()
    run = Run(tmp_path / "a", data_folder, checkpoint_every=2)

    def fill(model, arguments, result):
        step = run.plan.state()["slot"] // SEQUENCES
        disk.free = 0 if 4 <= step < 7 else 10**12

    run.objective.register_forward_hook(fill)
    run.fit()
    assert equal(whole.weights, run.weights)
    assert run.losses() == whole.losses()
    warned = re.findall(r"\(step (\d); the last checkpoint is of step (\d); going on", capsys.readouterr().err)
    assert warned == [("4", "2"), ("5", "2"), ("6", "2")]
    assert steps_in(CheckpointStore(run.folder / "checkpoints", 1))[-1] == STEPS
    steps = [line["step"] for line in read_jsonl(run.folder / "ledger.jsonl")]
    assert steps == sorted(steps)


def test_a_disk_that_stays_full_ends_the_run_with_the_old_checkpoint_from_which_it_goes_on(
    tmp_path, data_folder, disk, capsys, monkeypatch
):
    monkeypatch.setattr(module, "_FIRST_WAIT_SECONDS", 0.0)
    whole = Run(tmp_path / "whole", data_folder)
    whole.fit()
    run = Run(tmp_path / "a", data_folder, checkpoint_every=1)

    def fill(model, arguments, result):
        disk.free = 10**12 if run.plan.state()["slot"] < 3 * SEQUENCES else 0

    run.objective.register_forward_hook(fill)
    with pytest.raises(StorageError, match=r"step 7; the last checkpoint is of step 2") as caught:
        run.fit()
    assert caught.value.exit_code == 74
    assert steps_in(CheckpointStore(run.folder / "checkpoints", 1)) == [1, 2]
    disk.free = 10**12
    second = Run(tmp_path / "a", data_folder)
    second.fit()
    assert equal(whole.weights, second.weights)
    assert second.losses() == whole.losses()


def test_the_end_of_a_run_on_a_full_disk_raises_at_once(tmp_path, data_folder, disk):
    run = Run(tmp_path / "a", data_folder)
    disk.free = 0
    with pytest.raises(StorageError, match=rf"step {STEPS}; there is no checkpoint yet"):
        run.fit()


def test_saving_that_takes_long_is_said_once_with_what_to_set(tmp_path, clock, capsys, monkeypatch):
    saver = Saver(CheckpointStore(tmp_path, 1), 60.0)
    real = CheckpointStore.save

    def slow(self, *arguments):
        clock.now += 6
        return real(self, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    for step in (1, 2):
        clock.now += 60
        save(saver, step)
    words = capsys.readouterr().err
    assert words.count("saving took 6.0 s, 9 % of the time") == 1
    assert "checkpoint.every: 5 min" in words


# ---------------------------------------------------------------------------------------------------------------------
# Lines on a full disk
# ---------------------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A raw file on a disk with so many bytes left, of which it takes what it can."""

    def __init__(self, file, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: bytes) -> int:
        if data and not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def expected_lines(count: int) -> list[dict]:
    return [{"step": step, "train/nll_nats": 1 / step, "note": "é" * (step % 4)} for step in range(1, count + 1)]


@quick
@given(rooms=st.lists(st.sampled_from([0, 0, 1, 7, 60, 61, 150, 10**6]), min_size=1, max_size=25))
def test_lines_wait_for_room_and_none_is_lost_torn_or_doubled(tmp_path_factory, rooms):
    path = tmp_path_factory.mktemp("lines") / "m.jsonl"
    writer = JsonlWriter(path, "metrics")
    header = path.read_bytes()
    writer._file = disk = SmallDisk(writer._file, 0)
    lines = expected_lines(len(rooms))
    whole = header + b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    for line, room in zip(lines, rooms, strict=True):
        disk.room = room
        writer.write(line)  # never raises
        there = path.read_bytes()
        assert whole.startswith(there)
        assert read_jsonl(path) == lines[: there.count(b"\n") - 1]
        if disk.room:
            assert there.endswith(b"\n")
    disk.room = 10**6
    writer.flush()
    assert path.read_bytes() == whole
    writer.close()
    assert path.read_bytes() == whole


def test_closing_without_room_is_a_storage_error_and_the_lines_before_stay(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path, "metrics")
    writer._file = disk = SmallDisk(writer._file, 100)
    lines = expected_lines(4)
    for line in lines:
        writer.write(line)
    with pytest.raises(StorageError, match=r"m\.jsonl: the disk is full") as caught:
        writer.close()
    assert caught.value.exit_code == 74
    assert disk._file.closed
    assert capsys.readouterr().err.count("its lines wait in memory") == 1
    assert read_jsonl(path) == lines[:1]
    again = JsonlWriter(path, "metrics")  # takes the torn line away
    again.write({"step": 2})
    again.close()
    assert read_jsonl(path) == [lines[0], {"step": 2}]


def test_flushing_without_room_raises_and_a_checkpoint_can_wait_for_it(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl", "metrics")
    writer._file = disk = SmallDisk(writer._file, 0)
    writer.write({"step": 1})
    for _ in range(3):
        with pytest.raises(StorageError):
            writer.flush()
    disk.room = 10**6
    writer.flush()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    writer.close()


def in_a_child_with_small_files(work: Callable[[Callable[[int | None], None]], None]) -> None:
    """Run `work` in a process in which files can be kept from growing, as on a full disk: part of a write is done."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit_files(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # What pytest puts in the place of stderr is a file too, which could grow no more.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            work(limit_files)
        os._exit(0)
    except BaseException:
        limit_files(None)
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.mark.parametrize("room", [1, 30, 100, 200])
def test_lines_wait_where_the_system_itself_takes_part_of_a_write(tmp_path, room):
    path, lines = tmp_path / "m.jsonl", expected_lines(9)

    def work(limit_files):
        writer = JsonlWriter(path, "metrics")
        for step, line in enumerate(lines, start=1):
            if step == 2:
                limit = path.stat().st_size + room
                limit_files(limit)
            if step == 7:
                assert path.stat().st_size == limit  # it was met
                assert not path.read_bytes().endswith(b"\n")
                limit_files(None)
            writer.write(line)
        writer.close()

    in_a_child_with_small_files(work)
    assert read_jsonl(path) == lines


def test_closing_a_file_that_the_system_lets_grow_no_more_is_a_storage_error(tmp_path):
    path = tmp_path / "m.jsonl"

    def work(limit_files):
        writer = JsonlWriter(path, "metrics")
        writer.write({"step": 1})
        limit_files(path.stat().st_size + 5)
        writer.write({"step": 2})
        with pytest.raises(StorageError, match=r"m\.jsonl"):
            writer.close()

    in_a_child_with_small_files(work)
    assert read_jsonl(path) == [{"step": 1}]


def test_a_checkpoint_that_the_system_lets_grow_no_more_leaves_the_old_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    Saver(store, 1).save({"step": 1}, TENSORS, [], must=True)

    def work(limit_files):
        saver = Saver(store, 1)
        for size in (100, 2000, 4000):
            limit_files(size)
            with pytest.raises(StorageError):
                saver.save({"step": 2}, TENSORS, [], must=True)
            assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        limit_files(None)
        saver.save({"step": 2}, TENSORS, [], must=True)

    in_a_child_with_small_files(work)
    assert steps_in(store) == [2]
    assert find_damage(tmp_path / "step-00000002") == []


def test_a_run_whose_metrics_find_no_room_for_a_while_has_every_line_in_the_end(
    tmp_path, data_folder, monkeypatch, capsys
):
    run = Run(tmp_path / "a", data_folder, checkpoint_every=2)
    monkeypatch.setattr(module, "_FIRST_WAIT_SECONDS", 0.0)
    disks, opened = {}, JsonlWriter.__init__

    def on_small_disk(self, path, kind):
        opened(self, path, kind)
        rewind = self.rewind

        def again(*arguments, **keywords):
            rewind(*arguments, **keywords)
            disks[kind] = self._file = SmallDisk(self._file, 10**6)

        self.rewind = again

    monkeypatch.setattr(JsonlWriter, "__init__", on_small_disk)

    def fill(model, arguments, result):
        step = run.plan.state()["slot"] // SEQUENCES
        disks["metrics"].room = 50 if step in (3, 4, 5) else 10**6

    run.objective.register_forward_hook(fill)
    run.fit()
    lines = [line["step"] for line in read_jsonl(run.folder / "metrics.jsonl") if "train/nll_nats" in line]
    assert lines == list(range(1, STEPS + 1))
    words = capsys.readouterr().err
    assert "its lines wait in memory" in words
    assert "step 4; the last checkpoint is of step 2; going on" in words  # it would have counted on lines not there
    assert find_damage(run.folder / "checkpoints" / f"step-0000000{STEPS}") == []


def test_a_checkpoint_for_good_waits_for_the_one_that_is_being_written():
    class Slow:
        folder, ranks, shared, saved = Path("nowhere"), ALONE, False, []

        def save(self, state, tensors, for_good):
            time.sleep(0.3)
            self.saved.append((state["step"], for_good))

    saver = Saver(Slow(), 3, keep_every=4, background=Runtime("cpu", "a processor", 1, "fp32"))
    saver.begin(0, saved=False)
    for step in range(1, 6):
        if saver.is_due(step):
            saver.save({"step": step}, {}, (), must=False)
    saver.close()
    assert Slow.saved == [(3, False), (4, True)]


def test_what_writes_in_the_background_is_on_the_device_of_its_process(monkeypatch):
    class Second(Ranks):
        local_rank = 1

    class Store:
        folder, ranks, shared = Path("nowhere"), ALONE, False

        def save(self, state, tensors, for_good):
            found.append(("save", threading.current_thread().name))

    def enter(device):
        found.append((device, threading.current_thread().name))

    found = []
    monkeypatch.setattr(torch.cuda, "set_device", enter)
    saver = Saver(Store(), 1, background=Runtime("cuda", "a GPU", 1, "bf16", Second()))
    saver.save({"step": 1}, {}, (), must=False)
    saver.close()
    assert found == [(torch.device("cuda", 1), "checkpoint"), ("save", "checkpoint")]
