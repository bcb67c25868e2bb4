"""Facts about the machine."""

import re
import subprocess

from scionlm.core import machine
from scionlm.core.machine import git_commit, peak_memory_bytes, usable_cores, versions


def test_the_facts_have_sensible_sizes():
    assert 1 <= usable_cores() <= 4096
    assert 2**20 < peak_memory_bytes() < 2**45


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
