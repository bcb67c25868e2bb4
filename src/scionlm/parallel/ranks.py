"""The processes of a run, and what they tell each other: small values as JSON, over gloo, whatever the weights go by.

One of them, the main rank, writes the run folder and speaks to the user; all do the same things in the same order.
torch is imported only where there is more than one process.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from scionlm.core import errors, log
from scionlm.core.errors import LostRankError, ScionError, StorageError, UsageError, exit_code_of
from scionlm.core.files import storage_error

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # others wait while the main rank cuts, hashes or loads; a dead one is noticed at once
# A rank that fails waits so long for the main one to fail with the same. It has to wait: as soon as a process ends,
# torchrun ends the others, and the main one would not come to say why.
_MAIN_SPEAKS_SECONDS = 5.0
# What torch and NCCL say where the other end of a line is gone, and nowhere else, in lower case.
_GONE = ("remote process exit", "connection closed", "connection reset", "abort", "timeout", "timed out", "timing out")
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

    def last_words(self, error: Exception) -> Exception:
        """Return what a process that fails ends with, after leaving word of it for the others."""
        return error

    def failed(self) -> BaseException | None:
        """Return what another process has failed with by itself, if one has left word of it."""
        return None

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main rank do something and return its result on all; its failure is raised on all.

        The result has to be something that JSON can hold. An OSError becomes a StorageError.
        """
        if self.world == 1:
            return _alone(work)
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
            raise self._of_another(outcome)
        return cast("T", outcome["result"])

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank; where it fails on any, raise the first failure on all.

        An OSError becomes a StorageError.
        """
        if self.world == 1:
            return _alone(work)
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = _explained(error)
        outcomes = self.gather(_as_json(failure) if failure else None)
        if failure is not None and self.is_main:
            raise failure
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                raise self._of_another(outcome, rank)
        return cast("T", result)

    def _of_another(self, outcome: dict[str, Any], rank: int = 0) -> ScionError:
        """Return a rank's failure for all to end with; the main one says it to the user."""
        error = _from_json(outcome, rank)
        error.told = not self.is_main
        return error

    def block_of(self, items: Sequence[T]) -> tuple[Sequence[T], int]:
        """Return this rank's block of items that are dealt out in order, and how many the largest block has."""
        size = -(-len(items) // self.world)
        return items[self.rank * size : (self.rank + 1) * size], size


ALONE = Ranks()


class _Launched(Ranks):
    """The ranks that torchrun has started."""

    def __init__(self, group: Any, store: Any) -> None:
        import torch.distributed as dist

        self.group, self._store = group, store
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

        return _Launched(dist.new_group(backend="gloo", timeout=_PATIENCE), self._store)

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def last_words(self, error: Exception) -> Exception:
        import torch.distributed as dist

        told = getattr(error, "told", False)
        if self.is_main or not (told or isinstance(error, LostRankError)):
            with contextlib.suppress(RuntimeError):  # nobody is there to read it
                self._store.set(_word_of(self.rank), json.dumps(_as_json(_explained(error))))
        if self.is_main:
            return error
        try:
            self._store.wait([_word_of(0)], timedelta(seconds=_MAIN_SPEAKS_SECONDS))
        except dist.DistStoreError:  # it knows of nothing: only this rank can say it
            if not told:
                return _from_json(_as_json(_explained(error)), self.rank)
        except RuntimeError:  # gone, and with it what it was told
            pass
        error.told = True  # pyright: ignore[reportAttributeAccessIssue]
        return error

    def failed(self) -> BaseException | None:
        with contextlib.suppress(RuntimeError):
            for rank in range(1, self.world):
                if self._store.check([_word_of(rank)]):
                    return self._of_another(json.loads(self._store.get(_word_of(rank))), rank)
        return None


def _to_bytes(value: object) -> Any:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def is_launched() -> bool:
    """Return whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in _LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


def tells_the_user() -> bool:
    """Return whether this process is the one of a run that prints what came out."""
    return not is_launched() or os.environ["RANK"] == "0"


def leave_to_main(error: ScionError) -> None:
    """Let the main rank say what all have failed with before they have joined."""
    error.told = not tells_the_user()
    if error.told:
        time.sleep(_MAIN_SPEAKS_SECONDS)


@contextlib.contextmanager
def joined(on_own_failure: Callable[[Exception], None] = lambda error: None) -> Generator[Ranks, None, None]:
    """Join the other processes of a run, where torchrun has started some, and leave them at the end.

    Args:
        on_own_failure: Called with what a rank other than the main one fails with by itself: the main one may be in the
            middle of a computation that waits for it, and never come to say it.

    Raises:
        UsageError: This machine has GPUs, but fewer than processes.
    """
    if not is_launched():
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        _check_gpus(torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _die_with_parent()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore("groups", store), rank=rank, world_size=world)
    ranks = _Launched(dist.new_group(backend="gloo", timeout=_PATIENCE), PrefixStore("words", store))
    with log.silenced(not ranks.is_main), _leaving(ranks, on_gpus):
        try:
            yield ranks
        except Exception as error:
            words = ranks.last_words(error)
            if words is error:
                raise
            if not isinstance(words, LostRankError):
                on_own_failure(words)
            raise words from error


@contextlib.contextmanager
def _leaving(ranks: Ranks, on_gpus: bool) -> Generator[None, None, None]:
    """Leave the others at the end; after a failure on GPUs without a word to NCCL.

    To close NCCL is to wait for what it was given, and the others are in the middle of it, waiting for this process: it
    would never end, and torchrun never end the others. So it stays open, and the process ends, once its error has been
    printed, without taking anything down.
    """
    try:
        yield
    except BaseException as error:
        if on_gpus:
            atexit.register(_end, exit_code_of(error))
        else:
            ranks.close()
        raise
    ranks.close()


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _check_gpus(count: int) -> None:
    """Refuse more processes on this machine than it has GPUs; its first one says so."""
    wanted = int(os.environ["LOCAL_WORLD_SIZE"])
    if count >= wanted:
        return
    error = UsageError(
        f"{wanted} processes were started on a machine with {count} GPU{'s' * (count != 1)}: each needs its own; lower "
        '--nproc-per-node, or put CUDA_VISIBLE_DEVICES="" before the command to compute on the processor'
    )
    error.told = os.environ["LOCAL_RANK"] != "0"
    if error.told:
        time.sleep(_MAIN_SPEAKS_SECONDS)
    raise error


@contextlib.contextmanager
def naming_losses(ranks: Ranks) -> Generator[None, None, None]:
    """Say in words what it means when the lines to another process break.

    Raises:
        LostRankError: One of them is gone.
        StorageError: NCCL has failed by itself.
        ScionError: One of them has failed by itself, with this.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world == 1 or not any(word in text for word in ("gloo", "NCCL", "Connection", "peer")):
            raise
        failure = ranks.failed()
        if failure is None and "NCCL" in text and not any(word in text.lower() for word in _GONE):
            said = " ".join((text.partition("Last error:")[2].strip() or text).split())[:300]
            failure = StorageError(f"NCCL failed: {said} (NCCL_DEBUG=INFO before the command shows more)")
        raise failure or LostRankError(
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
    """Return a failure as every rank gets it: one of the disk as Scion's own, which can be waited out."""
    if not isinstance(error, OSError):
        return error
    explained = storage_error(error, Path(error.filename or "the output"))
    explained.__cause__ = error
    return explained


def _alone(work: Callable[[], T]) -> T:
    try:
        return work()
    except BrokenPipeError:  # whoever read what is printed has gone
        raise
    except OSError as error:
        raise _explained(error) from error


def _as_json(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _word_of(rank: int) -> str:
    return f"failure of {rank}"


def _from_json(outcome: dict[str, Any], rank: int = 0) -> ScionError:
    """Return a rank's failure, as far as Scion knows its kind; it names the rank where that is not the main one."""
    where = f"rank {rank}: " if rank else ""
    kind = getattr(errors, outcome["error"], None)
    if isinstance(kind, type) and issubclass(kind, ScionError):
        return kind(f"{where}{outcome['message']}")
    return ScionError(f"{where}{outcome['error']}: {outcome['message']}")
