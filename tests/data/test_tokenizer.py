"""Which token separates documents, and what a data folder says about its tokenizer."""

import hashlib
import json

import pytest

from factories import model_folder
from scionlm.core.errors import DataError, UsageError
from scionlm.data.tokenizer import copy_tokenizer, tokenizer_info
from scionlm.sources import load_tokenizer, resolve


@pytest.fixture
def source(tmp_path):
    return model_folder(tmp_path / "model", num_hidden_layers=1)


def info(source, separator=None):
    return tokenizer_info(load_tokenizer(source), resolve(str(source)), separator)


def rename_separator(source, name, **config):
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", name))
    (source / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_own_end_of_text_is_the_separator(source):
    found = info(source)
    assert (found.separator, found.separator_id, found.prefix_id) == ("<|endoftext|>", 0, 0)
    assert found.vocab_size == 320
    assert found.sha256 == hashlib.sha256((source / "tokenizer.json").read_bytes()).hexdigest()


def test_a_chat_models_end_of_turn_is_not_taken_for_the_end_of_text(source):
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    found = info(source)
    assert (found.separator, found.separator_id) == ("<|endoftext|>", 0)
    assert found.prefix_id == 320


@pytest.mark.parametrize(
    ("ordinary", "own", "eos"),
    [
        ("</s>", "<eos>", "<eos>"),  # Gemma: a tag of HTML
        ("<|endoftext|>", "</s>", "</s>"),  # OPT: GPT-2's list
        ("</s>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),  # Command R7B: eos is end of turn
    ],
)
def test_an_ordinary_token_of_such_a_name_is_not_the_end_of_text(source, ordinary, own, eos):
    rename_separator(source, "<pad>", eos_token=eos)
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([ordinary])
    tokenizer.add_special_tokens(list(dict.fromkeys([own, eos])))
    tokenizer.save(str(source / "tokenizer.json"))
    assert info(source).separator == own
    assert info(source, ordinary).separator == ordinary


def test_an_ordinary_token_serves_where_no_other_has_a_name(source):
    rename_separator(source, "<pad>")
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["</s>"])
    tokenizer.save(str(source / "tokenizer.json"))
    assert info(source).separator == "</s>"


def test_the_eos_of_the_config_serves_where_no_name_is_known(source):
    rename_separator(source, "<END>", eos_token={"content": "<END>"})
    assert info(source).separator == "<END>"


def test_a_tokenizer_without_an_end_of_text_asks_for_a_separator(source):
    rename_separator(source, "<END>")
    with pytest.raises(DataError, match="no end-of-text token of a known name; set separator"):
        info(source)
    assert info(source, "<END>").separator_id == 0


def test_a_separator_that_is_no_token_is_a_usage_error_with_the_nearest(source):
    with pytest.raises(UsageError, match=r"'<\|endoftex\|>' is not a token of .*did you mean '<\|endoftext\|>'\?"):
        info(source, "<|endoftex|>")


def test_the_prefix_is_bos_then_eos_then_the_separator(source):
    ids = load_tokenizer(source).get_vocab()
    for config, expected in (
        ({"bos_token": "a", "eos_token": "b"}, "a"),
        ({"eos_token": "b"}, "b"),
        ({}, "<|endoftext|>"),
    ):
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        assert info(source).prefix_id == ids[expected]


@pytest.mark.parametrize("content", ["{", "[]", "5", "\udcff"])
def test_a_broken_tokenizer_config_is_a_data_error_that_names_it(source, content):
    (source / "tokenizer_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        info(source)


def test_the_tokenizers_files_travel_and_the_weights_do_not(source, tmp_path):
    copy_tokenizer(resolve(str(source)), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
