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
    assert together["tasks"].keys() == alone["tasks"].keys()
    for name, record in alone["tasks"].items():
        assert together["tasks"][name] == pytest.approx(record, rel=1e-5), name
    assert together["domains"].keys() == alone["domains"].keys()
    for name, loss in alone["domains"].items():
        assert together["domains"][name] == pytest.approx(loss, rel=1e-5)
        assert loss["num_tokens"] > 0
