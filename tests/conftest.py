"""Shared fixtures: a tiny model folder and a prepared data folder, made once a session; no network for anyone."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from a second thread, and two of them fight for cores

from factories import VOCAB_SIZE, corpora_file, model_folder
from scionlm.data import DataFolder, load_corpora, prepare


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of its own."""
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory) -> Path:
    """A model with the tokenizer of `tiny_folder`, wider, deeper and with a padded vocabulary."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 7, "vocab_size": VOCAB_SIZE + 8}
    return model_folder(tmp_path_factory.mktemp("models") / "wide", seed=3, **sizes)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, tiny_folder) -> DataFolder:
    """Two prepared domains, `alpha` and `beta`."""
    root = tmp_path_factory.mktemp("corpora")
    path = corpora_file(root, tiny_folder)
    prepare(load_corpora(path), root, root / "data")
    return DataFolder(root / "data")
