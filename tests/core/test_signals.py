"""SIGTERM and Ctrl-C, in a process of its own."""

import os
import signal
import subprocess
import sys

import pytest

from scionlm.core.errors import StoppedError
from scionlm.core.signals import StopRequest

WAIT = """
import sys, time
from scionlm.core.errors import ScionError
from scionlm.core.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    seen = False
    while True:
        if stop.requested and not seen:
            seen = True
            print("noted", flush=True)
            if sys.argv[1] == "stop":
                try:
                    stop.check()
                except ScionError as error:
                    sys.exit(error.exit_code)
        time.sleep(0.005)
"""


def child(mode: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WAIT, mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=20)
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_work_stops_with_code_75_where_it_asks(first):
    process = child("stop")
    process.send_signal(first)
    assert process.stdout.readline() == "noted\n"
    assert finish(process) == 75


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_ctrl_c_after_the_first_signal_ends_at_once_with_130(first):
    process = child("go on")
    process.send_signal(first)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130


def test_a_second_sigterm_is_patient():
    process = child("go on")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130


def test_without_a_signal_the_work_goes_on():
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError):
            stop.check()


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def work():
        with StopRequest():
            assert signal.getsignal(signal.SIGINT) is not before[0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
