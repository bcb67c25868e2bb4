"""Tiny model folders of every family, made once a session."""

from pathlib import Path

import pytest

from factories import MODEL_IDS, MODELS, tiny_source
from scionlm.sources import ModelFolder


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
