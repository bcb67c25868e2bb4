"""GGUF in: converted once, exactly, or refused with nothing left behind."""

import json
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from factories import tiny_model, tiny_tokenizer
from scionlm.core.errors import DataError
from scionlm.sources import load_hf_model, load_tokenizer, resolve

HEADS, KV_HEADS = 4, 2


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a query or key projection with the order of rows that llama.cpp wants."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: torch.nn.Module, tokenizer) -> Path:
    """Write a tiny Llama as llama.cpp's converter would, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("mit")
    words = [tokenizer.id_to_token(index) for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = dict(model.named_parameters())
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    for name, weight in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(weight.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merges(tokenizer) -> list[str]:
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in found]


@pytest.fixture(scope="module")
def original():
    return tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory, original) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "LICENSE").write_text("a licence")
    return write_gguf(folder / "tiny.gguf", original, tiny_tokenizer(folder))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    return [str(path) for path in cache.rglob("*")] if cache.exists() else []


def test_a_conversion_keeps_the_logits_the_licence_and_the_tokenizer(good, original, cache):
    found = resolve(str(good))
    model = load_hf_model(found)
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.dtype == torch.float32
    assert found.license == "mit"
    assert [path.name for path in found.license_files()] == ["LICENSE"]
    assert found.facts["gguf_file"] == "tiny.gguf"
    text = "the of and to in is was, né"
    assert load_tokenizer(found.path).encode(text).ids == load_tokenizer(good.parent).encode(text).ids


def test_a_conversion_is_done_once(good, cache):
    first = resolve(str(good)).path
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    started = time.process_time()
    assert resolve(str(good)).path == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert time.process_time() - started < 1


def test_another_file_of_the_same_name_is_another_conversion(good, cache, tmp_path):
    changed = bytearray(good.read_bytes())
    changed[-1] ^= 0x40
    (tmp_path / "tiny.gguf").write_bytes(changed)
    assert resolve(str(good)).path != resolve(str(tmp_path / "tiny.gguf")).path


def test_a_gguf_without_the_package_that_reads_it_says_what_to_install(good, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it fails
    with pytest.raises(DataError, match=rf"^{good} needs the gguf package; pip install 'scionlm\[gguf\]'$"):
        resolve(str(good))
    assert left_in(cache) == []


def refuse(path: Path, cache: Path) -> None:
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        resolve(str(path))
    assert time.process_time() - started < 5
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GG",
        b"GGUF",
        b"GGUF\x03\0\0\0",
        b"GGUF\x01\0\0\0" + b"\0" * 64,
        b"PK\x03\x04" * 50,
        b"GGUF\x03\0\0\0" + b"\xff" * 64,
    ],
    ids=["empty", "two-bytes", "magic", "version", "version-1", "zip", "huge-counts"],
)
def test_what_is_no_gguf_is_a_data_error_and_nothing_is_left(tmp_path, cache, content):
    (tmp_path / "x.gguf").write_bytes(content)
    refuse(tmp_path / "x.gguf", cache)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.9999])
def test_a_gguf_cut_short_is_a_data_error_and_nothing_is_left(good, tmp_path, cache, share):
    whole = good.read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[: int(len(whole) * share)])
    refuse(tmp_path / "x.gguf", cache)


def test_a_gguf_that_lacks_a_tensor_is_a_data_error_and_not_random_numbers(good, tmp_path, cache):
    """The tensor's name is changed in place, so that the file is whole but for that."""
    changed = good.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    assert changed != good.read_bytes()
    (tmp_path / "x.gguf").write_bytes(changed)
    with pytest.raises(DataError, match=r"ffn_up|up_proj|ffn_xx"):
        load_hf_model(resolve(str(tmp_path / "x.gguf")))
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "key",
    [
        b"general.architecture",
        b"llama.block_count",
        b"llama.embedding_length",
        b"tokenizer.ggml.tokens",
        b"tokenizer.ggml.model",
    ],
)
def test_a_gguf_that_lacks_a_key_is_a_data_error_and_nothing_is_left(good, tmp_path, cache, key):
    changed = good.read_bytes().replace(key, key[:-1] + b"?")
    assert changed != good.read_bytes()
    (tmp_path / "x.gguf").write_bytes(changed)
    refuse(tmp_path / "x.gguf", cache)


def test_an_unknown_architecture_is_a_data_error_and_nothing_is_left(good, tmp_path, cache):
    value = b"general.architecture" + b"\x08\0\0\0" + b"\x05" + b"\0" * 7
    changed = good.read_bytes().replace(value + b"llama", value + b"zzzzz")
    assert changed != good.read_bytes()
    (tmp_path / "x.gguf").write_bytes(changed)
    refuse(tmp_path / "x.gguf", cache)
