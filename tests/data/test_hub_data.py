"""Files of data sets on the hub: a folder stands for the hub; no network."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from factories import text
from scionlm.core.config import validate
from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.data import Corpora, DataFolder, DomainConfig, prepare
from scionlm.data.reading.files import find_files
from scionlm.data.reading.hub import hub_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    remote, asked = tmp_path / "remote", []
    for name in ("data/a-0.jsonl", "data/a-1.jsonl", "other/b.jsonl", "README.md", "data/image.png"):
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text("".join(json.dumps({"text": f"{name} {i} {text(i, 20)}"}) + "\n" for i in range(9)))

    class Api:
        def dataset_info(self, repo, *, revision=None, files_metadata=False, timeout=None):
            if repo != "org/name" or revision not in (None, "v1", COMMIT):
                raise huggingface_hub.errors.RepositoryNotFoundError(
                    "no", response=SimpleNamespace(headers={}, request=None)
                )
            names = [path for path in remote.rglob("*") if path.is_file()]
            files = [SimpleNamespace(rfilename=str(p.relative_to(remote)), size=p.stat().st_size) for p in names]
            return SimpleNamespace(siblings=files, sha=COMMIT)

    def download(repo, name, *, repo_type, revision, etag_timeout):
        assert (repo, repo_type, revision) == ("org/name", "dataset", COMMIT)
        asked.append(name)
        target = tmp_path / "cache" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(remote / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("hf://datasets/org/name", ["data/a-0.jsonl", "data/a-1.jsonl", "other/b.jsonl"]),
        ("hf://datasets/org/name@v1/data", ["data/a-0.jsonl", "data/a-1.jsonl"]),
        ("hf://datasets/org/name/data/a-1.jsonl", ["data/a-1.jsonl"]),
        ("hf://datasets/org/name/*/a-*.jsonl", ["data/a-0.jsonl", "data/a-1.jsonl"]),
    ],
)
def test_an_address_stands_for_files_at_one_commit(tmp_path, hub, address, names):
    found = find_files(DomainConfig(paths=[address]), tmp_path, "x")
    assert [file.name for file in found] == [f"hf://datasets/org/name@{COMMIT}/{name}" for name in names]
    assert hub == []  # listing fetches nothing


def test_a_data_set_is_prepared_like_files_that_are_here(tmp_path, hub, tiny_folder):
    def made(paths, out):
        config = {"tokenizer": str(tiny_folder), "domains": {"x": {"paths": paths}}, "held_out": {"min_documents": 3}}
        prepare(validate(Corpora, config, "corpora"), tmp_path, tmp_path / out)
        return DataFolder(tmp_path / out)

    there, here = made(["hf://datasets/org/name/data"], "there"), made(["remote/data/*.jsonl"], "here")
    assert there.fingerprint == here.fingerprint
    assert there.hub_datasets("x") == ["org/name"]
    assert here.hub_datasets("x") == []
    assert set(hub) == {"data/a-0.jsonl", "data/a-1.jsonl"}


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        ("hf://org/name/x", UsageError, "hf://datasets/ORG/NAME"),
        ("hf://datasets/org", UsageError, "hf://datasets/ORG/NAME"),
        ("hf://datasets/org/other", DataError, "no such public repository"),
        ("hf://datasets/org/name/nothing", DataError, "matches none of the 5 files"),
    ],
)
def test_an_address_of_nothing_is_refused_by_name(tmp_path, hub, address, error, match):
    with pytest.raises(error, match=match):
        find_files(DomainConfig(paths=[address]), tmp_path, "x")


@pytest.mark.parametrize("name", ["OfflineModeIsEnabled", "HTTPError"])
def test_a_hub_that_cannot_be_reached_is_a_storage_error(tmp_path, monkeypatch, name):
    def offline(self, *arguments, **settings):
        raise getattr(huggingface_hub.errors, name)("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(StorageError, match=r"org/name.*cannot be reached.*local files"):
        find_files(DomainConfig(paths=["hf://datasets/org/name"]), tmp_path, "x")


@pytest.mark.parametrize("step", ["dataset_info", "download"])
def test_a_gated_data_set_says_how_to_get_in(hub, monkeypatch, step):
    def gated(*arguments, **settings):
        raise huggingface_hub.errors.GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    if step == "dataset_info":
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", gated)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(DataError, match=r"org/name.* is gated: accept its terms on its page.*HF_TOKEN"):
        hub_files("hf://datasets/org/name", "x")[0].fetch()
