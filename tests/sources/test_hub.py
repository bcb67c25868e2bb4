"""Models of the hub: only the files that are needed are asked for. A folder stands for the hub; no network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from factories import tiny_model, tiny_tokenizer
from scionlm.core.errors import DataError, StorageError
from scionlm.families.weights import FolderWeights
from scionlm.recipes.inherit import describe_request, inherit_folder, open_request
from scionlm.sources import load_hf_model, open_folder, resolve
from scionlm.sources.tensors import FolderTensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(20).unsqueeze(0)


class Hub:
    """What `huggingface_hub.snapshot_download` does, with a folder in the place of the network."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.snapshot = remote, cache / COMMIT
        self.calls: list[tuple[str, str | None, list[str]]] = []
        self.error: Exception | None = None

    def download(self, repo_id, *, revision=None, allow_patterns=None, **settings):
        self.calls.append((repo_id, revision, allow_patterns))
        if self.error is not None:
            raise self.error
        names = [str(path.relative_to(self.remote)) for path in self.remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.remote / name, self.snapshot / name)
        return str(self.snapshot)

    def here(self, pattern: str = "*") -> set[str]:
        return {str(p.relative_to(self.snapshot)) for p in self.snapshot.rglob(pattern) if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """A model of five layers in many small shards, with all that such a repository holds beside them."""
    remote = tmp_path / "remote"
    remote.mkdir()
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(remote, max_shard_size="12KB")
    tiny_tokenizer(remote)
    (remote / "LICENSE").write_text("Test licence\n")
    (remote / "README.md").write_text("---\nlicense: mit\n---\n")
    (remote / "tokenizer.model").write_text("a sentencepiece model")
    (remote / "merges.txt").write_text("a b")
    (remote / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    save_file({"tok_embeddings.weight": torch.zeros(3)}, remote / "consolidated.safetensors")
    for folder, name in (("original", "consolidated.00.pth"), ("onnx", "model.onnx"), ("fp32", "model.safetensors")):
        (remote / folder).mkdir()
        (remote / folder / name).write_bytes(b"large")
    made = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return made


def shards_of(hub: Hub, layers: list[int]) -> set[str]:
    """Return the shards that hold these layers or what stands outside the layers, by the index alone."""
    index = json.loads((hub.remote / "model.safetensors.index.json").read_text())["weight_map"]
    return {
        file
        for name, file in index.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) in layers
    }


def all_shards(hub: Hub) -> set[str]:
    return shards_of(hub, list(range(5)))


def same_logits(out: Path, hub: Hub, keep: list[int]) -> bool:
    model = load_hf_model(open_folder(hub.remote), torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        return torch.equal(load_hf_model(open_folder(out), torch.float32)(input_ids=IDS).logits, expected)


def test_without_weights_no_file_of_weights_is_asked_for(hub):
    found = resolve("org/name@v1", weights=False)
    assert hub.calls[0][:2] == ("org/name", "v1")
    assert (found.revision, found.name, found.license) == (COMMIT, "org/name", "mit")
    assert {"config.json", "tokenizer.json", "LICENSE", "model.safetensors.index.json"} <= hub.here()
    assert not hub.here("*.safetensors")
    assert not hub.here("*.bin")


@pytest.mark.parametrize(("keep", "verify"), [([0, 1], True), ([4], True), ([1, 3], True), ([3], False)], ids=str)
def test_only_the_shards_of_the_layers_that_stay_are_fetched_and_the_result_is_proven(hub, keep, verify):
    wanted = shards_of(hub, keep)
    assert wanted < all_shards(hub)  # else this would show nothing
    options = {"keep": ",".join(map(str, keep))}
    facts = inherit_folder("org/name", Path("out"), options, verify, 0)
    assert hub.here("*.safetensors") == wanted
    assert any("bitwise" in line for line in facts["checks"])
    assert same_logits(Path("out"), hub, keep)


def test_what_is_fetched_later_is_of_the_very_commit_that_was_resolved(hub):
    inherit_folder("org/name@main", Path("out"), {"layers": 2}, True, 0)
    assert [call[1] for call in hub.calls] == ["main", COMMIT]
    source = json.loads(Path("out/provenance.json").read_text())["source"]
    assert source["revision"] == COMMIT
    assert source["name"] == "org/name"


def test_width_is_cut_and_proven_from_the_shards_of_the_layers_that_stay(hub):
    inherit_folder("org/name", Path("out"), {"keep": "1,3", "hidden_size": 24, "intermediate_size": 20}, True, 0)
    assert hub.here("*.safetensors") == shards_of(hub, [1, 3])


def test_a_dry_run_fetches_no_weights(hub):
    with open_request("org/name", {"layers": 3}) as request:
        facts = describe_request(request)
    assert facts["num_parameters"] > 0
    assert not hub.here("*.safetensors")


def test_scores_by_magnitude_need_all_shards_and_no_other_files(hub):
    inherit_folder("org/name", Path("out"), {"layers": 2, "hidden_size": 24, "importance": "magnitude"}, True, 0)
    assert hub.here("*.safetensors") == all_shards(hub)


def test_a_model_resolved_with_its_weights_has_its_shards_and_no_other_files(hub):
    """Some repositories hold the same weights a second time (consolidated.safetensors, folders of other programs)."""
    assert resolve("org/name").path == hub.snapshot
    assert hub.here("*.safetensors") == all_shards(hub)
    assert not hub.here("*.bin")


def test_a_model_in_one_file_is_fetched_whole(hub):
    weights = {}
    for name in all_shards(hub):
        weights |= load_file(hub.remote / name)
        (hub.remote / name).unlink()
    (hub.remote / "model.safetensors.index.json").unlink()
    save_file(weights, hub.remote / "model.safetensors", {"format": "pt"})
    inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)
    assert {name for name in hub.here("*.safetensors") if "/" not in name} == {"model.safetensors"}
    assert same_logits(Path("out"), hub, [0, 1])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "LICENSE"]
)
def test_tokenizer_and_licence_of_a_hub_model_travel_along_like_those_of_a_folder(hub, name):
    inherit_folder(str(hub.remote), Path("from_folder"), {"layers": 2}, True, 0)
    inherit_folder("org/name", Path("from_hub"), {"layers": 2}, True, 0)
    assert (Path("from_folder") / name).read_bytes() == (hub.remote / name).read_bytes()
    assert (Path("from_hub") / name).read_bytes() == (hub.remote / name).read_bytes()


