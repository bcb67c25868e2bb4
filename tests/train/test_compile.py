"""Compiled by torch.compile for real: close to eager, and the same bits in another process and after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from scionlm.core.records import read_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a compiler"),
]


@pytest.fixture
def command(tiny_folder, data_folder, tmp_path):
    def make(out, compiled, *more):
        settings = {
            "source": tiny_folder, "data.dir": data_folder.path, "data.mixture": "null", "data.seq_len": 24,
            "inherit.layers": 2, "train.steps": 40, "train.global_batch_tokens": 96, "train.precision": "fp32",
            "train.compile": str(compiled).lower(), "control": "false", "evaluate.tokens_per_domain": 100,
            "optimizer.lr": 0.003, "checkpoint.every": 5,
        }  # fmt: skip
        words = [f"{key}={value}" for key, value in settings.items()]
        return [sys.executable, "-m", "scionlm", "run", "inheritune-mini", *words, *more, "-o", str(tmp_path / out)]

    return make


def losses(folder):
    return [line["train/nll_nats"] for line in read_jsonl(folder / "metrics.jsonl") if "train/nll_nats" in line]


def test_compiled_training_follows_eager_and_its_own_bits(command, tmp_path):
    runs = {"eager": (False, ()), "first": (True, ()), "second": (True, ()), "other": (True, ("seed=1",))}
    for name, (compiled, more) in runs.items():
        subprocess.run(command(name, compiled, *more), check=True, capture_output=True, timeout=300)
    eager, first, second, other = (losses(tmp_path / name) for name in runs)
    assert first == second
    assert first == pytest.approx(eager, rel=1e-4)
    assert other != pytest.approx(eager, rel=1e-2)
    assert json.loads((tmp_path / "first" / "training.json").read_text())["compile"] is True


def test_a_compiled_run_goes_on_to_the_same_bits(command, tmp_path):
    subprocess.run(command("whole", True), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command("parts", True), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "parts" / "checkpoints" / "step-00000010").exists():
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    subprocess.run(command("parts", True), check=True, capture_output=True, timeout=300)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    name = "model/model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
