"""What ranks tell each other, with threads in the place of processes."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from scionlm.core.errors import DataError, LostRankError, ScionError, StorageError, UsageError
from scionlm.core.signals import StopRequest
from scionlm.parallel import ranks as ranks_module
from scionlm.parallel.ranks import ALONE, Ranks, is_launched, joined, naming_losses


class Threads(Ranks):
    world = 3

    def __init__(self, rank, board, barrier):
        self.rank, self._board, self._barrier = rank, board, barrier

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait(5)
        found = list(self._board)
        self._barrier.wait(5)
        return found

    def share(self, value):
        return self.gather(value)[0]


def on_all(work):
    """Return what each rank's work returned or raised."""
    board, barrier = [None] * 3, threading.Barrier(3)

    def one(rank):
        try:
            return work(Threads(rank, board, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(one, range(3)))


def fail(error):
    raise error


def test_the_main_rank_works_for_all():
    done = []
    assert on_all(lambda ranks: ranks.on_main(lambda: done.append(ranks.rank) or {"a": 1})) == [{"a": 1}] * 3
    assert done == [0]


@pytest.mark.parametrize("kind", [UsageError, DataError])
def test_a_failure_of_the_main_rank_is_everyones(kind):
    found = on_all(lambda ranks: ranks.on_main(lambda: fail(kind("so it is"))))
    assert [(type(error), str(error)) for error in found] == [(kind, "so it is")] * 3


def test_a_fault_of_the_main_rank_ends_the_others_too():
    found = on_all(lambda ranks: ranks.on_main(lambda: fail(KeyError("x"))))
    assert [type(error) for error in found] == [KeyError, ScionError, ScionError]


def test_a_failure_of_any_rank_is_everyones_and_names_it():
    found = on_all(lambda ranks: ranks.together(lambda: fail(DataError("no data")) if ranks.rank == 2 else ranks.rank))
    assert [(type(error), str(error)) for error in found] == [(DataError, "rank 2: no data")] * 3
    assert on_all(lambda ranks: ranks.together(lambda: ranks.rank)) == [0, 1, 2]


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("verb", ["on_main", "together"])
def test_a_failure_of_the_disk_is_the_same_for_all(verb, who):
    def work(ranks):
        def write():
            if ranks.rank == who or verb == "on_main":
                raise OSError(errno.ENOSPC, "No space left on device", "a/file")

        return getattr(ranks, verb)(write)

    found = on_all(work)
    assert [type(error) for error in found] == [StorageError] * 3
    assert len({str(error) for error in found}) == 1
    assert "cannot use a/file: the disk is full" in str(found[0])


def test_a_signal_to_one_is_agreed_by_all_at_the_same_place():
    def work(ranks):
        stop, seen = StopRequest(lambda mine: any(ranks.gather(mine))), []
        for turn in range(4):
            if ranks.rank == 1 and turn == 2:
                stop._note(15, None)
            assert not stop.requested
            seen.append(stop.agreed())
            if seen[-1]:
                break
        return seen, stop.requested

    assert on_all(work) == [([False, False, True], True)] * 3


def test_one_process_is_a_world_of_its_own(monkeypatch):
    assert ALONE.gather(3) == [3]
    assert ALONE.share("x") == "x"
    assert ALONE.apart() is ALONE
    assert ALONE.block_of([1, 2, 3]) == ([1, 2, 3], 3)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_launched()


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1275, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"
REMOTE = NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "socketProgress: Connection closed by remote peer gpu-1<45074>",
)
INVALID = NCCL.format(
    "invalid usage (run with NCCL_WARN=INFO for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50",
)
LATE = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600000 milliseconds before timing out."


@pytest.mark.parametrize("text", ["[gloo/transport/tcp/pair.cc] Connection closed by peer", REMOTE, LATE])
def test_broken_lines_are_named(text):
    def work(ranks):
        with naming_losses(ranks):
            raise RuntimeError(text)

    assert [type(error) for error in on_all(work)] == [LostRankError] * 3
    with pytest.raises(RuntimeError, match=re.escape(text)), naming_losses(ALONE):
        raise RuntimeError(text)


def test_what_nccl_fails_with_by_itself_is_said():
    def work(ranks):
        with naming_losses(ranks):
            raise RuntimeError(INVALID)

    for error in on_all(work):
        assert type(error) is StorageError
        assert "NCCL failed: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50 (" in str(error)


class Closing(Ranks):
    closed = False

    def close(self):
        self.closed = True


@pytest.mark.parametrize("on_gpus", [False, True])
def test_a_failure_on_gpus_does_not_wait_for_the_others(on_gpus, monkeypatch):
    """Closing NCCL would; gloo does not wait, and a process may go on to another run."""
    ends = []
    monkeypatch.setattr(ranks_module.atexit, "register", lambda *end: ends.append(end))
    failing, sound = Closing(), Closing()
    with pytest.raises(DataError, match="broken"), ranks_module._leaving(failing, on_gpus):
        raise DataError("broken")
    assert (failing.closed, ends) == (not on_gpus, [(ranks_module._end, DataError.exit_code)] * on_gpus)
    with ranks_module._leaving(sound, on_gpus):
        pass
    assert sound.closed
    assert len(ends) == on_gpus


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_gpu_for_each_process_is_asked_for(local_rank, monkeypatch):
    """Each machine's first process says so."""
    values = {"RANK": 2 + local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks_module, "_MAIN_SPEAKS_SECONDS", 0.0)
    said = r'2 processes .* with 1 GPU: .*CUDA_VISIBLE_DEVICES=""'
    with pytest.raises(UsageError, match=said) as caught, joined():
        pass
    assert caught.value.told == (local_rank == 1)


@pytest.mark.parametrize("name", ["on_main", "together"])
def test_a_failure_of_the_disk_is_scions_own_for_one_process_too(name):
    def fail(error):
        raise error

    with pytest.raises(StorageError, match=r"cannot use /x/y: Input/output error"):
        getattr(ALONE, name)(lambda: fail(OSError(errno.EIO, os.strerror(errno.EIO), "/x/y")))
    with pytest.raises(BrokenPipeError):
        getattr(ALONE, name)(lambda: fail(BrokenPipeError()))