def only_pickles(hub: Hub, files: int = 1) -> None:
    """Give the repository its weights as pickles alone: in one file, or one for each layer and one for the rest."""
    weights = {}
    for name in all_shards(hub):
        weights |= load_file(hub.remote / name)
    for path in [*hub.remote.glob("*.safetensors"), hub.remote / "model.safetensors.index.json"]:
        path.unlink()
    (hub.remote / "pytorch_model.bin").unlink()
    names = ["pytorch_model.bin"]
    if files > 1:
        names = [f"pytorch_model-{number:05d}-of-{files:05d}.bin" for number in range(1, files + 1)]
        (hub.remote / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    for number, name in enumerate(names):
        torch.save({key: weights[key] for key in sorted(weights)[number::files]}, hub.remote / name)


@pytest.mark.parametrize("files", [1, 3])
def test_pickles_of_the_hub_are_fetched_and_converted_once_where_they_are_allowed(hub, tmp_path, monkeypatch, files):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "converted"))
    expected = {name: tensor for shard in all_shards(hub) for name, tensor in load_file(hub.remote / shard).items()}
    only_pickles(hub, files)
    inherit_folder("org/name@main", Path("out"), {"layers": 5, "allow_pickle": True}, True, 0)
    found = load_file("out/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [call[1] for call in hub.calls] == ["main", COMMIT, COMMIT]
    assert json.loads(Path("out/provenance.json").read_text())["source"]["revision"] == COMMIT
    assert Path("out/LICENSE").read_text() == "Test licence\n"
    monkeypatch.setattr(torch, "load", None)  # what is converted is not opened again
    again = resolve("org/name", allow_pickle=True)
    assert (again.name, again.revision, again.base_model, again.license) == ("org/name", COMMIT, "org/name", "mit")
    with pytest.raises(DataError, match="--allow-pickle"):
        resolve("org/name")


def test_a_pickle_of_the_hub_that_holds_code_is_not_run(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "converted"))
    only_pickles(hub)

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model.norm.weight": Code()}, hub.remote / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be opened with weights_only"):
        resolve("org/name", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", ["shards", "one file"])
def test_pickles_beside_safetensors_are_left_where_they_are_also_where_they_are_allowed(hub, shape):
    if shape == "one file":
        weights = {name: tensor for file in all_shards(hub) for name, tensor in load_file(hub.remote / file).items()}
        save_file(weights, hub.remote / "model.safetensors", {"format": "pt"})
        (hub.remote / "model.safetensors.index.json").unlink()
    inherit_folder("org/name", Path("out"), {"layers": 2, "allow_pickle": True}, True, 0)
    assert not hub.here("*.bin")


def test_a_model_with_nothing_but_pickles_is_a_data_error_that_names_the_flag(hub):
    only_pickles(hub)
    with pytest.raises(DataError, match=r"'org/name': .* neither model\.safetensors nor .*--allow-pickle"):
        inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)
    assert not hub.here("*.bin")
    assert not Path("out").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_weights_that_a_machine_without_a_network_has_not_are_out_of_reach(hub, monkeypatch, allowed):
    """The hub's client returns what its cache has then, and says nothing."""
    for path in [*hub.remote.glob("*.safetensors*"), *hub.remote.glob("*.bin")]:
        path.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"'org/name': its weights: .* cannot be reached"):
        resolve("org/name", allow_pickle=allowed)


