"""Whole runs on tiny models: stopped, killed and gone on with, and what is compared of them.

`python -m whole_runs` serves runs from forks of one process, so that a kill costs no import; see `Server`.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch

from scionlm.core.errors import StoppedError
from scionlm.core.records import JsonlWriter, read_json, read_jsonl
from scionlm.data import Batch, Ledger, Sample, SamplePlan
from scionlm.data.mixing.ledger import read_consumed
from scionlm.parallel import placing
from scionlm.recipes import child, training
from scionlm.recipes import run as run_module
from scionlm.recipes.config import Recipe
from scionlm.recipes.order import stage_folder
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.surgery.proof import Proof
from scionlm.surgery.surgery import open_surgery
from scionlm.train import checkpoint as checkpoint_module
from scionlm.train import step as step_module
from scionlm.train.learner import Learner
from scionlm.train.metrics import Metrics

SEQ_LEN, SEQUENCES = 24, 4
SETTINGS: dict[str, Any] = {
    "data.mixture": {"alpha": 0.5, "beta": 0.5},
    "data.seq_len": SEQ_LEN,
    "inherit.layers": 2,
    "train.steps": 8,
    "train.global_batch_tokens": SEQ_LEN * SEQUENCES,
    "train.precision": "fp32",
    "optimizer.lr": 3e-3,
    "evaluate.tokens_per_domain": 48,
    "evaluate.every": 3,
}
CLOCKS = {
    "time/elapsed_s", "time/evaluation_s", "speed/tokens_per_s", "speed/data_share", "speed/mfu", "memory/peak_bytes",
    "seconds", "tokens_per_s", "peak_memory_bytes", "checkpoint_seconds", "evaluation_seconds", "saving_seconds",
    "samples", "peak_flops", "teacher_seconds", "speed/teacher_share",
}  # fmt: skip
"""What may differ between a run that was stopped and one that was not; and what `quicken` leaves out."""


def quicken(setattr_: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave out what takes most of a tiny run's time and decides nothing in it."""
    setattr_(training, "peak_flops", lambda runtime: None)
    setattr_(os, "fsync", lambda handle: None)  # a process that is killed takes nothing of the system's memory with it
    setattr_(placing, "gc", SimpleNamespace(collect=lambda: None))

    def samples(its_setting: Any, model: Any) -> list[dict[str, Any]]:
        return [{"domain": name, "prompt": "", "text": ""} for name in its_setting.held_out]

    setattr_(child, "samples_of", samples)
    setattr_(run_module, "git_commit", lambda: "0" * 40)

    @contextlib.contextmanager
    def unproven(folders: Any, plan: Any) -> Iterator[Any]:
        with open_surgery(folders, plan) as surgery:
            yield SimpleNamespace(build=surgery.build, prove=lambda target: Proof())

    setattr_(child, "open_surgery", unproven)


def recipe_of(source: Path, data: Path, /, **settings: Any) -> Recipe:
    """Return a recipe; `__` stands for the dot in a key."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("inheritune", SETTINGS | {"source": str(source), "data.dir": str(data)} | changes)


class Watch:
    """Sees what every step of a run trains on; may end it in the middle of one.

    Attributes:
        batches: The batch of each step.
        samples: And what it was made of.
        stop_at: Numbers of batches, over all runs that are watched, that a SIGTERM comes in.
    """

    def __init__(self, patch: Any, stop_at: Iterable[int] = ()) -> None:
        self.batches: list[Batch] = []
        self.samples: list[list[Sample]] = []
        self.stop_at = set(stop_at)
        micro_batches, take = step_module.micro_batches, SamplePlan.take

        def watched(batch: Batch, size: int) -> Any:
            self.batches.append(batch)
            if len(self.batches) in self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return micro_batches(batch, size)

        def taking(plan: SamplePlan, count: int) -> list[Sample]:
            self.samples.append(take(plan, count))
            return self.samples[-1]

        patch.setattr(step_module, "micro_batches", watched)
        patch.setattr(SamplePlan, "take", taking)

    def rows(self) -> list[list[bytes]]:
        """Return the tokens of each sequence of each step, labels included."""
        return [
            [ids.tobytes() + labels.tobytes() for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
            for batch in self.batches
        ]


def timeless(value: Any) -> Any:
    """Return a record without what clocks measured."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in CLOCKS}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def weights_of(out: Path) -> bytes:
    """Return the exported weights of a run."""
    return (out / "model" / "model.safetensors").read_bytes()


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without clocks."""
    return timeless(read_jsonl(out / "metrics.jsonl"))


def column(out: Path, key: str) -> list[Any]:
    """Return one metric of each line that has it."""
    return [line[key] for line in read_jsonl(out / "metrics.jsonl") if key in line]


def consumed_of(out: Path, recipe: Recipe) -> dict[str, list[tuple[str, int]]]:
    """Return the samples that each stage's ledger says were consumed, in order."""
    found = {}
    for stage in recipe.resolved_stages:
        consumed = read_consumed(stage_folder(out, stage.name))
        in_order = consumed.samples()
        found[stage.name] = [tuple(next(in_order)) for _ in range(consumed.num_samples)]
    return found


