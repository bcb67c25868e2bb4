"""R3: ranks that torchrun started are killed, one, all, or torchrun itself; the run goes on as if nothing had been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scionlm.core.config import dump_yaml
from scionlm.core.records import read_json
from whole_runs import differing, outcome
from worlds import free_port

STEPS = 120  # of which the first kill, soon after the fifth, leaves most to do


def start(recipe: Path, out: Path, program: tuple[str, ...] = ("-m", "scionlm")) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), *program, "run", str(recipe), "-o", str(out)]  # fmt: skip
    with Path(f"{out}.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers_of(launcher: int) -> dict[int, int]:
    """Return the processes that a launcher has started, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int(re.search(r"\nPPid:\t(\d+)", (entry / "status").read_text())[1])
            words = (entry / "environ").read_bytes()
        except (OSError, TypeError):
            continue
        rank = re.search(rb"\0RANK=(\d+)", words)
        if parent == launcher and rank:
            found[int(rank[1])] = int(entry.name)
    return found


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


def kill_once(recipe: Path, out: Path, kind: str, delay: float) -> list[int]:
    """Start a run, kill some of it a while after a new checkpoint is there, and return what; nobody stays behind."""
    before = checkpoints(out)
    launcher = start(recipe, out)
    assert wait_for(lambda: checkpoints(out) != before or launcher.poll() is not None, 300)
    time.sleep(delay)
    ranks = workers_of(launcher.pid)
    if launcher.poll() is not None:
        killed = []
    elif kind == "launcher":
        killed = [launcher.pid]
    else:
        killed = [process for rank, process in ranks.items() if kind in ("all", str(rank))]
    for process in killed:
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    launcher.wait(40)
    assert wait_for(lambda: not any(map(is_alive, ranks.values())), 10), "a rank was left behind"
    assert time.monotonic() - began < 30
    assert (launcher.returncode != 0) == bool(killed)
    return killed


def kill_and_compare(make, tmp_path, kinds, layout, seed):
    recipe = make("ema", train__parallel=layout, train__steps=STEPS, checkpoint__every=5, evaluate__every=20)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    delays = random.Random(seed)
    killed = [kill_once(path, tmp_path / "run", kind, delays.uniform(0, 0.3)) for kind in kinds]
    assert killed[0]  # the later ones may come when all is done
    for name in ("run", "whole"):
        assert start(path, tmp_path / name).wait(300) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    assert differing(outcome(tmp_path / "whole", recipe), outcome(tmp_path / "run", recipe)) == set()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_killed_ranks_are_gone_on_with_to_the_bit(make, tmp_path):
    kill_and_compare(make, tmp_path, ["1"], "fsdp", 0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ranks_five_times(layout, seed, make, tmp_path):
    kill_and_compare(make, tmp_path, ["0", "1", "all", "launcher", "1"], layout, seed)


def test_one_rank_speaks(tmp_path, make):
    recipe = make(train__steps=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    assert start(path, tmp_path / "run").wait(90) == 0
    said = (tmp_path / "run.log").read_text()
    assert said.count("report: ") == 1
    assert said.count("inherited layers") == 1
    path.write_text(path.read_text().replace("steps: 2", "stps: 2"), encoding="utf-8")
    assert start(path, tmp_path / "other").wait(90) != 0
    assert (tmp_path / "other.log").read_text().count("error: ") == 1


HARMED = """
import os, sys
sys.path.insert(0, {tests!r})
import harms, pytest
from scionlm.cli.main import main
harms.broken_data(pytest.MonkeyPatch(), os.environ["RANK"] == "1")
main()
"""


@pytest.mark.slow  # what it says and ends with is test_worlds' too; here torchrun has started it
def test_a_rank_that_fails_by_itself_is_heard(make, tmp_path):
    path, program = tmp_path / "recipe.yaml", tmp_path / "harmed.py"
    path.write_text(dump_yaml(make(train__parallel="ddp").model_dump(mode="json")), encoding="utf-8")
    program.write_text(HARMED.format(tests=str(Path(__file__).parents[1])), encoding="utf-8")
    assert start(path, tmp_path / "run", (str(program),)).wait(90) != 0
    said = (tmp_path / "run.log").read_text()
    assert 1 <= said.count("error: rank 1: what it reads is broken") <= 2
    assert "another process of this run is gone" not in said
    assert read_json(tmp_path / "run" / "status.json")["message"] == "rank 1: what it reads is broken"


def test_a_signal_to_the_launcher_stops_and_saves(make, tmp_path):
    recipe = make(train__parallel="fsdp", train__steps=2000, checkpoint__every=5)
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    launcher = start(path, out)
    assert wait_for(lambda: len(checkpoints(out)) > 0, 90)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) != 0
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert checkpoints(out)[-1] == f"step-{status['step']:08d}"
