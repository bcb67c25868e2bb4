"""The device of a process: its threads, its clock, its compiler; GPUs by what they are asked for."""

import shutil

import pytest
import torch

from scionlm.parallel.runtime import Runtime, Stopwatch, measuring_alone, resolve_compile, start_runtime

GPU = Runtime("cuda", "a GPU", 1, "bf16")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_that_were_asked_for_are_those_of_each_process(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert start_runtime().threads == torch.get_num_threads() == 4


def test_a_measurement_alone_has_the_cores_of_those_that_wait_and_gives_them_back(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    torch.set_num_threads(1)
    with measuring_alone() as runtime:
        assert (runtime.precision, torch.get_num_threads()) == ("fp32", 6)
    assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), measuring_alone():
        raise KeyError
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("there", "named", "found"),
    [
        ({"gcc"}, None, True),
        ({"clang"}, None, True),
        ({"g++"}, None, False),
        ({"gcc"}, "icx", False),
        ({"icx"}, "icx", True),
    ],
)
def test_a_gpu_compiles_where_triton_finds_a_compiler_of_c(there, named, found, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    assert resolve_compile("auto", GPU, 1e18) is found
    assert ("no C compiler is found" in capsys.readouterr().err) is not found
    assert resolve_compile("auto", GPU, 1e12) is False
    assert resolve_compile(True, GPU, 1e12) is True
    assert capsys.readouterr().err == ""


def test_a_gpus_own_clock_is_read_when_it_is_asked_for(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            assert said[-1] == "wait"
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch()
    for _ in range(2):
        with watch.timing(torch.device("cuda", 0)):
            said.append("work")
    assert said == ["record", "work", "record"] * 2
    assert watch.seconds == watch.seconds == 0.5
    assert said.count("wait") == 2
