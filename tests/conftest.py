"""Shared fixtures: a tiny model folder and a prepared data folder, made once a session; no network for anyone."""

import gc
import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from a second thread, and two of them fight for cores

from factories import VOCAB_SIZE, corpora_file, model_folder
from features import FEATURES
from scionlm.data import DataFolder, Mixture, Order, SamplePlan, load_corpora, prepare
from scionlm.recipes.run import run_recipe
from whole_runs import quicken, recipe_of
from worlds import World

# The same examples every time, and no deadline: how long one takes depends on what else the machine does. With
# SCION_RANDOM_TESTS=1 (`make test-slow`) there are others every time, and a failure prints how to see it again.
settings.register_profile("scion", deadline=None, derandomize=True, database=None)
settings.register_profile("scion-random", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile("scion-random" if os.environ.get("SCION_RANDOM_TESTS") == "1" else "scion")


def pytest_collection_finish(session):
    """Leave what is imported by now out of every later search for garbage: a million objects that stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _this_machine_alone():
    """Nothing that a test does in this process connects to another machine; what a library would swallow fails too."""

    def guarded(connect):
        def guard(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                pytest.fail(f"a test wants to connect to {address}: tests have no network")
            return connect(self, address)

        return guard

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


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


@pytest.fixture(scope="session")
def with_dropout(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("dropout") / "gpt2", model_type="gpt2")


@pytest.fixture(scope="session")
def earlier(tmp_path_factory, tiny_folder, data_folder):
    """A finished run, to be replayed and branched off."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    schedule = {"name": "constant", "warmup": 2}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        run_recipe(recipe_of(tiny_folder, data_folder.path, schedule=schedule, checkpoint__every=3), out)
    return out


@pytest.fixture(scope="session")
def pair():
    """Two processes that make runs together."""
    with World(2) as world:
        yield world


@pytest.fixture
def make(tiny_folder, data_folder, with_dropout, wide_folder, earlier):
    """Return a recipe by the name of its feature, or by its settings."""

    def filled(value):
        words = {"EARLIER": earlier, "DATA": data_folder.path, "GPT2": with_dropout, "WIDE": wide_folder}
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return str(words.get(value, value)) if isinstance(value, str) else value

    def make(feature: str = "plain", **changes):
        settings = {key.replace(".", "__"): filled(value) for key, value in FEATURES[feature].items()}
        return recipe_of(tiny_folder, data_folder.path, **settings | changes)

    return make


@pytest.fixture
def plan_of_two(data_folder):
    """The order of samples of both domains, at its beginning."""
    streams = {name: data_folder.stream(name, "train") for name in data_folder.domains}
    return SamplePlan(streams, Mixture(dict.fromkeys(streams, 0.5)), Order(24))
