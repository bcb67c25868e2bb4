"""Several processes that stay ready to make runs together, as torchrun would start them; see `World`."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import harms
from scionlm.core.config import dump_yaml
from scionlm.core.errors import LostRankError, ScionError
from scionlm.parallel.placing import mesh_of
from scionlm.recipes.config import Recipe
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import Watch, quicken

_PATIENCE_SECONDS = 180


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class World:
    """Processes with everything imported, which make runs together; a context manager.

    Args:
        size: How many.
        per_node: How many of them believe to be on one machine; None is all.
    """

    def __init__(self, size: int, per_node: int | None = None) -> None:
        self.size, self.per_node = size, per_node or size

    def __enter__(self) -> "World":
        self._start()
        return self

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "worlds"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(self.size)
        ]
        self._answers: list[queue.Queue[bytes]] = [queue.Queue() for _ in self._workers]
        self._readers = [
            threading.Thread(target=_read, args=pair, daemon=True)
            for pair in zip(self._workers, self._answers, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            assert worker.stdin
            worker.kill()
            worker.wait()
            worker.stdin.close()
        for reader, worker in zip(self._readers, self._workers, strict=True):
            reader.join()
            assert worker.stdout
            worker.stdout.close()

    def run(
        self,
        recipe: Recipe,
        out: Path,
        stop_at: int | None = None,
        allow_change: bool = False,
        only: int = 1,
        harm: str | None = None,
    ) -> list[dict[str, Any]]:
        """Run a recipe together; return what each rank has to say: its batches, and its error if there was one.

        Args:
            recipe: What to run.
            out: Where.
            stop_at: The number of the batch in which rank `only` gets a SIGTERM.
            allow_change: See `run_recipe`.
            only: Which rank is told to stop, or harmed.
            harm: What goes wrong there; see `harms`.
        """
        path = out.with_name(f"{out.name}.yaml")
        path.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
        port = free_port()
        for rank, worker in enumerate(self._workers):
            order = {
                "recipe": str(path), "out": str(out), "stop_at": stop_at if rank == only else None,
                "allow_change": allow_change, "harm": harm, "mine": rank == only,
                "environment": {
                    "RANK": rank, "WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "LOCAL_RANK": rank % self.per_node, "LOCAL_WORLD_SIZE": self.per_node,
                },
            }  # fmt: skip
            assert worker.stdin
            worker.stdin.write(json.dumps(order).encode() + b"\n")
            worker.stdin.flush()
        answers = [self._answer(rank) for rank in range(self.size)]
        if any(answer.get("broken") for answer in answers):
            self._end()
            self._start()
        return answers

    def _answer(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads(self._answers[rank].get(timeout=_PATIENCE_SECONDS) or '{"error": "died", "broken": true}')
        except queue.Empty:
            return {"error": "hangs", "broken": True}


def _read(worker: subprocess.Popen[bytes], answers: "queue.Queue[bytes]") -> None:
    """Put what a worker answers into a queue, and nothing when it has ended."""
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith(b"{"):
            answers.put(line)
    answers.put(b"")


def _serve_one(order: dict[str, Any]) -> dict[str, Any]:
    os.environ.update({name: str(value) for name, value in order["environment"].items()})
    mesh_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        harms.done.clear()
        if order["harm"]:
            getattr(harms, order["harm"])(patch, order["mine"])
        watch = Watch(patch, [order["stop_at"]] if order["stop_at"] else [])
        answer: dict[str, Any] = {"error": None}
        try:
            run_recipe(load_recipe(order["recipe"]), Path(order["out"]), order["allow_change"])
        except BaseException as error:
            traceback.print_exc()
            told = getattr(error, "told", False)
            broken = not isinstance(error, ScionError) or isinstance(error, LostRankError)
            broken = broken or not (told or order["environment"]["RANK"] == 0)  # the others do not know of it
            answer = {"error": type(error).__name__, "message": str(error), "broken": broken, "told": told}
        rows = [[row.hex() for row in batch] for batch in watch.rows()]
        samples = [[tuple(sample) for sample in step] for step in watch.samples]
        return answer | {"rows": rows, "samples": samples, "harmed": harms.done["harm"]}


def _serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 - what every run would import

    torch.set_num_threads(1)
    for line in sys.stdin:
        answer = _serve_one(json.loads(line))
        print("\n" + json.dumps(answer), flush=True)
        if answer.get("broken"):
            os._exit(1)  # as a process of torchrun's would end: the others notice


if __name__ == "__main__":
    _serve()
