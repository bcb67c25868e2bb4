"""Trackers as they are, without a network, where their packages are installed: the rest is tested on stand-ins."""

import sqlite3

import pytest

from scionlm.train.metrics import open_tracker

CONFIG = {"recipe": "inheritune", "seed": 5}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "project" / "child"
    folder.mkdir(parents=True)
    return folder


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path, run, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    for step, loss in ((7, 2.5), (8, 2.25)):
        tracker = open_tracker("wandb", run, CONFIG)
        tracker.log(step, {"train/nll_nats": loss})
        tracker.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    assert len({path.name for path in files}) == 1  # one identity
    assert any(b"train/nll_nats" in path.read_bytes() for path in files)
    assert any(b"inheritune" in path.read_bytes() for path in files)


def test_trackio_keeps_a_run_here_and_goes_on_with_it(tmp_path, run, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # read when it is imported
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("trackio")
    for step, loss in ((7, 2.5), (8, 2.25)):
        tracker = open_tracker("trackio", run, CONFIG)
        tracker.log(step, {"train/nll_nats": loss})
        tracker.close()
    (path,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("child", 7), ("child", 8)]
    assert "2.25" in str(rows[1][2])
