"""Evaluation under torchrun: two processes measure together what one does alone, and one of them says so."""

import json
import os
import subprocess
import sys

import pytest

from worlds import free_port

pytestmark = pytest.mark.slow


def test_two_processes_of_torchrun_measure_what_one_does(tiny_folder, data_folder):
    words = ["-m", "scionlm", "evaluate", str(tiny_folder), "--data", str(data_folder.path), "--suite", "offline",
             "--limit", "30", "--seq-len", "24", "--batch-size", "4", "--json"]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    alone, together = (
        json.loads(
            subprocess.run(
                [sys.executable, *before, *words], env=environment, check=True, capture_output=True, timeout=300
            ).stdout
        )
        for before in ([], torchrun)
    )
    assert together["items"] == alone["items"]
    for part in ("tasks", "domains"):
        mine, theirs = dict(leaves(together[part])), dict(leaves(alone[part]))
        assert mine.keys() == theirs.keys()
        for path, value in theirs.items():
            assert mine[path] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), path
        assert any(path.endswith("nll") for path in theirs)


def leaves(record, path=""):
    """Yield every value in a record, by its path."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value
