"""Facts about the machine."""

import os
import re
import subprocess

import pytest

from scionlm.core import devices, machine
from scionlm.core.devices import this_machine
from scionlm.core.machine import git_commit, peak_memory_bytes, usable_cores, versions


def test_the_facts_have_sensible_sizes():
    assert 1 <= usable_cores() <= 4096
    assert 2**20 < peak_memory_bytes() < 2**45


@pytest.mark.parametrize(
    ("said", "launched", "processes", "each"),
    [
        (None, False, None, 12),
        ("3", False, None, 3),
        ("3", True, 4, 3),
        ("1", False, 4, 1),  # mpirun's and such: somebody has set it
        ("1", True, 4, 3),  # torchrun has
        (None, True, 1, 12),
        (None, True, 99, 1),
        ("many", True, 4, 3),
    ],
)
def test_cores_are_what_is_said_or_a_share_of_all(said, launched, processes, each, monkeypatch):
    values = {"OMP_NUM_THREADS": said, "TORCHELASTIC_RUN_ID": launched and "none", "LOCAL_WORLD_SIZE": processes}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value)) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(devices, "gpu_by_name", lambda _: None)
    assert usable_cores() == each
    assert f", {each * (processes or 1)} core" in this_machine().name


def test_versions_name_python_and_what_decides_the_numbers():
    found = versions()
    assert {"python", "torch", "transformers", "tokenizers", "safetensors", "numpy"} <= set(found)
    assert all(re.match(r"\d+\.\d+", version) for version in found.values())


def test_the_commit_is_a_hash_with_a_plus_for_changes_or_nothing(tmp_path, monkeypatch):
    here = tmp_path / "package" / "machine.py"
    here.parent.mkdir()
    here.write_text("first")
    monkeypatch.setattr(machine, "__file__", str(here))

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_commit() is None  # the checkout of something else
    git("add", "package")
    git("commit", "-m", "one")
    commit = git_commit()
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    here.write_text("second")
    assert git_commit() == commit + "+"
