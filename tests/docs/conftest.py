"""A small world in which what the documents say can be run: the names that they use are tiny models and texts."""

import shutil
from pathlib import Path

import pytest

from factories import corpora_file, model_folder, text
from scionlm.data import load_corpora, prepare


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """`smollm2-135m` with its number of layers, `small` with few, `data` with `prose` and `code`, texts to prepare."""
    root = tmp_path_factory.mktemp("world")
    model = model_folder(root / "smollm2-135m", num_hidden_layers=30)
    model_folder(root / "small", num_hidden_layers=4)
    paths = {"prose": {"paths": ["alpha.jsonl"]}, "code": {"paths": ["beta.jsonl"]}}
    corpora = corpora_file(root / "corpora", model, domains=paths)
    prepare(load_corpora(corpora), corpora.parent, root / "data")
    for folder, ending in (("texts", "txt"), ("code", "py")):
        (root / folder).mkdir()
        for number in range(60):
            (root / folder / f"{number}.{ending}").write_text(text(number + len(folder) * 100, 40))
    return root


@pytest.fixture
def world(small_world, tmp_path, monkeypatch) -> Path:
    """A copy of the small world, which is where the test works; a path that is there wins over a known name."""
    here = tmp_path / "world"
    shutil.copytree(small_world, here)
    monkeypatch.chdir(here)
    return here
