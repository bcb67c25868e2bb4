"""Checkpoints: any damage is found, any kill leaves the old one or the new one, and old ones are still read."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from factories import tiny_model
from scionlm.core import files
from scionlm.core.errors import DataError, NewerFormatError, StorageError, UsageError
from scionlm.core.records import read_json, write_json
from scionlm.parallel.runtime import random_state
from scionlm.train import checkpoint as module
from scionlm.train.checkpoint import CheckpointStore, find_checkpoint, find_damage, open_checkpoint
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings

NEWEST = "step-00000003"
FILES = ["average.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def tensors_of(step: int, rows: int = 60) -> dict[str, dict[str, torch.Tensor]]:
    """Return some tensors of several pages; no number in them is zero, and no two steps have one in common."""
    generator = torch.Generator().manual_seed(step)

    def some() -> torch.Tensor:
        return 1 + torch.rand(rows, 64, generator=generator)

    return {
        "weights": {"a.weight": some(), "b.weight": some()},
        "optimizer": {"a.weight/exp_avg": some(), "a.weight/step": torch.tensor(float(step))},
        "average": {"a.weight": some()},
    }


def save_step(store: CheckpointStore, step: int, for_good: bool = False) -> Path:
    state = {"step": step, "tokens": 100 * step, "plan": {"slot": 6 * step, "counts": {"alpha": 4 * step}}}
    return store.save(state, tensors_of(step), for_good)


def is_complete(checkpoint: module.Checkpoint, step: int) -> bool:
    """Return whether a checkpoint is what `save_step` wrote."""
    expected = tensors_of(step)
    found = {name: checkpoint.tensors(name) for name in expected}
    return checkpoint.state["step"] == step and all(
        found[name].keys() == expected[name].keys() and all(torch.equal(found[name][k], v) for k, v in some.items())
        for name, some in expected.items()
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Edit the manifest as somebody would by hand, the rest of it as it was written."""
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    (folder / "manifest.json").write_text(json.dumps(record, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------

Mutation = Callable[[Path, random.Random], None]


def flip_bit(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_bit_of_numbers(folder: Path, rng: random.Random) -> None:
    """Flip a bit of a tensor: what safetensors itself has no means to find."""
    path = folder / rng.choice([name for name in FILES if name.endswith("tensors")])
    data = bytearray(path.read_bytes())
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero_page(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = bytearray(path.read_bytes())
    start = 4096 * rng.randrange(-(-len(data) // 4096))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def append(folder: Path, rng: random.Random) -> None:
    with (folder / rng.choice(FILES)).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def swap_files(folder: Path, rng: random.Random) -> None:
    first, second = (folder / name for name in rng.sample(FILES, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def delete_file(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(FILES)).unlink()


def empty_file(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(FILES)).write_bytes(b"")


def extra_file(folder: Path, rng: random.Random) -> None:
    name = rng.choice(["extra", ".hidden", "weights.safetensors.tmp", "weights.bin", "State.json", "manifest.json.bak"])
    if rng.random() < 0.2:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(rng.randbytes(rng.randrange(50)))


def older_file(folder: Path, rng: random.Random) -> None:
    shutil.copy(folder.with_name("step-00000002") / rng.choice(FILES), folder)


def older_files(folder: Path, rng: random.Random) -> None:
    for name in rng.sample(FILES, rng.randrange(2, len(FILES))):
        shutil.copy(folder.with_name("step-00000002") / name, folder)


def older_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(f"step-0000000{rng.choice([1, 2])}"), folder)


def folder_for_a_file(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    path.unlink()
    path.mkdir()


EDITS: list[Callable[[dict, random.Random], object]] = [
    lambda record, rng: record.update(for_good=not record["for_good"]),
    lambda record, rng: record.pop("for_good"),
    lambda record, rng: record.pop("sha256"),
    lambda record, rng: record["sha256"].pop(rng.choice(sorted(record["sha256"]))),
    lambda record, rng: record["sha256"].update({rng.choice(sorted(record["sha256"])): "0" * 64}),
    lambda record, rng: record["sha256"].update({"extra.safetensors": "0" * 64}),
    lambda record, rng: record["sha256"].update({"../step-00000002/state.json": "0" * 64}),
    lambda record, rng: record.update(sha256=rng.choice([None, [], {}, "state.json", 5, ["state.json"]])),
    lambda record, rng: record.update(digest=rng.choice([None, "", 0, record["digest"].upper()])),
    lambda record, rng: record.update(format_version=rng.choice([None, "1", 2, 1.0, []])),
    lambda record, rng: record.pop("format_version"),
    lambda record, rng: record["sha256"].update(dict.fromkeys(record["sha256"], rng.choice([None, 1, ["a"]]))),
]


def edit_manifest(folder: Path, rng: random.Random) -> None:
    edit = rng.choice(EDITS)
    change_manifest(folder, lambda record: edit(record, rng))


def not_a_manifest(folder: Path, rng: random.Random) -> None:
    texts = ["{", "[]", "null", "{}", '{"format_version": 1}', "[" * 100_000, "\0" * 4096, '{"format_version": 1, "a'
             ]  # fmt: skip
    (folder / "manifest.json").write_text(rng.choice(texts))


TABLE: dict[Mutation, int] = {
    flip_bit: 100, flip_bit_of_numbers: 50, truncate: 60, zero_page: 50, append: 30, swap_files: 30, delete_file: 25,
    empty_file: 25, extra_file: 30, older_file: 30, older_files: 20, older_folder: 10, folder_for_a_file: 10,
    edit_manifest: 80, not_a_manifest: 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Three checkpoints of one run."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    for step in (1, 2, 3):
        save_step(CheckpointStore(folder, keep=5), step)
    return folder


def test_at_least_five_hundred_mutations_are_tried():
    assert sum(TABLE.values()) >= 500
    assert min(TABLE.values()) >= 10


@pytest.mark.parametrize("mutate", TABLE, ids=lambda mutate: mutate.__name__)
def test_any_damage_is_found_and_named_and_the_checkpoint_before_is_taken(three, tmp_path, capsys, mutate):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    folder, whole = store.folder / NEWEST, bytes_of(three / NEWEST)
    rng, missed, tried = random.Random(mutate.__name__), [], Counter()
    capsys.readouterr()
    for number in range(TABLE[mutate]):
        mutate(folder, rng)
        assert not all(p.is_file() for p in folder.iterdir()) or bytes_of(folder) != whole, "this changed nothing"
        tried[mutate] += 1
        if not find_damage(folder):
            missed.append(number)
        else:
            with pytest.raises(DataError, match=rf"{NEWEST} is damaged \("):
                open_checkpoint(folder)
            found = store.newest()
            assert found is not None
            assert found.path.name == "step-00000002"
            assert is_complete(found, 2)
            assert not folder.exists()
            shutil.rmtree(store.folder / f"damaged-{NEWEST}")  # it was moved aside
            warning = capsys.readouterr().err
            assert f"{NEWEST} is damaged (" in warning
            assert "going back to the one before" in warning
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(three / NEWEST, folder)
    assert tried[mutate] == TABLE[mutate]
    assert missed == []


def test_of_a_damaged_one_alone_it_is_said_that_there_is_no_other(three, tmp_path, capsys):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    for path in store.all()[:-1]:
        shutil.rmtree(path)
    (store.folder / NEWEST / "weights.safetensors").write_bytes(b"")
    assert store.newest() is None
    assert "there is none before it: beginning anew" in capsys.readouterr().err
    assert (store.folder / f"damaged-{NEWEST}").is_dir()


def test_an_untouched_copy_is_sound(three, tmp_path, capsys):
    """The control of the mutations: it is they that are found, not the copying."""
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    for step in (3, 2, 1):
        path = store.folder / f"step-0000000{step}"
        assert find_damage(path) == []
        assert is_complete(open_checkpoint(path), step)
        newest = store.newest()
        assert newest is not None
        assert newest.path == path
        shutil.rmtree(path)
    assert store.newest() is None
    assert capsys.readouterr().err == ""


def test_safetensors_alone_loads_most_flipped_bits_in_silence(three, tmp_path):
    """Why there are hashes: the same flips, without them."""
    rng, silent = random.Random(0), 0
    whole = (three / NEWEST / "weights.safetensors").read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "weights.safetensors").write_bytes(data)
        with contextlib.suppress(SafetensorError):
            load_file(tmp_path / "weights.safetensors")
            silent += 1
    assert silent > 40


def test_every_single_bit_of_the_manifest_matters(three, tmp_path):
    """Its entries are covered by a digest; what covers the digest, its key and the version?"""
    folder = shutil.copytree(three / NEWEST, tmp_path / NEWEST)
    whole, missed = (folder / "manifest.json").read_bytes(), []
    with (folder / "manifest.json").open("r+b", buffering=0) as file:
        for at, bit in itertools.product(range(len(whole)), range(8)):
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << bit]))
            if not find_damage(folder):
                start = whole.rfind(b"\n", 0, at) + 1
                missed.append((folder / "manifest.json").read_bytes()[start:].split(b"\n")[0])
            file.seek(at)
            file.write(whole[at : at + 1])
    assert find_damage(folder) == []
    assert missed == []


def test_a_manifest_cut_anywhere_is_damaged(three, tmp_path):
    folder = shutil.copytree(three / NEWEST, tmp_path / NEWEST)
    whole, missed = (folder / "manifest.json").read_bytes(), []
    for length in reversed(range(len(whole))):
        os.truncate(folder / "manifest.json", length)
        if not find_damage(folder):
            missed.append(length - len(whole))
    assert missed == []


def test_a_manifest_that_lost_its_digest_does_not_pass_for_one_of_before_there_were_digests(three, tmp_path):
    """A manifest that says whether it is kept for good was written together with a digest."""
    folder = shutil.copytree(three / NEWEST, tmp_path / NEWEST)

    def edit(record):
        del record["digest"]
        record["for_good"] = True

    change_manifest(folder, edit)
    assert find_damage(folder)


@pytest.mark.parametrize(
    "state", [{"step": "3"}, {"step": None}, {"step": -3}, {"step": 3.0}, {"step": [3]}, {"tokens": 3}], ids=str
)
def test_a_checkpoint_whose_state_has_no_number_of_steps_is_damaged(three, tmp_path, state):
    """With hashes that fit: as another program might write it."""
    folder = shutil.copytree(three / NEWEST, tmp_path / NEWEST)
    write_json(folder / "state.json", state)

    def seal(record):
        record["sha256"]["state.json"] = module.sha256_file(folder / "state.json")
        record["digest"] = module._digest(record)

    change_manifest(folder, seal)
    assert find_damage(folder)


def test_damaged_ones_are_passed_over_one_after_the_other(three, tmp_path, capsys):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    for step in (2, 3):
        (store.folder / f"step-0000000{step}" / "state.json").write_text("{}")
    newest = store.newest()
    assert newest is not None
    assert is_complete(newest, 1)
    warnings = capsys.readouterr().err
    assert warnings.index("step-00000003") < warnings.index("step-00000002")
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]
    save_step(store, 2)  # its place is free again
    newest = store.newest()
    assert newest is not None
    assert is_complete(newest, 2)


def test_where_all_are_damaged_there_is_none(three, tmp_path):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    for path in store.all():
        (path / "manifest.json").unlink()
    assert store.newest() is None
    assert store.all() == []


def test_a_disk_that_cannot_be_read_is_no_damage_and_nothing_is_moved_or_removed(three, tmp_path, monkeypatch):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=1)
    before = sorted(path.name for path in store.folder.iterdir())

    def sha256_file(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as broken:
        broken.setattr(module, "sha256_file", sha256_file)
        with pytest.raises(StorageError, match="Input/output error"):
            store.newest()

    def read_json(path):
        raise StorageError(f"cannot use {path}")

    with monkeypatch.context() as broken:
        broken.setattr(module, "read_json", read_json)
        store._remove_old()  # whether one is kept for good cannot be known now
    assert sorted(path.name for path in store.folder.iterdir()) == before
    assert is_complete(store.newest(), 3)


def test_a_step_damaged_twice_replaces_what_was_moved_aside(three, tmp_path):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    for mark in ("first", "second"):
        (store.folder / NEWEST / "state.json").write_text(mark)
        store.newest()
        assert (store.folder / f"damaged-{NEWEST}" / "state.json").read_text() == mark
        save_step(store, 3)


def test_a_damaged_checkpoint_is_refused_where_one_is_asked_for(three, tmp_path):
    run = tmp_path
    shutil.copytree(three, run / "checkpoints")
    (run / "checkpoints" / NEWEST / "average.safetensors").unlink()
    for place, step in ((run, None), (run, 3), (run / "checkpoints" / NEWEST, None)):
        with pytest.raises(DataError, match=r"step-00000003 is damaged \(average\.safetensors\)"):
            find_checkpoint(place, step)
    assert is_complete(find_checkpoint(run, 2), 2)
    assert is_complete(find_checkpoint(run / "checkpoints" / "step-00000001"), 1)
    with pytest.raises(UsageError, match=r"no checkpoint of step 9 \(has: 1, 2, 3\)"):
        find_checkpoint(run, 9)
    with pytest.raises(UsageError, match="is the checkpoint of step 1, not of 2"):
        find_checkpoint(run / "checkpoints" / "step-00000001", 2)
    with pytest.raises(UsageError, match="neither a run folder"):
        find_checkpoint(tmp_path / "nowhere")
    assert (run / "checkpoints" / NEWEST).exists()  # nothing of another's run is moved


def test_weights_of_another_model_are_refused(tmp_path):
    CheckpointStore(tmp_path, 1).save({"step": 1}, {"weights": dict(nn.Linear(3, 4).named_parameters())})
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    for other in (nn.Linear(3, 5), nn.Linear(3, 4, bias=False), nn.Bilinear(3, 3, 4)):
        with pytest.raises(DataError, match="another model"):
            checkpoint.load_weights(other)
    checkpoint.load_weights(nn.Linear(3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------

OPERATIONS = [
    (os, "fsync"), (os, "open"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (Path, "open"), (Path, "mkdir"),
    (Path, "touch"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "chmod"), (Path, "rmdir"),
    (shutil, "rmtree"), (module, "save_file"),
]  # fmt: skip
"""All that changes a folder, and the opening of what is read."""


def lose_what_was_not_flushed(folder: Path, flushed: set[int]) -> None:
    """Cut every file under a folder of which nobody asked that it be on the disk, as a power cut may do it."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_ino not in flushed:
            os.truncate(path, path.stat().st_size // 2)


def killed_at(action: Callable[[], object], folder: Path, number: int, after: bool, power_cut: bool) -> str | None:
    """Run `action` in a process that dies at its `number`-th operation, before or after it; return which that was.

    None: it came to its end before.
    """
    flushed = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    note = folder.with_name("operation")
    note.unlink(missing_ok=True)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return note.read_text() if code == 9 else None
    try:
        calls = iter(range(1, 10**6))
        fsync, low_open, write, close = os.fsync, os.open, os.write, os.close

        def die(name):
            if power_cut:
                lose_what_was_not_flushed(folder, flushed)
            handle = low_open(note, os.O_WRONLY | os.O_CREAT)
            write(handle, name.encode())
            close(handle)
            os._exit(9)

        def counted(name, original):
            def operation(*arguments, **keywords):
                now = next(calls) == number
                if now and not after:
                    die(name)
                try:
                    result = original(*arguments, **keywords)
                finally:
                    if now:
                        die(name)
                if original is fsync:
                    flushed.add(os.fstat(arguments[0]).st_ino)
                return result

            return operation

        for owner, name in OPERATIONS:
            setattr(owner, name, counted(f"{owner.__name__}.{name}", getattr(owner, name)))
        action()
        os._exit(0)
    finally:
        os._exit(1)


def crashes(folder: Path, after: bool, power_cut: bool) -> list[tuple[str, str]]:
    """Kill the saving of step 3 beside 1 and 2 at each operation; return which, and what `newest` found after it."""
    store, found = CheckpointStore(folder, keep=2), []
    save_step(store, 1)
    save_step(store, 2)
    template = shutil.copytree(folder, folder.with_name("template"))
    while True:
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        where = killed_at(lambda: save_step(store, 3), folder, len(found) + 1, after, power_cut)
        if where is None:
            return found
        newest = store.newest()
        step = newest.state["step"] if newest else None
        what = f"{step}" if newest and is_complete(newest, step) else "broken"
        if any(path.name.startswith("damaged") for path in folder.iterdir()):
            what += " and a damaged one"
        found.append((where, what))


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_operation_of_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path, after, power_cut):
    found = crashes(tmp_path / "checkpoints", after, power_cut)
    assert len(found) > 30
    where = {operation for operation, _ in found}
    assert where >= {
        "os.fsync", "os.unlink", "os.rmdir", "Path.open", "Path.replace", "Path.rename", "shutil.rmtree",
        "scionlm.train.checkpoint.save_file",
    }  # fmt: skip
    results = [what for _, what in found]
    assert set(results) == {"2", "3"}
    assert results == sorted(results)  # once the new one is there it stays


def test_without_a_staged_folder_a_kill_would_leave_something_broken(tmp_path, monkeypatch):
    """The control of the kills: written straight to its place, a checkpoint is found half written."""

    @contextlib.contextmanager
    def in_place(out):
        out.mkdir(parents=True)
        yield out

    monkeypatch.setattr(module, "staged_folder", in_place)
    results = Counter(what for _, what in crashes(tmp_path / "checkpoints", after=True, power_cut=False))
    assert results["2 and a damaged one"] > 5


def test_without_flushing_a_power_cut_would_leave_something_broken(tmp_path, monkeypatch):
    """The control of the power cuts: renamed before its files are on the disk, a checkpoint is found cut."""
    monkeypatch.setattr(files, "settle", lambda path: None)
    results = Counter(what for _, what in crashes(tmp_path / "checkpoints", after=False, power_cut=True))
    assert results["2 and a damaged one"] > 0


@pytest.mark.parametrize("number", range(1, 80, 6))
def test_after_a_kill_saving_goes_on_and_nothing_half_written_stays(tmp_path, number):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        save_step(store, step)
    killed_at(lambda: save_step(store, 3), store.folder, number, after=False, power_cut=True)
    newest = store.newest()
    assert newest is not None
    for step in range(newest.state["step"] + 1, 6):
        save_step(store, step)
        found = store.newest()
        assert found is not None
        assert is_complete(found, step)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_kill_while_a_damaged_checkpoint_is_moved_aside_loses_nothing(three, tmp_path):
    folder, number = tmp_path / "checkpoints", 0
    store = CheckpointStore(folder, keep=5)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(three, folder)
        (folder / NEWEST / "state.json").write_text("{}")
        shutil.copytree(folder / NEWEST, folder / f"damaged-{NEWEST}")
        number += 1
        where = killed_at(store.newest, folder, number, after=number % 2 == 0, power_cut=False)
        newest = store.newest()
        assert newest is not None
        assert is_complete(newest, 2)
        save_step(store, 3)
        newest = store.newest()
        assert newest is not None
        assert is_complete(newest, 3)
        if where is None:
            break
    assert number > 12


# ---------------------------------------------------------------------------------------------------------------------
# Which stay
# ---------------------------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_stay_and_those_that_are_for_good(tmp_path, keep):
    store, kept = CheckpointStore(tmp_path, keep), []
    for step in range(1, 11):
        save_step(store, step, for_good=step in (2, 3, 7))
        kept.append(step)
        passing = [one for one in kept if one not in (2, 3, 7)]
        kept = [one for one in kept if one in (2, 3, 7) or one in passing[-keep:]]
        assert names_in(tmp_path) == kept
    newest = store.newest()
    assert newest is not None
    assert is_complete(newest, 10)


def test_steps_are_ordered_as_numbers_and_not_as_text(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (99_999_998, 99_999_999, 100_000_000, 999_999_999, 1_000_000_000):
        store.save({"step": step}, {"weights": {"a": torch.tensor([float(step % 97)])}})
        newest = store.newest()
        assert newest is not None
        assert newest.state["step"] == step
    assert [path.name for path in store.all()] == ["step-999999999", "step-1000000000"]
    assert sorted(path.name for path in store.all()) != [path.name for path in store.all()]  # text would say otherwise
    run = tmp_path / "run"
    shutil.copytree(tmp_path, run / "checkpoints", ignore=shutil.ignore_patterns("run"))
    assert find_checkpoint(run).state["step"] == 1_000_000_000
    assert find_checkpoint(run, 999_999_999).state["step"] == 999_999_999


def test_what_kills_left_is_cleared_away_and_nothing_else(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep=2)
    save_step(store, 1)
    for name in (".step-00000002.abc123.tmp", ".step-00000009.x_y.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-best").mkdir()
    newest = store.newest()
    assert newest is not None
    assert is_complete(newest, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000001", "step-best"]
    assert capsys.readouterr().err == ""


def test_saving_a_step_again_leaves_what_is_there(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    before = bytes_of(save_step(store, 1))
    assert store.save({"step": 1}, {"weights": {"a": torch.zeros(1)}}) == tmp_path / "step-00000001"
    assert bytes_of(tmp_path / "step-00000001") == before


@pytest.mark.parametrize("name", ["step-00000000", "step-1", "step-²"])
def test_a_file_in_the_way_that_is_named_like_a_checkpoint_does_not_stop_a_run(tmp_path, name):
    (tmp_path / name).write_text("not a folder")
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2, 3):
        save_step(store, step)
    newest = store.newest()
    assert newest is not None
    assert is_complete(newest, 3)


def test_a_group_without_tensors_is_left_out(tmp_path):
    CheckpointStore(tmp_path, 1).save({"step": 0}, {"weights": {"a": torch.ones(2)}, "optimizer": {}, "average": {}})
    checkpoint = open_checkpoint(tmp_path / "step-00000000")
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        "manifest.json",
        "state.json",
        "weights.safetensors",
    ]
    assert checkpoint.tensors("optimizer") == checkpoint.tensors("average") == {}


# ---------------------------------------------------------------------------------------------------------------------
# Earlier versions
# ---------------------------------------------------------------------------------------------------------------------


def make_learner(seed: int) -> Learner:
    model = tiny_model(seed=seed, num_hidden_layers=1)
    return Learner(Objective(model, torch.float32), Optimizer(model, OptimizerSettings()), Guard(2))


def learn(learner: Learner, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.objective.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.optimizer.step(1e-3)
    return {name: p.detach().clone() for name, p in learner.objective.model.named_parameters()}


def test_a_checkpoint_of_before_there_were_guards_and_digests_is_gone_on_from_exactly(tmp_path):
    """Its state has `torch_rng` alone, its manifest hashes alone."""
    whole = make_learner(seed=0)
    learn(whole, 1)
    state = {"step": 1, "tokens": 24, "seconds": 0.5, "evaluation_owed": False, "torch_rng": random_state()["cpu"]}
    tensors = {name: some for name, some in whole.tensors().items() if name != "average"}
    path = CheckpointStore(tmp_path, 1).save(state | {"parameters": list(tensors["weights"])}, tensors)
    write_json(path / "manifest.json", {"sha256": read_json(path / "manifest.json")["sha256"]})
    drawn = torch.rand(5)

    second = make_learner(seed=1)
    second.guard.left_out(1, float("nan"), 1.0, "x:1")
    torch.rand(100)
    checkpoint = CheckpointStore(tmp_path, 1).newest()
    assert checkpoint is not None
    second.load(checkpoint)
    assert torch.equal(torch.rand(5), drawn)
    position = Position()
    position.restore(checkpoint.state)
    assert (position.step, position.tokens, position.evaluation_owed, position.cursors) == (1, 24, False, {})
    mine, theirs = learn(second, 2), learn(whole, 2)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert second.guard.skipped == 1  # there was nothing to restore it from
    other = learn(make_learner(seed=1), 2)
    assert not all(torch.equal(other[name], theirs[name]) for name in theirs)  # the control


def test_random_numbers_go_on_from_a_checkpoint_of_today(tmp_path):
    whole = make_learner(seed=0)
    CheckpointStore(tmp_path, 1).save({"step": 0} | whole.state(), whole.tensors())
    drawn = torch.rand(5)
    checkpoint = CheckpointStore(tmp_path, 1).newest()
    assert checkpoint is not None
    assert "torch_rng" not in checkpoint.state
    make_learner(seed=3).load(checkpoint)
    assert torch.equal(torch.rand(5), drawn)
    assert not torch.equal(torch.rand(5), drawn)


def test_a_checkpoint_of_a_newer_scion_is_named_and_stays_where_it_is(three, tmp_path):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=5)
    newer = {"format_version": 2, "files": {}}
    (store.folder / NEWEST / "manifest.json").write_text(json.dumps(newer, indent=2) + "\n")
    for ask in (store.newest, lambda: open_checkpoint(store.folder / NEWEST)):
        with pytest.raises(NewerFormatError, match=r"manifest\.json has format_version 2"):
            ask()
    assert (store.folder / NEWEST).is_dir()
    change_manifest(store.folder / "step-00000002", lambda record: record.update(format_version=2))
    assert find_damage(store.folder / "step-00000002") == ["manifest.json"]  # of ours, one number of it damaged


def test_an_old_checkpoint_is_whole_until_it_is_gone(three, tmp_path, monkeypatch):
    store = CheckpointStore(shutil.copytree(three, tmp_path / "checkpoints"), keep=1)

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store._remove_old()
    assert [find_damage(path) for path in store.all()] == [[], []]
    store.newest()
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]
