"""Tiny model folders of every family, made once a session."""

from pathlib import Path

import pytest

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.sources import ModelFolder, open_folder

_made: dict[str, ModelFolder] = {}


def tiny_source(root: Path, model_type: str, changes: dict) -> ModelFolder:
    """Return the folder of a tiny model of a family."""
    key = f"{model_type}-{'-'.join(map(str, changes))}"
    if key not in _made:
        folder = root / key
        tiny_model(model_type, **changes).save_pretrained(folder)
        _made[key] = open_folder(folder)
    return _made[key]


@pytest.fixture(scope="session")
def sources_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=MODELS, ids=MODEL_IDS)
def source(request, sources_root) -> ModelFolder:
    """A tiny model of each family, in each variant."""
    return tiny_source(sources_root, *request.param)


@pytest.fixture
def llama(sources_root) -> ModelFolder:
    """A tiny Llama with grouped heads and tied embeddings."""
    return tiny_source(sources_root, "llama", {})
