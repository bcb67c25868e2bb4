"""A small world in which what the documents say can be run: the names that they use are tiny models and texts."""

import json
import shutil
from pathlib import Path

import pytest
import zstandard

from evaluation_texts import program, story, task_folder
from factories import corpora_file, model_folder, text
from scionlm.data import load_corpora, prepare

SIXTEENTH = {"hidden_size": 36, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3}
"""SmolLM2-135M's width over sixteen; its heads are as many, of a sixteenth of their size."""


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """`smollm2-135m` with its number of layers, `small` with few, prepared `data`, texts to prepare, tasks."""
    root = tmp_path_factory.mktemp("world")
    model = model_folder(
        root / "smollm2-135m", num_hidden_layers=30, head_dim=4, max_position_embeddings=2048, **SIXTEENTH
    )
    model_folder(root / "small", num_hidden_layers=4)
    (root / "prose").mkdir()
    for name, make, first in (("prose", story, 0), ("code", program, 100), ("german", story, 200)):
        lines = [json.dumps({"text": make(first + number)}) for number in range(40)]
        raw = ("\n".join(lines) + "\n").encode()
        (root / "prose" / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    paths = {name: {"paths": [f"../prose/{name}.jsonl.zst"]} for name in ("prose", "code", "german")}
    corpora = corpora_file(root / "corpora", model, domains=paths)
    prepare(load_corpora(corpora), corpora.parent, root / "data")
    for folder, ending in (("texts", "txt"), ("code", "py"), ("src", "py")):
        (root / folder).mkdir()
        for number in range(60):
            (root / folder / f"{number}.{ending}").write_text(text(number + len(folder) * 100, 40))
    task_folder(root / "my-tasks")
    return root


@pytest.fixture
def world(small_world, tmp_path, monkeypatch) -> Path:
    """A copy of the small world, which is where the test works; a path that is there wins over a known name."""
    here = tmp_path / "world"
    shutil.copytree(small_world, here)
    monkeypatch.chdir(here)
    return here