def last_state(out: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the newest checkpoint: its record without clocks, and every tensor."""
    folder = max((out / "checkpoints").glob("step-*"))
    tensors = {
        f"{path.name}/{name}": tensor.numpy().tobytes()
        for path in folder.rglob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    return timeless(read_json(folder / "state.json")), tensors


def outcome(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Return all of a finished run that no stop may change."""
    state, tensors = last_state(out)
    return {
        "weights": weights_of(out),
        "metrics": metrics_of(out),
        "consumed": consumed_of(out, recipe),
        "result": timeless(read_json(out / "result.json")),
        "state": state,
        "tensors": tensors,
        "status": read_json(out / "status.json"),
    }


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """Return which parts of two outcomes are not the same."""
    assert mine.keys() == theirs.keys()
    return {key for key in mine if mine[key] != theirs[key]}


def run_stopped(recipe: Recipe, out: Path, watch: Watch) -> int:
    """Run until done, beginning again after every stop; return how many there were."""
    for stops in range(len(watch.stop_at) + 1):
        try:
            run_recipe(recipe, out)
        except StoppedError:
            continue
        return stops
    raise AssertionError("it was stopped more often than it was asked to")


# Where a process can die: before each of these and after it. (place, attribute).
_POINTS: list[tuple[Any, str]] = [
    (Path, "replace"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (checkpoint_module, "save_file"),
    (training, "save_model"),
    (training, "_open_stage"),
    (Learner, "change_optimizer"),
    (Learner, "load"),
    (Ledger, "rewind"),
    (Ledger, "record"),
    (Metrics, "rewind"),
    (JsonlWriter, "write"),
]


def die_at(number: int, after: bool, torn: bool = False) -> list[str]:
    """Make this process die at the `number`-th moment that matters; return the list that their names go into.

    Args:
        number: Which; 0 never dies.
        after: After it, not before.
        torn: A line that is being appended is written by half.
    """
    names: list[str] = []

    def dying(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            names.append(name)
            mine = len(names) == number
            if mine and torn and name == "write":
                with arguments[0]._path.open("ab") as file:
                    file.write(json.dumps(arguments[1]).encode()[:-7])
            if mine and not after:
                os._exit(9)
            result = original(*arguments, **keywords)
            if mine:
                os._exit(9)
            return result

        return wrapped

    for place, attribute in _POINTS:
        setattr(place, attribute, dying(getattr(place, attribute), attribute))
    return names


def _serve_one(order: dict[str, Any]) -> int:
    sys.stderr = Path(f"{order['out']}.log").open("a", buffering=1)  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    quicken()
    names = die_at(order["die_at"], order["after"], order["torn"])
    run_recipe(load_recipe(order["recipe"]), Path(order["out"]))
    if order["count_into"]:
        Path(order["count_into"]).write_text(json.dumps(names))
    return 0


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _serve_one(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Server:
    """A process that has everything imported and makes each run in a fork of itself; a context manager.

    It never computes anything itself, so that no thread of torch stands between it and its forks.
    """

    def __enter__(self) -> "Server":
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "whole_runs"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def _line(self, seconds: float | None = None) -> int | None:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            return None
        text = b""
        while not text.endswith(b"\n"):
            one = os.read(out.fileno(), 1)  # not more: what `select` cannot see must not wait in a buffer
            assert one, "the server has died"
            text += one
        return int(text)

    def run(
        self,
        recipe: Path,
        out: Path,
        kill_after: float | None = None,
        die_at: int = 0,
        after: bool = False,
        torn: bool = False,
        count_into: Path | None = None,
    ) -> int:
        """Run in a process of its own and return its exit code; a SIGKILL comes after `kill_after` seconds."""
        order = {
            "recipe": str(recipe), "out": str(out), "die_at": die_at, "after": after, "torn": torn,
            "count_into": str(count_into or ""),
        }  # fmt: skip
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()
        child = self._line()
        assert child
        code = self._line(kill_after)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = self._line()
        assert code is not None
        return code


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401 - what every fork would import
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # and what it would compile
    _serve()
