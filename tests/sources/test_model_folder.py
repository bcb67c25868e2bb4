"""A Hugging Face folder is checked before it is loaded."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scionlm.core.errors import DataError
from scionlm.core.tensors import read_header
from scionlm.sources import load_hf_model, load_tokenizer, open_folder, read_config, tensor_index
from scionlm.sources.folder import weight_files

NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def sharded(folder) -> Path:
    """The same model in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def safetensors_file(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape=(1,), offsets=(0, 4), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuse(folder: Path, match: str) -> None:
    """Both the look at the folder and the loading of the model refuse, with the code of broken data."""
    for action in (lambda: tensor_index(folder), lambda: load_hf_model(open_folder(folder))):
        with pytest.raises(DataError, match=match) as caught:
            action()
        assert caught.value.exit_code == 65
        assert "\n" not in str(caught.value)


def test_a_good_folder_loads_whole_and_ready_for_evaluation(folder):
    model = load_hf_model(open_folder(folder))
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in stored:
            assert torch.equal(tensor, stored[name])
    assert set(tensor_index(folder)) == set(stored)


def test_a_folder_in_two_files_loads_like_the_one_in_one_file(tiny_folder, sharded):
    one, two = load_hf_model(open_folder(tiny_folder)), load_hf_model(open_folder(sharded))
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert {file.name for file, _ in tensor_index(sharded).values()} == {p.name for p in weight_files(sharded)}


def test_weights_cut_short_anywhere_are_refused_by_file_name(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse(folder, r"model\.safetensors.*fetch it again")


def test_bytes_after_the_last_tensor_are_refused(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refuse(folder, r"model\.safetensors is cut short or has trailing bytes")


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04\x95 a pickle, not safetensors", b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}", b"PK\x03\x04" * 100],
    ids=["pickle", "ones", "huge-header", "zip"],
)
def test_garbage_instead_of_weights_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refuse(folder, r"model\.safetensors")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{not json}", b""),
        (b"\xff\xfe" * 4, b""),
        (b"[" * 50_000, b""),
        (b"[]", b""),
        (b"null", b""),
        ({"a": 5}, b""),
        ({"a": {}}, b""),
        ({"a": entry(shape=5)}, b"1234"),
        ({"a": entry(dtype="F4")}, b"1234"),
        ({"a": entry(dtype=[])}, b"1234"),
        ({"a": entry(offsets=[0])}, b"1234"),
        ({"a": entry(offsets=["a", "b"])}, b""),
        ({"a": entry(shape=[2])}, b"1234"),
        ({"a": entry(shape=[-1], offsets=[4, 0])}, b""),
        ({"a": entry(shape=[1.0])}, b"1234"),
        ({"a": entry(), "b": entry()}, b"1234"),
        ({"a": entry(offsets=[4, 8])}, b"12345678"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_header_that_lies_is_a_data_error(tmp_path, header, data):
    with pytest.raises(DataError, match=r"x\.safetensors"):
        read_header(safetensors_file(tmp_path / "x.safetensors", header, data), "fetch it again")


def test_a_true_header_is_returned_without_its_metadata(tmp_path):
    """The control for the lies above."""
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(shape=[], offsets=[4, 8])}
    path = safetensors_file(tmp_path / "x.safetensors", header, b"12345678")
    assert set(read_header(path, "fetch it again")[0]) == {"a", "b"}


def test_two_tensors_in_the_same_bytes_never_reach_the_user_as_a_fault(folder):
    weights = load_file(folder / "model.safetensors")
    header, end = {}, 0
    for name, tensor in weights.items():
        header[name] = entry(list(tensor.shape), [0, tensor.nbytes])
        end = max(end, tensor.nbytes)
    safetensors_file(folder / "model.safetensors", header, b"\0" * end)
    with pytest.raises(DataError):
        load_hf_model(open_folder(folder))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "..\\x", "a\0b"]
)
def test_an_index_that_leaves_the_folder_is_not_followed(sharded, name):
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded.parent / "model.safetensors")
    index = sharded / "model.safetensors.index.json"
    change_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {NAME: name})
    refuse(sharded, "leaves the model folder")


def test_an_index_that_names_a_missing_file_says_which(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refuse(sharded, r"names model-00002-of-00002\.safetensors, which is not in the folder")


def test_an_index_that_promises_a_tensor_that_is_nowhere_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {"model.extra": "model-00001-of-00002.safetensors"})
    refuse(sharded, r"promises tensor 'model\.extra' in model-00001")


def test_an_index_that_promises_a_tensor_in_the_other_file_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {
        "model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors": "model-00001-of-00002.safetensors",
    }
    change_json(index, weight_map=weight_map | {NAME: other[weight_map[NAME]]})
    refuse(sharded, f"promises tensor '{NAME}'")


def test_a_tensor_in_two_files_is_refused(sharded):
    weights = load_file(sharded / "model-00001-of-00002.safetensors")
    name = next(iter(weights))
    path = sharded / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {name: weights[name]}, path, metadata={"format": "pt"})
    refuse(sharded, f"tensor '{name}' is in both")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refuse(sharded, r"index\.json")


