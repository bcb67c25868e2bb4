"""A trimmed vocabulary: a sound smaller tokenizer, each of whose tokens has the embedding that it had."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoTokenizer

import factories
from factories import tiny_model, tiny_tokenizer
from scionlm.core.errors import DataError, UsageError
from scionlm.sources import open_folder
from scionlm.sources.folder import load_tokenizer
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.request import complete_plan
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import remap_token_ids
from scionlm.surgery.vocabulary import match_tokenizer, padding_to, trim_tokenizer

ANY = settings(max_examples=60)
CHAT = ["<|im_start|>", "<|im_end|>"]


def byte_level(folder):
    """A byte-level BPE with a template that adds tokens by number, and added tokens behind the others."""
    folder.mkdir()
    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_special_tokens(CHAT)
    tokenizer.add_tokens([AddedToken("quick brown", normalized=False)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|im_start|> $A <|im_end|>",
                pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in CHAT],
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_file = folder / "tokenizer_config.json"
    decoder = {str(tokenizer.token_to_id(t)): {"content": t, "special": True} for t in ["<|endoftext|>", *CHAT]}
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"added_tokens_decoder": decoder}))
    return folder


def with_fallback(folder):
    """A BPE over characters that falls back to bytes, as Llama 2 has it."""
    folder.mkdir()
    trained = json.loads(tiny_tokenizer(folder).to_str())["model"]["merges"]
    merges = [(a.replace("Ġ", "▁"), b.replace("Ġ", "▁")) for a, b in trained]
    characters = sorted({c for merge in merges for c in "".join(merge)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters, *(a + b for a, b in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    return folder


KINDS = {"byte level": byte_level, "byte fallback": with_fallback}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizers") / "source")


def edit(folder, change, name="tokenizer.json"):
    """Change the JSON in a file of a folder."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def smallest(folder):
    """Return the fewest tokens that a tokenizer can be trimmed to."""
    with pytest.raises(UsageError, match="must stay") as error:
        trim_tokenizer(folder, 1, folder)
    return int(str(error.value).split("between ")[1].split(",")[0])


TEXTS = st.text(max_size=30) | st.lists(
    st.sampled_from(
        [*factories.WORDS[:12], "quick brown", "<|im_end|>", "<|endoftext|>", "é", "日本", "🙂", "\n", "  "]
    )
).map(" ".join)


@given(data=st.data())
@ANY
def test_a_trimmed_tokenizer_is_sound_and_its_tokens_are_the_sources(folder, tmp_path_factory, data):
    before = load_tokenizer(folder)
    total = before.get_vocab_size()
    size = data.draw(st.integers(smallest(folder), total), "size")
    out = tmp_path_factory.mktemp("trimmed")
    rows = trim_tokenizer(folder, size, out)
    after = load_tokenizer(out)
    assert len(rows) == len(set(rows)) == size == after.get_vocab_size()
    assert sorted(after.get_vocab().values()) == list(range(size))
    assert [after.id_to_token(i) for i in range(size)] == [before.id_to_token(row) for row in rows]
    assert match_tokenizer(folder, out) == rows
    for text in data.draw(st.lists(TEXTS, min_size=2, max_size=6), "texts"):
        ids = after.encode(text, add_special_tokens=False).ids
        whole = before.encode(text, add_special_tokens=False).ids
        assert after.decode(ids, skip_special_tokens=False) == before.decode(whole, skip_special_tokens=False)
        if folder.joinpath("tokenizer_config.json").exists():  # no normalizer: lossless
            assert after.decode(ids, skip_special_tokens=False) == text
        framed = after.encode(text)
        added = [before.id_to_token(i) for i in before.encode("").ids]
        assert [token for token in framed.tokens if token in added] == [
            token for token in before.encode(text).tokens if token in added
        ]
        assert [after.token_to_id(token) for token in framed.tokens] == framed.ids
    if size == total:
        assert rows == tuple(range(total))
        assert after.encode("the of and 日").tokens == before.encode("the of and 日").tokens


