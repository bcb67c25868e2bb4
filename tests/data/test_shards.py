"""Token shards: what goes in comes out, and damage is found."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, StorageError
from scionlm.data.shards import Shard, TokenizerInfo, token_dtype, write_shard

quick = settings(max_examples=60)


def tokenizer_info(vocab_size: int = 320, separator_id: int = 0) -> TokenizerInfo:
    return TokenizerInfo("tiny", "0" * 64, vocab_size, "<|endoftext|>", separator_id, separator_id)


DOCUMENTS = [np.array(ids) for ids in ([5, 6, 7], [8], [9, 300, 11, 12])]
SIZES = [10, 3, 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def path(tmp_path):
    write_shard(tmp_path / "train-00000.safetensors", DOCUMENTS, SIZES, tokenizer_info())
    return tmp_path / "train-00000.safetensors"


@quick
@given(
    documents=st.lists(st.lists(st.integers(1, 99_999), max_size=12), min_size=1, max_size=6),
    vocab_size=st.sampled_from([100_000, 2**17]),
)
def test_documents_come_back_each_with_a_separator_after_it(folder, documents, vocab_size):
    path = folder / "s.safetensors"
    sizes = [3 * len(ids) + 1 for ids in documents]
    write_shard(path, [np.array(ids, dtype=np.uint32) for ids in documents], sizes, tokenizer_info(vocab_size, 0))
    shard = Shard(path)
    shard.verify()
    assert shard.tokens.tolist() == [token for ids in documents for token in [*ids, 0]]
    assert shard.document_ends.tolist() == np.cumsum([len(ids) + 1 for ids in documents]).tolist()
    assert shard.document_bytes.tolist() == sizes


def test_the_entry_for_the_index_states_what_the_file_holds(tmp_path):
    entry = write_shard(tmp_path / "s.safetensors", DOCUMENTS, SIZES, tokenizer_info())
    header = Shard(tmp_path / "s.safetensors").header
    assert entry == {
        "file": "s.safetensors",
        "num_tokens": 11,
        "num_documents": 3,
        "num_bytes": 33,
        "sha256": header["sha256"],
    }
    assert header["format_version"] == 1
    assert header["tokenizer"]["separator"] == "<|endoftext|>"
    assert header["tokenizer"]["separator_position"] == "after each document"


def test_any_safetensors_reader_opens_a_shard(path):
    found = safetensors.numpy.load_file(path)
    assert found["tokens"].dtype == np.uint16
    assert np.array_equal(found["tokens"], Shard(path).tokens)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(320, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32), (128_256, np.uint32)]
)
def test_the_type_holds_the_largest_id(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype
    write_shard(tmp_path / "s", [np.array([vocab_size - 1], dtype=np.uint32)], [1], tokenizer_info(vocab_size))
    assert Shard(tmp_path / "s").tokens.tolist() == [vocab_size - 1, 0]


def test_the_same_documents_make_the_same_bytes(tmp_path, path):
    write_shard(tmp_path / "again", DOCUMENTS, SIZES, tokenizer_info())
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    write_shard(tmp_path / "other", [*DOCUMENTS[:2], DOCUMENTS[2] + 1], SIZES, tokenizer_info())
    assert (tmp_path / "other").read_bytes() != path.read_bytes()


def places(path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return {
        name: tuple(8 + length + offset for offset in entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("part", ["tokens", "document_ends", "document_bytes"])
def test_a_flipped_bit_is_found(path, part):
    whole = path.read_bytes()
    first, last = places(path)[part]
    for at in range(first, last):
        for bit in (0, 5):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=r"train-00000\.safetensors"):
                Shard(path).verify()
    path.write_bytes(whole)
    Shard(path).verify()


def test_a_flipped_bit_in_the_header_is_a_data_error_or_changes_nothing_that_counts(path):
    whole = path.read_bytes()
    before = Shard(path)
    for at in range(min(first for first, _ in places(path).values())):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        try:
            shard = Shard(path)
            shard.verify()
        except DataError:
            continue
        assert np.array_equal(shard.tokens, before.tokens)
        assert np.array_equal(shard.document_ends, before.document_ends)
        assert np.array_equal(shard.document_bytes, before.document_bytes)


def test_a_shard_cut_short_anywhere_is_refused_by_name(path):
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-00000\.safetensors .*prepare the data again"):
            Shard(path)


def test_a_shard_with_trailing_bytes_or_none_at_all_is_refused_by_name(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"train-00000\.safetensors is cut short or has trailing bytes"):
        Shard(path)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.safetensors is missing"):
        Shard(path)


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b"{}", b'{"__metadata__": {"scion": "{}"}}', b"\xff\xff", b"[" * 50_000]
)
def test_what_is_no_shard_is_refused_by_name(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DataError, match=r"x\.safetensors"):
        Shard(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": []},
        {"data_offsets": [0, "x"]},
        {"shape": [-1]},
        {"shape": [10**9]},
        {"dtype": "F4"},
        {"shape": 3},
    ],
)
def test_a_shard_whose_table_lies_is_refused_by_name(path, changes):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["tokens"] |= changes
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    with pytest.raises(DataError, match=r"train-00000\.safetensors"):
        Shard(path)


def test_a_shard_of_a_newer_format_is_refused_by_name(tmp_path):
    tensors = {name: np.zeros(1, dtype=np.int64) for name in ("document_ends", "document_bytes")}
    tensors["tokens"] = np.zeros(1, dtype=np.uint16)
    data = safetensors.numpy.save(tensors, {"scion": json.dumps({"format_version": 2})})
    (tmp_path / "new.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"new\.safetensors has format_version 2"):
        Shard(tmp_path / "new.safetensors")


def test_a_shard_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_shard(tmp_path / "file" / "s", DOCUMENTS, SIZES, tokenizer_info())


def test_an_id_beyond_the_vocabulary_is_refused_by_name(tmp_path):
    write_shard(tmp_path / "x.safetensors", [np.array([5, 99])], [3], tokenizer_info(vocab_size=99))
    shard = Shard(tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"x\.safetensors holds the token id 99, its tokenizer has 99"):
        shard.verify()
