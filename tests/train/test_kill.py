"""Runs that are killed, at any moment and by any write: gone on with until done, they are the run never disturbed."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from factories import model_folder
from scionlm.core.config import dump_yaml
from scionlm.core.records import read_json, read_jsonl
from scionlm.recipes.config import Recipe
from scionlm.train.checkpoint import CheckpointStore, find_damage
from whole_runs import Server, differing, outcome, recipe_of

# Everything that has a state of its own: dropout, a ramp, replay of an earlier stage, an average, another optimizer.
FEATURES = {
    "average": {"method": "ema", "decay": 0.5},
    "checkpoint.every": 2,
    "checkpoint.keep": 2,
    "evaluate.every": 4,
    "stages": [
        {"name": "a", "train": {"steps": 5}, "data": {"ramp": {"start": {"alpha": 1.0}, "over": 4}}},
        {"name": "b", "train": {"steps": 4}, "replay": {"stage": "a", "fraction": 0.25}, "optimizer_state": "moments"},
    ],
}


KINDS = (
    "replace", "rename", "rmtree", "mkdir", "save_file", "save_model", "_open_stage", "change_optimizer", "rewind",
    "record", "write",
)  # fmt: skip


class Case(NamedTuple):
    """A recipe, its undisturbed run, how long that took, and the moments at which it could have died."""

    path: Path
    recipe: Recipe
    expected: dict
    seconds: float
    moments: list[str]


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def case(server, tmp_path_factory, data_folder) -> Case:
    root = tmp_path_factory.mktemp("kills")
    recipe = recipe_of(model_folder(root / "source", attention_dropout=0.1), data_folder.path, **FEATURES)
    path = root / "recipe.yaml"
    path.write_text(dump_yaml(recipe.model_dump(mode="json", exclude_unset=True)))
    for _ in range(2):  # the first one is slower
        shutil.rmtree(root / "whole", ignore_errors=True)
        started = time.monotonic()
        assert server.run(path, root / "whole", count_into=root / "moments.json") == 0
        seconds = time.monotonic() - started
    moments = json.loads((root / "moments.json").read_text())
    return Case(path, recipe, outcome(root / "whole", recipe), seconds, moments)


def look_around(out: Path) -> None:
    """Check that what a death has left is what any program may read."""
    for path in out.rglob("*.json"):
        if not any(part.startswith(".") for part in path.relative_to(out).parts):
            read_json(path) if path.parent.name != "model" else json.loads(path.read_text())
    for path in out.rglob("*.jsonl"):
        read_jsonl(path)
    for folder in (out / "checkpoints").glob("step-*"):
        assert find_damage(folder) == []
    if (out / "status.json").exists():
        assert read_json(out / "status.json")["state"] in ("running", "done")


def kill_at_random(server: Server, case: Case, root: Path, wanted: int, seed: int) -> list[int]:
    """Kill runs until there were so many kills, at several stages of a run; return the newest checkpoint at each."""
    rng = random.Random(seed)
    steps: list[int] = []
    folders = 0

    def more() -> bool:
        return len(steps) < wanted or len(set(steps)) < 4

    while more():
        out = root / str(folders)
        folders += 1
        while True:
            again = more()
            delay = rng.uniform(0.05, 0.9) * case.seconds if again else None
            code = server.run(case.path, out, kill_after=delay)
            if code == 0:
                break
            assert code == -9, out.with_name(f"{out.name}.log").read_text()
            if out.exists():
                look_around(out)
            saved = CheckpointStore(out / "checkpoints", 1).all()
            steps.append(int(saved[-1].name[5:]) if saved else -1)
        assert differing(outcome(out, case.recipe), case.expected) == set()
    return steps


def test_a_dozen_kills_at_random_times_change_nothing(server, case, tmp_path):
    steps = kill_at_random(server, case, tmp_path, 12, seed=4)
    assert len(steps) >= 12


@pytest.mark.slow
def test_a_hundred_kills_at_random_times_change_nothing(server, case, tmp_path):
    steps = kill_at_random(server, case, tmp_path, 100, seed=11)
    assert len(steps) >= 100


def die_and_go_on(server: Server, case: Case, out: Path, number: int, **how: bool) -> None:
    assert server.run(case.path, out, die_at=number, **how) == 9
    if out.exists():
        look_around(out)
    assert server.run(case.path, out) == 0
    assert differing(outcome(out, case.recipe), case.expected) == set(), (number, case.moments[number - 1], how)
    shutil.rmtree(out)


def test_there_is_every_kind_of_moment_to_die_at(case):
    assert len(case.moments) > 60
    assert set(KINDS) <= set(case.moments)


@pytest.mark.slow
def test_a_death_between_two_writes_changes_nothing(server, case, tmp_path):
    """At every third of them and one of each kind; dying before one leaves what dying after the last one does."""
    every_kind = {case.moments.index(kind) + 1 for kind in KINDS}
    points = sorted({*range(1, len(case.moments) + 1, 3)} | every_kind)
    assert len(points) > 25
    for number in points:
        die_and_go_on(server, case, tmp_path / "run", number)


@pytest.mark.slow
def test_a_death_before_or_after_each_write_or_within_a_line_changes_nothing(server, case, tmp_path):
    for number, moment in enumerate(case.moments, start=1):
        die_and_go_on(server, case, tmp_path / "run", number)
        die_and_go_on(server, case, tmp_path / "run", number, after=True)
        if moment == "write":
            die_and_go_on(server, case, tmp_path / "run", number, torn=True)


def test_a_line_that_a_death_tore_is_written_again(server, case, tmp_path):
    numbers = [number for number, moment in enumerate(case.moments, start=1) if moment == "write"]
    for number in numbers[:: len(numbers) // 4]:
        die_and_go_on(server, case, tmp_path / "run", number, torn=True)


@pytest.mark.parametrize("moment", ["save_file", "save_model", "rename"])
def test_what_a_death_left_half_written_is_cleared_away(server, case, tmp_path, moment):
    """It can be as large as the model."""
    out = tmp_path / "run"
    last = max(number for number, name in enumerate(case.moments, start=1) if name == moment)
    assert server.run(case.path, out, die_at=last) == 9
    assert [path.name for path in out.rglob(".*.tmp")], "there is something to clear away"
    assert server.run(case.path, out) == 0
    assert [path.name for path in out.rglob(".*.tmp")] == []


def test_a_death_while_going_on_after_a_death_changes_nothing(server, case, tmp_path):
    """Where a run that goes on puts its records in order, and in the stage that it goes on with."""
    out = tmp_path / "run"
    assert server.run(case.path, out, die_at=case.moments.index("change_optimizer") + 1) == 9
    lives = 1
    while server.run(case.path, out, die_at=lives, after=lives % 2 == 0) == 9:
        look_around(out)
        lives += 1
        assert lives < 60, "each life gets further than the one before"
    assert lives > 20
    assert differing(outcome(out, case.recipe), case.expected) == set()


@pytest.mark.parametrize("lost", ["optimizer", "average"])
def test_a_checkpoint_that_had_lost_something_would_show(server, case, tmp_path, lost):
    """Negative control: the comparisons above see a state that is not quite the one that was saved."""
    out = tmp_path / "run"
    last = max(number for number, moment in enumerate(case.moments, start=1) if moment == "save_file")
    assert server.run(case.path, out, die_at=last) == 9
    store = CheckpointStore(out / "checkpoints", 9)
    saved = store.newest()
    assert saved is not None
    tensors = {part: saved.tensors(part) for part in ("weights", "optimizer", "average")}
    name = next(name for name, tensor in tensors[lost].items() if tensor.ndim)
    tensors[lost][name] = torch.zeros_like(tensors[lost][name])
    for_good = read_json(saved.path / "manifest.json")["for_good"]
    shutil.rmtree(saved.path)
    again = store.save(saved.state, tensors, for_good)
    assert find_damage(again) == []
    assert server.run(case.path, out) == 0
    assert "weights" in differing(outcome(out, case.recipe), case.expected)