def test_merges_written_as_words_or_as_pairs_give_the_same(folder, tmp_path):
    other = tmp_path / "words"
    shutil.copytree(folder, other)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, list) for merge in merges)
    edit(other, lambda spec: spec["model"].update(merges=[" ".join(merge) for merge in merges]))
    size = smallest(folder) + 5
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert trim_tokenizer(folder, size, tmp_path / "a") == trim_tokenizer(other, size, tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (tmp_path / "b" / "tokenizer.json").read_text()


def test_transformers_reads_the_trimmed_tokenizer_with_its_special_tokens(tmp_path):
    source = byte_level(tmp_path / "source")
    (tmp_path / "out").mkdir()
    trim_tokenizer(source, 300, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == 300
    assert found.eos_token == "<|endoftext|>"
    listed = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(number): entry["content"] for number, entry in listed.items()} == {
        found.convert_tokens_to_ids(token): token for token in ["<|endoftext|>", *CHAT]
    }
    assert found.convert_ids_to_tokens(found("the").input_ids)[0] == "<|im_start|>"


def test_a_padding_setting_follows_its_token(tmp_path):
    source = byte_level(tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(CHAT[1]), pad_token=CHAT[1])
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    trim_tokenizer(source, 300, tmp_path / "out")
    after = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = after.encode_batch(["the of and to in is", "the"])[1].ids
    assert after.id_to_token(ids[-1]) == CHAT[1]


def test_merges_in_any_order_give_the_number_asked_for(tmp_path):
    """A merge may stand in front of the one that makes its part."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}, [("ab", "c"), ("a", "b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for size in (3, 4, 5):
        (tmp_path / str(size)).mkdir()
        rows = trim_tokenizer(tmp_path, size, tmp_path / str(size))
        assert len(rows) == load_tokenizer(tmp_path / str(size)).get_vocab_size() == size


def refuse_wordpiece(spec):
    spec["model"] = {"type": "WordPiece", "vocab": {"a": 0}}


BROKEN = {
    "another model": refuse_wordpiece,
    "no model": lambda spec: spec.pop("model"),
    "no merges": lambda spec: spec["model"].pop("merges"),
    "merges no list": lambda spec: spec["model"].update(merges=3),
    "a merge of one": lambda spec: spec["model"]["merges"].insert(0, "x"),
    "a merge of numbers": lambda spec: spec["model"]["merges"].insert(0, [1, 2]),
    "an id is no number": lambda spec: spec["model"]["vocab"].update(a="x"),
    "an added token without content": lambda spec: spec.update(added_tokens=[{"id": 0}]),
    "an added token without id": lambda spec: spec.update(added_tokens=[{"content": "x"}]),
    "added tokens no list": lambda spec: spec.update(added_tokens={"a": 1}),
    "another post-processor": lambda spec: spec.update(
        post_processor={"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}
    ),
    "a template without tokens": lambda spec: spec.update(post_processor={"type": "TemplateProcessing"}),
    "a template of unknown tokens": lambda spec: spec["post_processor"]["processors"][1]["special_tokens"].update(
        x={"id": "x", "ids": [9], "tokens": ["not there"]}
    ),
    "a post-processor that is a list": lambda spec: spec.update(post_processor=[1]),
    "a sequence of nothing": lambda spec: spec.update(post_processor={"type": "Sequence"}),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_tokenizer_that_is_broken_or_of_another_kind_is_refused(tmp_path, change):
    source = edit(byte_level(tmp_path / "source"), change)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        trim_tokenizer(source, 300, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_list_of_added_tokens_is_refused(tmp_path):
    source = edit(
        byte_level(tmp_path / "source"),
        lambda found: found["added_tokens_decoder"].update(first={"content": "x"}),
        "tokenizer_config.json",
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        trim_tokenizer(source, 300, tmp_path / "out")


@pytest.mark.parametrize("size", [0, -5, 100, 324, 10**9])
def test_a_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(UsageError, match="must stay"):
        trim_tokenizer(byte_level(tmp_path / "source"), size, tmp_path)


def test_a_tokenizer_of_other_tokens_or_with_gaps_is_refused(tmp_path):
    source = byte_level(tmp_path / "source")
    more, gaps = tmp_path / "more", tmp_path / "gaps"
    shutil.copytree(source, more)
    edit(more, lambda spec: spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 323, "content": "<new>"}))
    with pytest.raises(DataError, match="<new>"):
        match_tokenizer(source, more)
    gaps.mkdir()
    Tokenizer(models.BPE({"a": 0, "b": 2}, [])).save(str(gaps / "tokenizer.json"))
    with pytest.raises(DataError, match="gaps"):
        match_tokenizer(gaps, gaps)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        match_tokenizer(source, tmp_path)


# --- the model beside it ---


def trimmed(root, size, model_type="llama", padding=0, **changes):
    """Return (source's folder, source's tokenizer, target's, target's tokenizer)."""
    source = byte_level(root / "source")
    tiny_model(model_type, vocab_size=323, **changes).save_pretrained(source)
    (root / "out").mkdir()
    rows = trim_tokenizer(source, size, root / "out")
    plan = replace(plan_depth(5, 2), vocab=rows, vocab_padding=padding)
    with open_surgery([open_folder(source)], plan) as surgery:
        surgery.write(root / "out")
        target = surgery.build(torch.float32)
        proof = surgery.prove(target)
    return source, target, proof, root / "out"


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_each_token_keeps_its_embedding_and_its_output(tmp_path, tied):
    source, target, _, out = trimmed(tmp_path, 290, tie_word_embeddings=tied)
    theirs = open_folder(source)
    before, after = load_tokenizer(source), load_tokenizer(out)
    with open_surgery([theirs], plan_depth(5, 2)) as surgery:
        whole = surgery.build(torch.float32)
    old, new = whole.get_input_embeddings().weight, target.get_input_embeddings().weight
    old_head, new_head = whole.get_output_embeddings().weight, target.get_output_embeddings().weight
    for token, number in after.get_vocab().items():
        assert torch.equal(new[number], old[before.token_to_id(token)]), token
        assert torch.equal(new_head[number], old_head[before.token_to_id(token)]), token
    assert new.shape[0] == new_head.shape[0] == 290
    assert (new is new_head) == tied


def test_special_tokens_of_model_and_generation_follow(tmp_path):
    source = byte_level(tmp_path / "source")
    end, start = 321, 320
    tiny_model(vocab_size=323, eos_token_id=[0, end], bos_token_id=start, pad_token_id=end).save_pretrained(source)
    record = {"eos_token_id": [end, 0], "bos_token_id": start, "forced_eos_token_id": end, "max_length": 20}
    (source / "generation_config.json").write_text(json.dumps(record))
    rows = trim_tokenizer(source, 290, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with open_surgery([open_folder(source)], replace(plan_depth(5, 1), vocab=rows)) as surgery:
        config, generation = surgery.config, surgery.generation_config()
    ids = {token: tokenizer.token_to_id(token) for token in ["<|endoftext|>", *CHAT]}
    before = {"<|endoftext|>": 0, CHAT[0]: start, CHAT[1]: end}
    assert ids[CHAT[1]] != end
    assert {rows[ids[token]] for token in ids} == set(before.values())
    assert config["eos_token_id"] == [0, ids[CHAT[1]]]
    assert (config["bos_token_id"], config["pad_token_id"]) == (ids[CHAT[0]], ids[CHAT[1]])
    assert generation == {
        "eos_token_id": [ids[CHAT[1]], 0], "bos_token_id": ids[CHAT[0]], "forced_eos_token_id": ids[CHAT[1]],
        "max_length": 20,
    }  # fmt: skip


def test_a_token_that_is_gone_is_null_and_no_other_number_changes():
    plan = replace(plan_depth(5, 1), vocab=(7, 3, 9))
    settings_ = {"eos_token_id": 9, "bos_token_id": 4, "pad_token_id": [3, 4], "sep_token_id": [4], "max_length": 3}
    settings_ |= {"decoder_start_token_id": None, "use_cache": True, "vocab_size": 10}
    assert remap_token_ids(settings_, plan) == settings_ | {
        "eos_token_id": 2, "bos_token_id": None, "pad_token_id": [1], "sep_token_id": None,
    }  # fmt: skip
    assert settings_["eos_token_id"] == 9
    assert remap_token_ids(settings_, plan_depth(5, 1)) == settings_


@pytest.mark.parametrize(
    "record",
    [{"suppress_tokens": [9, 4]}, {"begin_suppress_tokens": [9]}, {"bad_words_ids": [[9], [4]]}],
    ids=["suppress", "begin", "bad words"],
)
def test_other_lists_of_tokens_do_not_go_on_meaning_other_tokens(record):
    """Tokens 9 and 4 are 2 and gone: what is left must not name 9 or 4."""
    after = remap_token_ids(dict(record), replace(plan_depth(5, 1), vocab=(7, 3, 9)))
    assert "9" not in json.dumps(after)
    assert "4" not in json.dumps(after)


def test_of_a_sequence_of_tokens_nothing_is_left_where_one_is_gone():
    """What is left of a banned phrase would ban its first token everywhere."""
    settings_ = {"bad_words_ids": [[9, 4], [3, 9], [4]], "force_words_ids": [[[7, 9], [4, 7]], [3, 4]]}
    after = remap_token_ids(settings_, replace(plan_depth(5, 1), vocab=(7, 3, 9)))
    assert after == {"bad_words_ids": [[1, 2]], "force_words_ids": [[[0, 2]]]}


def test_tokens_that_the_configuration_leaves_to_transformers_follow_too(tmp_path):
    """Without a word about it Llama's end is token 2, which is another token afterwards."""
    source = byte_level(tmp_path / "source")
    tiny_model(vocab_size=323).save_pretrained(source)
    edit(source, lambda c: [c.pop(key) for key in ("eos_token_id", "bos_token_id", "pad_token_id")], "config.json")
    assert AutoConfig.from_pretrained(source).eos_token_id == 2
    rows = (5, 6, 2, *range(7, 200))
    (tmp_path / "out").mkdir()
    with open_surgery([open_folder(source)], replace(plan_depth(5, 1), vocab=(9, *rows))) as surgery:
        surgery.write(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 3


@pytest.mark.parametrize("how", ["vocab_size", "tokenizer"])
def test_tokens_without_an_embedding_are_refused(tmp_path, how):
    """A tokenizer may have more tokens than the model has rows; what lies behind them is another tensor."""
    source = byte_level(tmp_path / "source")
    tiny_model(vocab_size=320).save_pretrained(source)
    folder = open_folder(source)
    with pytest.raises((DataError, UsageError), match="token"):
        plan_vocabulary(folder, how, tmp_path)


def test_an_added_token_without_an_embedding_goes_and_is_nowhere_named(tmp_path):
    """Gemma 3's text models have no embedding for the token of images, and their tokenizers name it in many places."""
    source = byte_level(tmp_path / "source")
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(source / "tokenizer.json"))
    named = {"image_token": "<image>", "extra_special_tokens": {"image_token": "<image>", "end": "<|im_end|>"}}
    edit(source, lambda config: config.update(named), "tokenizer_config.json")
    edit(source, lambda c: c["added_tokens_decoder"].update({"323": {"content": "<image>"}}), "tokenizer_config.json")
    extra = {"eos_token": "<|endoftext|>", "image_token": {"content": "<image>"}, "other": ["<image>", CHAT[0]]}
    (source / "special_tokens_map.json").write_text(json.dumps(extra))
    tiny_model(vocab_size=323).save_pretrained(source)
    for size in (300, 323):
        out = tmp_path / str(size)
        out.mkdir()
        rows = trim_tokenizer(source, size, out)
        assert len(rows) == load_tokenizer(out).get_vocab_size() == len(AutoTokenizer.from_pretrained(out)) == size
        assert max(rows) < 323
        assert not [path.name for path in out.iterdir() if "<image>" in path.read_text()]
        assert json.loads((out / "special_tokens_map.json").read_text())["other"] == [CHAT[0]]
        complete_plan(plan_depth(5, 1), {"vocab_size": size}, open_folder(source), None, rows)
    with pytest.raises(UsageError, match=r"must stay, and 323$"):
        trim_tokenizer(source, 324, tmp_path)
    with pytest.raises(DataError, match="number 323, but there are only 323"):
        complete_plan(plan_depth(5, 1), {"tokenizer": str(source)}, open_folder(source), None)


def plan_vocabulary(folder, how, out):
    rows = trim_tokenizer(folder.path, 300, out) if how == "vocab_size" else None
    options = {"vocab_size": 300} if how == "vocab_size" else {"tokenizer": str(folder.path)}
    plan = complete_plan(plan_depth(5, 1), options, folder, None, rows)
    with open_surgery([folder], plan) as surgery:
        surgery.build(torch.float32)


# --- padding ---


@given(st.integers(1, 10**6), st.integers(1, 2**20))
@ANY
def test_padding_reaches_the_next_multiple(size, multiple):
    added = padding_to(size, multiple)
    assert 0 <= added < multiple
    assert (size + added) % multiple == 0


@pytest.mark.parametrize("multiple", [0, -64, 2**21])
def test_a_multiple_that_is_none_is_refused(multiple):
    with pytest.raises(UsageError, match="pad_vocab_to"):
        padding_to(300, multiple)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("gemma2", True)])