def test_a_shard_that_the_hub_does_not_have_is_a_data_error_that_names_it(hub):
    gone = sorted(shards_of(hub, [0]))[0]
    (hub.remote / gone).unlink()
    with pytest.raises(DataError, match=gone.replace(".", r"\.")):
        inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)
    assert not Path("out").exists()


def test_a_shard_that_is_not_needed_may_be_missing(hub):
    """The control: nobody looks at it."""
    for gone in all_shards(hub) - shards_of(hub, [0, 1]):
        (hub.remote / gone).unlink()
    inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "fp32/model.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused_before_a_file_is_asked_for(hub, name):
    index = hub.remote / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(record))
    with pytest.raises(DataError, match="leaves the model folder"):
        inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)
    assert len(hub.calls) == 1
    assert not hub.here("*.safetensors")


def test_the_index_is_checked_against_the_configuration_also_for_files_that_are_not_here(hub):
    index = hub.remote / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    del record["weight_map"]["model.layers.4.mlp.up_proj.weight"]
    index.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"'model\.layers\.4\.mlp\.up_proj\.weight' is missing"):
        inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)


def test_names_of_files_that_are_not_here_are_known(hub):
    folder = resolve("org/name", weights=False)
    file = sorted(shards_of(hub, []))[0]
    folder.fetch([file])
    from scionlm.sources import tensor_index

    with FolderTensors(folder.path, tensor_index(folder.path, [folder.path / file])) as tensors:
        assert len(FolderWeights(folder.config, tensors, folder.path).names()) == 5 * 9 + 3


@pytest.mark.parametrize("pickled", [False, True])
def test_code_of_the_model_is_refused_before_weights_are_fetched(hub, pickled):
    if pickled:
        only_pickles(hub)
    config = json.loads((hub.remote / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}
    (hub.remote / "config.json").write_text(json.dumps(config))
    (hub.remote / "x.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match="runs no code"):
        inherit_folder("org/name", Path("out"), {"layers": 2, "allow_pickle": pickled}, True, 0)
    assert not hub.here("*.py")
    assert not hub.here("*.bin")
    assert not hub.here("*.safetensors")


def test_a_disk_that_is_full_is_not_called_offline(hub):
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(StorageError) as caught:
        resolve("org/name")
    assert "full" in str(caught.value)
    assert "offline" not in str(caught.value)


def test_a_connection_that_breaks_between_is_a_storage_error_and_leaves_nothing(hub):
    folder = resolve("org/name", weights=False)
    hub.error = OSError("connection reset")
    with pytest.raises(StorageError, match="cannot be reached"):
        folder.fetch(["model-00001-of-00009.safetensors"])
    with pytest.raises(StorageError):
        inherit_folder("org/name", Path("out"), {"layers": 2}, True, 0)
    assert not Path("out").exists()
