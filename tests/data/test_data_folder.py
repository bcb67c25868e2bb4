"""A prepared folder as a stream of tokens."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, UsageError
from scionlm.data import DataFolder, TokenStream
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

quick = settings(max_examples=150)
INFO = TokenizerInfo("tiny", "0" * 64, 320, "<|endoftext|>", 0, 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of different lengths, the shortest of one token, and their tokens as one array."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    lengths = [[3, 5], [0], [17], [1, 1, 1], [40, 2]]
    result = []
    for number, documents in enumerate(lengths):
        arrays = [rng.integers(1, 320, size=length) for length in documents]
        write_shard(folder / f"{number}", arrays, [2 * len(a) + 1 for a in arrays], INFO)
        result.append(Shard(folder / f"{number}"))
    return result, np.concatenate([shard.tokens for shard in result]).astype(np.int64)


@quick
@given(data=st.data())
def test_a_read_across_shard_borders_is_a_slice_of_one_array(shards, data):
    stream, whole = TokenStream(shards[0]), shards[1]
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    found = stream.read(start, length)
    assert found.dtype == np.int64
    assert np.array_equal(found, whole[start : start + length])


def test_a_read_outside_the_stream_is_not_answered(shards):
    stream = TokenStream(shards[0])
    for start, length in ((-1, 2), (0, stream.num_tokens + 1), (stream.num_tokens, 1)):
        with pytest.raises(AssertionError):
            stream.read(start, length)


def test_documents_lie_one_after_another_with_a_separator_between(shards):
    stream, whole = TokenStream(shards[0]), shards[1]
    documents = list(stream.documents())
    assert len(documents) == stream.num_documents == 9
    assert documents[0].start == 0
    assert documents[-1].end == stream.num_tokens - 1
    for document, later in zip(documents, [*documents[1:], None], strict=True):
        assert whole[document.end] == 0
        assert np.all(whole[document.start : document.end] != 0)
        assert document.num_bytes == 2 * (document.end - document.start) + 1
        assert later is None or later.start == document.end + 1


def test_an_empty_stream_is_one():
    stream = TokenStream([])
    assert (stream.num_tokens, stream.num_documents, list(stream.documents())) == (0, 0, [])
    assert len(stream.read(0, 0)) == 0


@pytest.fixture
def folder(data_folder, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(data_folder.path, tmp_path / "data")


def change_index(folder, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_a_good_folder_opens(folder):
    data = DataFolder(folder)
    assert data.domains == ["alpha", "beta"]
    for domain in data.domains:
        for split in ("train", "held_out"):
            stream = data.stream(domain, split, verify=True)
            assert stream.num_tokens == data.num_tokens(domain, split) > 0
            assert sum(document.num_bytes for document in stream.documents()) == data.num_bytes(domain, split)
    assert (data.tokenizer_folder / "tokenizer.json").is_file()


def test_a_folder_that_is_not_there_or_not_finished_says_so(folder, tmp_path):
    with pytest.raises(UsageError, match="scion prepare"):
        DataFolder(tmp_path / "nowhere")
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="has not finished"):
        DataFolder(folder)


def test_an_unknown_domain_is_named_with_the_nearest(folder):
    with pytest.raises(UsageError, match=r"'alfa' is not in .*did you mean 'alpha'\? \(has: alpha, beta\)"):
        DataFolder(folder).stream("alfa", "train")


def test_a_flipped_bit_is_found_by_verify(folder):
    path = next((folder / "alpha").glob("train-*"))
    data = bytearray(path.read_bytes())
    tokens = Shard(path)
    data[bytes(data).index(tokens.tokens.tobytes()) + 7] ^= 1
    path.write_bytes(data)
    DataFolder(folder).stream("alpha", "train")
    with pytest.raises(DataError, match=r"train-00000-00000\.safetensors does not match its sha256"):
        DataFolder(folder).stream("alpha", "train", verify=True)


def test_a_missing_or_truncated_shard_is_refused_by_name(folder):
    path = next((folder / "beta").glob("held_out-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"beta/held_out-00000-00000\.safetensors is cut short"):
        DataFolder(folder).stream("beta", "held_out")
    path.unlink()
    with pytest.raises(DataError, match=r"beta/held_out-00000-00000\.safetensors is missing"):
        DataFolder(folder).stream("beta", "held_out")
    assert DataFolder(folder).stream("beta", "train").num_tokens > 0


def test_a_shard_of_another_tokenizer_is_refused_by_name(folder):
    change_index(folder, lambda index: index["tokenizer"].update(sha256="1" * 64))
    with pytest.raises(DataError, match=r"train-00000-00000\.safetensors was made with another tokenizer"):
        DataFolder(folder).stream("alpha", "train")


def test_a_shard_of_another_domain_in_its_place_is_refused_by_name(folder):
    shutil.copyfile(
        folder / "beta" / "train-00000-00000.safetensors", folder / "alpha" / "train-00000-00000.safetensors"
    )
    with pytest.raises(
        DataError, match=r"alpha/train-00000-00000\.safetensors is not the shard that index\.json lists"
    ):
        DataFolder(folder).stream("alpha", "train")


def test_an_index_that_leaves_the_folder_is_not_followed(folder):
    shutil.copytree(folder / "alpha", folder.parent / "outside")
    change_index(
        folder,
        lambda index: index["domains"]["alpha"]["train"]["shards"][0].update(
            file="../../outside/train-00000.safetensors"
        ),
    )
    with pytest.raises((DataError, UsageError), match=r"outside"):
        DataFolder(folder).stream("alpha", "train")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("tokenizer"),
        lambda index: index.pop("domains"),
        lambda index: index.update(tokenizer=[]),
        lambda index: index["tokenizer"].pop("separator_id"),
        lambda index: index.update(domains=[]),
        lambda index: index["domains"].update(alpha={}),
        lambda index: index["domains"]["alpha"]["train"].update(shards=[{}]),
    ],
    ids=["no-tokenizer", "no-domains", "tokenizer-list", "no-separator", "domains-list", "no-splits", "no-file"],
)
def test_an_index_that_lacks_something_is_a_data_error(folder, change):
    change_index(folder, change)
    with pytest.raises(DataError):
        DataFolder(folder).stream("alpha", "train")


def test_an_index_of_a_newer_format_is_refused_by_name(folder):
    change_index(folder, lambda index: index.update(format_version=2))
    with pytest.raises(DataError, match=r"index\.json has format_version 2"):
        DataFolder(folder)


def test_the_fingerprint_follows_every_shard(folder, data_folder):
    before = DataFolder(folder).fingerprint
    assert before == data_folder.fingerprint
    for domain in ("alpha", "beta"):
        for split in ("train", "held_out"):
            original = (folder / "index.json").read_text()
            change_index(
                folder, lambda index, d=domain, s=split: index["domains"][d][s]["shards"][0].update(sha256="0" * 64)
            )
            assert DataFolder(folder).fingerprint != before
            (folder / "index.json").write_text(original)


@pytest.mark.parametrize("key", ["separator_id", "bos_id"])
def test_a_shard_of_another_policy_is_refused_by_name(folder, key):
    change_index(folder, lambda index: index["tokenizer"].update({key: 5}))
    with pytest.raises(DataError, match=r"train-00000-00000\.safetensors has another separator or BOS"):
        DataFolder(folder).stream("alpha", "train")