@torch.no_grad()
def test_padded_rows_are_never_the_most_likely(tmp_path, model_type, tied):
    _, target, proof, _ = trimmed(tmp_path, 290, model_type, padding=222, tie_word_embeddings=tied)
    assert target.config.vocab_size == 512
    assert any("padded" in check for check in proof.checks)
    ids = torch.randint(0, 290, (8, 30), generator=torch.Generator().manual_seed(0))
    logits = target(ids).logits
    assert int(logits.argmax(-1).max()) < 290
    mean = logits[..., :290].mean(-1, keepdim=True).expand(-1, -1, 222)
    assert torch.allclose(logits[..., 290:], mean, atol=1e-3 * float(logits.abs().max()))
    embedding = target.get_input_embeddings().weight
    assert torch.equal(embedding[290:], embedding[290].expand(222, -1))


@pytest.mark.parametrize("fresh", ["embedding", "head"])
@torch.no_grad()
def test_padded_rows_of_fresh_weights_are_never_the_most_likely_either(tmp_path, fresh):
    tiny_model(tie_word_embeddings=fresh == "embedding").save_pretrained(tmp_path)
    folder = open_folder(tmp_path)
    plan = complete_plan(plan_depth(5, 2), {"fresh": fresh, "pad_vocab_to": 1024}, folder, None)
    with open_surgery([folder], plan) as surgery:
        target = surgery.build(torch.float32)
    ids = torch.randint(0, 320, (4, 30), generator=torch.Generator().manual_seed(0))
    assert int(target(ids).logits.argmax(-1).max()) < 320