def test_a_folder_without_weights_says_what_it_lacks(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuse(folder, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


def test_a_missing_tensor_is_an_error_and_not_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[NAME]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"missing keys: {NAME}"):
        load_hf_model(open_folder(folder))


def test_a_tensor_that_the_model_has_no_place_for_is_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.extra": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"unexpected keys: model\.extra"):
        load_hf_model(open_folder(folder))


def test_a_tensor_of_another_shape_is_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    weights[NAME] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="up_proj"):
        load_hf_model(open_folder(folder))


def test_a_model_with_code_of_its_own_is_refused_and_its_code_never_runs(folder):
    canary = folder / "canary"
    (folder / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"})
    with pytest.raises(DataError, match=r"auto_map.*runs no code"):
        open_folder(folder)
    assert not canary.exists()


def test_quantized_weights_are_refused(folder):
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(DataError, match="quantized"):
        open_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\udcff"], ids=lambda text: text[:10])
def test_a_config_that_is_not_json_is_refused_by_name(folder, content):
    (folder / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"config\.json"):
        read_config(folder)


def test_a_config_without_model_type_or_none_at_all_is_refused(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match="model_type is missing"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json is missing: .* is not a Hugging Face model folder"):
        open_folder(folder)


def test_a_config_that_is_too_large_is_refused_without_reading_it(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(DataError, match="too large"):
        read_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 6},
        {"hidden_size": "wide"},
        {"hidden_act": "nothing"},
        {"model_type": "no-such-model"},
        {"vocab_size": 10},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_a_data_error(folder, changes):
    change_json(folder / "config.json", **changes)
    with pytest.raises(DataError):
        load_hf_model(open_folder(folder))


def test_a_missing_or_broken_tokenizer_is_a_data_error(folder):
    path = folder / "tokenizer.json"
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json is not a usable tokenizer"):
            load_tokenizer(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(folder)


def test_the_tokenizer_neither_cuts_nor_pads_whatever_its_file_asks(folder):
    text = " ".join(["the house of words"] * 30)
    plain = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    changed = load_tokenizer(folder)
    changed.enable_truncation(8)
    changed.enable_padding(length=500)
    changed.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(text, add_special_tokens=False).ids == plain


def test_licences_are_found_and_stated(folder):
    (folder / "USE_POLICY.md").write_text("x")
    (folder / "NOTICE").write_text("x")
    found = open_folder(folder)
    assert [path.name for path in found.license_files()] == ["LICENSE", "NOTICE", "USE_POLICY.md"]
    assert found.license == "mit"


@pytest.mark.parametrize(
    "card", ["no front matter", "---\nlicense: [1\n---\n", "---\nlicense:\n- mit\n---\n", "---", "\udcff"]
)
def test_a_model_card_without_a_licence_is_no_obstacle(folder, card):
    (folder / "README.md").write_text(card, errors="surrogateescape")
    assert open_folder(folder).license is None


def test_the_fingerprint_follows_the_weights_and_nothing_else(folder):
    before = open_folder(folder).weights_fingerprint()
    (folder / "README.md").write_text("another card")
    assert open_folder(folder).weights_fingerprint() == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert open_folder(folder).weights_fingerprint() != before


def test_an_origin_of_a_newer_format_is_refused_by_name(folder):
    (folder / "scion_origin.json").write_text(json.dumps({"format_version": 2, "license": "x"}))
    with pytest.raises(DataError, match=r"scion_origin\.json has format_version 2"):
        open_folder(folder)


def test_code_that_transformers_has_by_now_is_not_needed_and_never_runs(folder, capsys):
    canary = folder / "canary"
    (folder / "modeling_llama.py").write_text(f"open({str(canary)!r}, 'w')\nclass LlamaForCausalLM: pass\n")
    named = "modeling_llama.LlamaForCausalLM"
    names = {"AutoConfig": "o/r--configuration_llama.LlamaConfig", "AutoModelForCausalLM": named}
    change_json(folder / "config.json", auto_map=names)
    opened = open_folder(folder)
    assert "auto_map" not in opened.config
    assert "is not run" in capsys.readouterr().err
    load_hf_model(opened)
    assert not canary.exists()
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": named})
    with pytest.raises(DataError, match="auto_map"):
        open_folder(folder)


def test_masks_in_old_files_are_no_weights(folder):
    weights = load_file(folder / "model.safetensors")
    old = {"h.0.attn.masked_bias": torch.tensor(-1e4), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | old, folder / "model.safetensors", metadata={"format": "pt"})
    load_hf_model(open_folder(folder))


def test_a_model_with_another_configuration_has_another_fingerprint(folder):
    before = open_folder(folder)
    found = before.config_fingerprint(), before.fingerprint()
    change_json(folder / "config.json", rope_theta=123.0)
    after = open_folder(folder)
    assert before.weights_fingerprint() == after.weights_fingerprint()
    assert found[0] != after.config_fingerprint()
    assert found[1] != after.fingerprint()
