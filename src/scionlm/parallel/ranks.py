"""The processes of a run, and what they tell each other: small values as JSON, over gloo, whatever the weights go by.

One of them, the main rank, writes the run folder and speaks to the user; all do the same things in the same order.
torch is imported only where there is more than one process.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from scionlm.core import errors, log
from scionlm.core.errors import LostRankError, ScionError
from scionlm.core.files import storage_error

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # others wait while the main rank cuts, hashes or loads; a dead one is noticed at once
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


class Ranks:
    """The processes of a run; this class itself is the only process of one.

    Attributes:
        rank: Number of this process; 0 is the main one.
        world: How many there are.
        local_rank: Number of this process on its machine.
        local_world: How many there are on its machine.
    """

    rank = 0
    world = 1
    local_rank = 0
    local_world = 1
    group: Any = None
    """torch's process group of these ranks, for libraries that need one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, by rank. Values are what JSON can hold."""
        return [value]

    def share(self, value: T) -> T:
        """Return the main rank's value."""
        return value

    def apart(self) -> "Ranks":
        """Return the same ranks on lines of their own: for a thread beside the training."""
        return self

    def close(self) -> None:
        """Leave."""

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main rank do something and return its result on all; its failure is raised on all.

        The result has to be something that JSON can hold. An OSError becomes a StorageError.
        """
        if self.world == 1:
            return work()
        outcome: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.is_main:
            try:
                outcome = {"result": work()}
            except BaseException as error:
                failure = _explained(error)
                outcome = _as_json(failure)
        outcome = self.share(outcome)
        if failure is not None:
            raise failure
        if "error" in outcome:
            raise _from_json(outcome)
        return cast("T", outcome["result"])

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank; where it fails on any, raise the first failure on all.

        An OSError becomes a StorageError.
        """
        if self.world == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = _explained(error)
        outcomes = self.gather(_as_json(failure) if failure else None)
        if failure is not None and outcomes[0] is not None and self.is_main:
            raise failure
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                raise _from_json(outcome, f"rank {rank}: " if rank else "")
        return cast("T", result)

    def block_of(self, items: Sequence[T]) -> tuple[Sequence[T], int]:
        """Return this rank's block of items that are dealt out in order, and how many the largest block has."""
        size = -(-len(items) // self.world)
        return items[self.rank * size : (self.rank + 1) * size], size


ALONE = Ranks()


class _Launched(Ranks):
    """The ranks that torchrun has started."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_rank, self.local_world = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))

    def gather(self, value: T) -> list[T]:
        import torch
        import torch.distributed as dist

        mine = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.group)
        longest = max(int(size) for size in sizes)
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        dist.all_gather(found, padded, group=self.group)
        pairs = zip(found, sizes, strict=True)
        return [json.loads(tensor[: int(size)].numpy().tobytes()) for tensor, size in pairs]

    def share(self, value: T) -> T:
        import torch
        import torch.distributed as dist

        mine = _to_bytes(value if self.is_main else None)
        size = torch.tensor([len(mine)])
        dist.broadcast(size, 0, group=self.group)
        text = mine if self.is_main else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.group)
        return value if self.is_main else json.loads(text.numpy().tobytes())

    def apart(self) -> Ranks:
        import torch.distributed as dist

        return _Launched(dist.new_group(backend="gloo", timeout=_PATIENCE))

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _to_bytes(value: object) -> Any:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def is_launched() -> bool:
    """Return whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in _LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


def tells_the_user() -> bool:
    """Return whether this process is the one of a run that prints what came out."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined() -> Generator[Ranks, None, None]:
    """Join the other processes of a run, where torchrun has started some, and leave them at the end."""
    if not is_launched():
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    _die_with_parent()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    ranks = _Launched(dist.new_group(backend="gloo", timeout=_PATIENCE))
    with log.silenced(not ranks.is_main):
        try:
            yield ranks
        except ScionError as error:
            error.told = not ranks.is_main
            raise
        finally:
            ranks.close()


@contextlib.contextmanager
def naming_losses(ranks: Ranks) -> Generator[None, None, None]:
    """Say in words what it means when the lines to another process break.

    Raises:
        LostRankError: One of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world == 1 or not any(word in text for word in ("gloo", "NCCL", "Connection", "peer")):
            raise
        raise LostRankError(
            "another process of this run is gone; the last checkpoint is sound: the same command goes on from there"
        ) from error


def _die_with_parent() -> None:
    """Have the system end this process when the one that started it dies: else it would wait for the others forever."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _explained(error: BaseException) -> BaseException:
    """Return a failure as every rank gets it: of the disk, as Scion's own error, which is waited out where it can be."""
    if not isinstance(error, OSError):
        return error
    explained = storage_error(error, Path(error.filename or "the output"))
    explained.__cause__ = error
    return explained


def _as_json(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _from_json(outcome: dict[str, Any], where: str = "") -> BaseException:
    """Return another rank's failure, as far as Scion knows its kind."""
    kind = getattr(errors, outcome["error"], None)
    if isinstance(kind, type) and issubclass(kind, ScionError):
        return kind(f"{where}{outcome['message']}")
    return ScionError(f"{where}{outcome['error']}: {outcome['message']}")
