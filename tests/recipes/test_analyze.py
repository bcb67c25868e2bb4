"""`analyze`: the text that is drawn, what is measured on it, and how it is kept part by part."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from factories import corpora_file, model_folder, tiny_model
from scionlm import api
from scionlm.analysis import forward, gradients, removal
from scionlm.core.errors import DataError, ScionError, StoppedError, StorageError, UsageError
from scionlm.core.files import folder_lock
from scionlm.core.log import Progress
from scionlm.core.records import FORMAT_VERSION
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.data.folder import TokenStream
from scionlm.parallel.runtime import Runtime
from scionlm.recipes import analysis_store
from scionlm.recipes import analyze as recipe
from scionlm.recipes.analysis_options import AnalyzeOptions, options_of
from scionlm.recipes.sample import draw_sample
from scionlm.sources import load_hf_model, open_folder

SMALL = {"seq_len": 16, "num_sequences": 6, "loss_sequences": 3, "greedy": 2}
PARTS = {
    "forward": (forward, "forward_pass"),
    "gradients": (gradients, "gradient_pass"),
    "removal": (removal, "removal_losses"),
    "lens": (removal, "lens_losses"),
    "greedy-2": (removal, "greedy_removal"),
}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, tiny_folder):
    """Another model with the same tokenizer, of three layers."""
    return model_folder(tmp_path_factory.mktemp("other") / "other", num_hidden_layers=3, seed=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, data_folder):
    """A finished analysis: (folder, what was returned)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, analyze(tiny_folder, data_folder, out)


@pytest.fixture
def done(whole, tmp_path):
    """A copy of a finished analysis, to be played with."""
    return Path(shutil.copytree(whole[0], tmp_path / "out"))


def analyze(model, data, out=None, against=None, **options):
    """Analyse, and draw no page."""
    return recipe.analyze_folder(str(model), str(data.path), out, options_of(SMALL | options), against)


def timeless(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "format_version")}


def contents(folder):
    """Return every file of a folder, and when it was changed; a lock says who holds it at the moment."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def measured(monkeypatch):
    """The parts that are measured from now on, and how often a model is loaded."""
    calls, inside = [], []

    def counting(name, original):
        def counted(*arguments, **keywords):
            if not inside:  # greedy removal calls the other one
                calls.append(name)
            inside.append(name)
            try:
                return original(*arguments, **keywords)
            finally:
                inside.pop()

        return counted

    for name, (module, function) in PARTS.items():
        monkeypatch.setattr(module, function, counting(name.partition("-")[0], getattr(module, function)))
    monkeypatch.setattr("scionlm.sources.load_hf_model", counting("load", load_hf_model))
    return calls


# --- the sample ---


def windows(data, domain, split, length):
    stream = data.stream(domain, split)
    tokens = stream.read(0, stream.num_tokens)
    return {tokens[start : start + length].tobytes() for start in range(len(tokens) - length + 1)}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_windows_come_from_their_split_and_domain_and_from_nowhere_else(data_folder, split):
    sample = draw_sample(data_folder, split, None, 12, 64, 0)
    assert sample.ids.shape == (12, 64)
    assert sample.ids.dtype == np.int64
    assert sample.domains == ["alpha", "beta"] * 6
    unwanted = "held_out" if split == "train" else "train"
    for row, domain in zip(sample.ids, sample.domains, strict=True):
        assert row.tobytes() in windows(data_folder, domain, split, 64)
        for name in data_folder.domains:
            assert row.tobytes() not in windows(data_folder, name, unwanted, 64)


def test_training_text_is_what_is_looked_at_unless_the_other_is_asked_for():
    assert AnalyzeOptions().split == "train"


@pytest.mark.parametrize(
    ("domains", "count", "wanted"),
    [
        (None, 5, ["alpha", "beta", "alpha", "beta", "alpha"]),
        (["beta"], 3, ["beta"] * 3),
        (["beta", "alpha"], 3, ["beta", "alpha", "beta"]),
        (["beta", "beta"], 2, ["beta", "beta"]),
        (None, 1, ["alpha"]),
    ],
)
def test_domains_take_turns(data_folder, domains, count, wanted):
    assert draw_sample(data_folder, "train", domains, count, 8, 0).domains == wanted


def test_no_two_windows_start_at_the_same_place(data_folder, monkeypatch):
    starts = []
    read = TokenStream.read

    def seen(stream, start, length):
        starts.append((id(stream), start))
        assert 0 <= start <= stream.num_tokens - length
        return read(stream, start, length)

    monkeypatch.setattr(TokenStream, "read", seen)
    sizes = [data_folder.num_tokens(name, "held_out") // 16 for name in data_folder.domains]
    draw_sample(data_folder, "held_out", None, 2 * min(sizes), 16, 0)
    assert len(set(starts)) == len(starts) == 2 * min(sizes)


def test_the_seed_decides_the_sample(data_folder):
    first, same, other = (draw_sample(data_folder, "train", None, 8, 16, seed).ids for seed in (3, 3, 4))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_domain_may_be_used_up_but_not_more(data_folder):
    tokens = data_folder.num_tokens("beta", "held_out")
    only = draw_sample(data_folder, "held_out", ["beta"], 1, tokens, 0)
    stream = data_folder.stream("beta", "held_out")
    assert np.array_equal(only.ids[0], stream.read(0, tokens))
    draw_sample(data_folder, "held_out", ["beta"], tokens // 7, 7, 0)
    for count, length in ((1, tokens + 1), (tokens // 7 + 1, 7), (10**6, 1000)):
        with pytest.raises(DataError, match=rf"'beta'.*{tokens:,} held_out tokens.*ask for fewer or shorter"):
            draw_sample(data_folder, "held_out", ["beta"], count, length, 0)


def test_a_domain_that_has_no_turn_may_be_as_short_as_it_is(data_folder):
    longer, shorter = sorted(data_folder.domains, key=lambda name: -data_folder.num_tokens(name, "held_out"))
    length = data_folder.num_tokens(longer, "held_out")
    assert data_folder.num_tokens(shorter, "held_out") < length
    assert draw_sample(data_folder, "held_out", [longer, shorter], 1, length, 0).domains == [longer]


# --- what is measured ---

LAYER = {
    "index": int, "max_rank": float, "mean_mass": float, "lazy": bool, "rank1_head_ratio": float,
    "block_influence": float,
}  # fmt: skip


def test_the_record_has_what_others_rely_on(whole):
    out, found = whole
    record = json.loads((out / "analysis.json").read_text())
    assert record["format_version"] == 1
    assert timeless(record) == timeless(found.record)
    assert (record["seq_len"], record["num_sequences"], record["tau"], record["eta"]) == (16, 6, 0.9, 0.9)
    assert [layer["index"] for layer in record["layers"]] == [0, 1, 2, 3, 4]
    for layer in record["layers"]:
        for key, kind in LAYER.items():
            assert type(layer[key]) is kind, key
        assert 1 <= layer["max_rank"] <= 16
        assert 1 <= layer["mean_mass"] <= 16
        assert 0 <= layer["rank1_head_ratio"] <= 1
        assert layer["lazy"] == (layer["max_rank"] < 1.5)
    assert record["data"]["split"] == "train"
    assert [each["name"] for each in record["domains"]] == ["alpha", "beta"]
    assert len(record["greedy"]["order"]) == len(record["greedy"]["nll"]) == 2
    assert len(record["layer_scores"]) == 5
    assert len(record["lens"]) == len(record["similarity"]) == 6
    assert set(record["seconds"]) == set(PARTS)


def test_the_files_say_the_same(whole):
    out, found = whole
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    wanted = {"analysis.json", "maps.json", "settings.json", "layers.csv", "heads.csv"}
    assert wanted | {f"arrays/{part}.safetensors" for part in PARTS} <= set(names)
    assert not [name for name in names if name.endswith(".tmp")]
    for table in ("layers", "heads"):
        with (out / f"{table}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows == [{key: str(value) for key, value in row.items()} for row in found.record[table]]
    maps = json.loads((out / "maps.json").read_text())
    assert len(maps["maps"]) == 10
    for shown in maps["maps"]:
        attention = np.array(shown["attention"])
        assert attention.shape == (16, 16)
        assert np.allclose(attention.sum(1), 1, atol=2e-3)
        assert np.allclose(np.triu(attention, 1), 0)
    for part, arrays in found.arrays.items():
        path = next((out / "arrays").glob(f"{part}*.safetensors"))
        with safe_open(path, "numpy") as file:
            assert file.metadata()["format_version"] == str(FORMAT_VERSION)
            assert set(file.keys()) == set(arrays)
            assert all(np.array_equal(file.get_tensor(name), values) for name, values in arrays.items())


def test_numbers_are_those_that_transformers_gives(whole, tiny_folder, data_folder):
    record = whole[1].record
    ids = torch.from_numpy(draw_sample(data_folder, "train", None, 6, 16, 0).ids)
    model = load_hf_model(open_folder(tiny_folder), torch.float32, "eager")
    with torch.no_grad():
        seen = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(seen.logits[:3, :-1].flatten(0, 1), ids[:3, 1:].flatten())
    assert record["overall"]["nll"] == pytest.approx(float(loss), rel=1e-5)
    for layer, matrices in zip(record["layers"], seen.attentions, strict=True):
        energies = torch.linalg.svdvals(matrices.double()).square()
        ranks = ((energies.cumsum(-1) / energies.sum(-1, keepdim=True)) < 0.9).sum(-1) + 1
        assert layer["max_rank"] == pytest.approx(float(ranks.double().mean(0).max()))
        masses = matrices.double().square().sum(-2).sort(-1, descending=True).values
        columns = ((masses.cumsum(-1) / masses.sum(-1, keepdim=True)) < 0.9).sum(-1) + 1
        assert layer["mean_mass"] == pytest.approx(float(columns.double().mean()))
        assert layer["rank1_head_ratio"] == float((ranks.double().mean(0) < 1.5).double().mean())
    for index in range(4):  # the last of transformers' hidden states has the final norm in it
        before, after = seen.hidden_states[index : index + 2]
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert record["layers"][index]["block_influence"] == pytest.approx(1 - float(cosine), abs=1e-5)


def test_the_same_seed_gives_the_same_analysis_to_the_bit_and_another_seed_another(whole, tiny_folder, data_folder):
    again = analyze(tiny_folder, data_folder)
    assert timeless(again.record) == timeless(whole[1].record)
    for part, arrays in whole[1].arrays.items():
        assert all(np.array_equal(again.arrays[part][name], values) for name, values in arrays.items()), part
    other = analyze(tiny_folder, data_folder, seed=1, greedy=0)
    assert other.record["layers"] != again.record["layers"]
    assert other.record["greedy"] is None


def test_one_layer_one_sequence_and_two_tokens_are_enough(tmp_path, data_folder, tiny_folder):
    one = model_folder(tmp_path / "one", num_hidden_layers=1)
    record = analyze(one, data_folder, tmp_path / "a", greedy=0).record
    assert (len(record["layers"]), record["groups"]) == (1, [])
    assert record["suggestions"][0]["keep"] == "0"
    small = {"seq_len": 2, "num_sequences": 1, "loss_sequences": 1, "greedy": 4, "layers": 5}
    record = analyze(tiny_folder, data_folder, tmp_path / "b", **small).record
    assert all(1 <= layer["max_rank"] <= 2 for layer in record["layers"])


# --- tokens in memory ---


@pytest.fixture
def tokens(data_folder):
    return torch.from_numpy(draw_sample(data_folder, "train", None, 6, 16, 0).ids)


@pytest.fixture
def model(tiny_folder):
    return load_hf_model(open_folder(tiny_folder), torch.float32)


ABOUT_THE_TEXT = {"model", "data", "device", "against", "domains"}


def test_tokens_give_the_same_numbers_as_the_folder_they_come_from(whole, tiny_folder, model, tokens):
    for source in (model, str(tiny_folder)):
        found = api.analyze(source, tokens, loss_sequences=3, greedy=2)
        for part, arrays in whole[1].arrays.items():
            assert all(np.array_equal(found.arrays[part][name], values) for name, values in arrays.items()), part
        theirs = timeless(whole[1].record)
        assert {key: found.record.get(key) for key in theirs.keys() - ABOUT_THE_TEXT} == {
            key: theirs[key] for key in theirs.keys() - ABOUT_THE_TEXT
        }
        assert found.record["model"]["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    "kind",
    [
        torch.int64, np.int64, list, torch.int32, np.int32, torch.int16, np.uint16, np.uint32, np.uint64,
    ],
)  # fmt: skip
def test_token_ids_may_be_integers_of_any_kind(model, tokens, kind):
    wanted = api.analyze(model, tokens)
    given = tokens.tolist() if kind is list else None
    if given is None:
        given = tokens.to(kind) if isinstance(kind, torch.dtype) else tokens.numpy().astype(kind)
    found = api.analyze(model, given)
    assert timeless(found.record) == timeless(wanted.record)


def test_tokens_need_not_lie_in_one_piece(model, tokens):
    wanted = api.analyze(model, tokens[::2, ::2].clone()).record
    assert api.analyze(model, tokens[::2, ::2]).record == wanted
    assert api.analyze(model, tokens.numpy()[::2, ::2]).record == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.float(), "not token ids"),
        (lambda t: t.double().numpy(), "not token ids"),
        (lambda t: t[0], "not token ids"),
        (lambda t: t[None], "not token ids"),
        (lambda t: t[:0], "not token ids"),
        (lambda t: t[:, :1], "one token"),
        (lambda t: t - 1000, "the model has 320"),
        (lambda t: t + 320, "the model has 320"),
        (lambda t: t > 5, "not token ids"),
        (lambda t: t.to(torch.complex64), "not token ids"),
        (lambda t: [[1, 2], [3]], "no token ids"),
        (lambda t: "the of and", "not token ids"),
        (lambda t: t.numpy().astype(np.uint64) + 2**63, "the model has 320"),
    ],
)  # fmt: skip
def test_what_are_no_token_ids_is_refused(model, tokens, change, words):
    with pytest.raises(DataError, match=words):
        api.analyze(model, change(tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_memory_is_left_as_it_was(tiny_folder, tokens, attention, fails, monkeypatch):
    model = load_hf_model(open_folder(tiny_folder), torch.float32, attention)
    model(input_ids=tokens, labels=tokens).loss.backward()
    logits = model(input_ids=tokens).logits
    model.train()
    layers = model.model.layers
    layers[1].eval()
    layers[2].self_attn.q_proj.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def flags():
        training = [module.training for module in model.modules()]
        return training, [p.requires_grad for p in model.parameters()], model.config._attn_implementation

    before = flags()
    if fails:
        lens = removal.lens_losses

        def failing(walk, ids, on_progress):
            lens(walk, ids, on_progress)
            walk.embed(ids)
            raise ZeroDivisionError

        monkeypatch.setattr(removal, "lens_losses", failing)
        with pytest.raises(ZeroDivisionError):
            api.analyze(model, tokens)
    else:
        api.analyze(model, tokens, greedy=1)
    assert flags() == before
    assert not [layer for layer in layers if "forward" in vars(layer)]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == gradient.keys()
    assert all(torch.equal(now[name], gradient[name]) for name in now)
    assert torch.equal(model.eval()(input_ids=tokens).logits, logits)


def test_text_without_variety_gives_no_numbers_beyond_all_bounds(model):
    for ids in (torch.full((4, 16), 7), torch.tensor([[1, 1, 1, 2]])):
        record = api.analyze(model, ids).record
        assert np.abs(record["similarity"]).max() <= 1 + 1e-6
        assert max(abs(layer["cka_distance"]) for layer in record["layers"]) <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either tokens, or data"),
        ({"tokens": "T", "data": "D"}, "either tokens, or data"),
        ({"tokens": "T", "out": "o"}, "in memory"),
        ({"tokens": "T", "against": "x"}, "in memory"),
        ({"data": "D"}, "name a model"),
        ({"tokens": "T", "seqlen": 3}, r"'seqlen'; did you mean 'seq_len'\?"),
        ({"tokens": "T", "lenghts": [3]}, r"did you mean 'lengths'\?"),
        ({"tokens": "T", "tau": 0.0}, "tau: "),
        ({"tokens": "T", "layers": 6}, "layers 6"),
        ({"tokens": "T", "greedy": 5}, "greedy 5"),
        ({"tokens": "T", "lengths": [17]}, "length 17"),
        ({"tokens": "T", "precision": "fp23"}, "precision: .*'fp32'"),
    ],
)
def test_python_callers_are_told_what_is_wrong(model, tokens, data_folder, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stands_for = {"T": tokens, "D": data_folder.path}
    given = {key: stands_for.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(UsageError, match=words):
        api.analyze(model, **given)
    assert not list(tmp_path.iterdir())


# --- options ---


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seq_len": 1}, "seq_len: .*greater than or equal to 2"),
        ({"seq_len": 129}, "seq_len 129: it must lie between 2 and 128"),
        ({"num_sequences": 0}, "num_sequences: .*greater"),
        ({"loss_sequences": 0}, "loss_sequences: .*greater"),
        ({"num_sequences": 10, "loss_sequences": 11}, "loss_sequences 11: it must lie between 1 and 10"),
        ({"layers": 0}, "layers: .*greater"),
        ({"layers": -1}, "layers: .*greater"),
        ({"layers": 6}, "layers 6: it must lie between 1 and 5"),
        ({"greedy": -1}, "greedy: .*greater"),
        ({"greedy": 5}, "greedy 5: it must lie between 0 and 4"),
        ({"lazy_tolerance": -0.1}, "lazy_tolerance: .*greater"),
        ({"lazy_tolerance": float("nan")}, "lazy_tolerance: .*finite"),
        ({"lazy_tolerance": float("inf")}, "lazy_tolerance: .*finite"),
        ({"lengths": [1]}, r"lengths\.0: .*greater"),
        ({"lengths": [8, 101]}, "length 101: it must lie between 2 and 100"),
        *(({name: share}, f"{name}: ") for name in ("tau", "eta") for share in (0.0, -0.5, 1.5, float("nan"))),
        ({"precision": "float32"}, "precision: .*'fp32'"),
        ({"seed": -1}, "seed: .*greater"),
        ({"domains": []}, "domains: "),
        ({"domains": "alpha"}, "domains: .*list"),
        ({"lengths": 8}, "lengths: .*list"),
        ({"seq_len": "many"}, "seq_len: "),
        ({"seq_len": 16.5}, "seq_len: "),
        ({"seq_len": True}, "seq_len: "),
        ({"split": "trian"}, "split 'trian' must be one of train, held_out"),
    ],
)
def test_numbers_out_of_range_are_named_with_their_bounds(given, words):
    config = tiny_model().config.to_dict()
    with pytest.raises(UsageError, match=words):
        options_of(given).check(config)


@pytest.mark.parametrize(
    "given",
    [
        {"seq_len": 2}, {"seq_len": 128}, {"layers": 1}, {"layers": 5}, {"greedy": 4}, {"tau": 1.0}, {"eta": 1.0},
        {"tau": 1e-9}, {"lazy_tolerance": 0.0}, {"lengths": [2, 100]}, {"loss_sequences": 100}, {"precision": "auto"},
    ],
)  # fmt: skip
def test_numbers_on_their_bounds_are_fine(given):
    options_of(given).check(tiny_model().config.to_dict())


def test_fewer_sequences_than_losses_usually_take_need_no_second_flag():
    options_of({"num_sequences": 10}).check(tiny_model().config.to_dict())


def test_none_stands_for_what_is_usual_and_lengths_follow_the_sequences():
    assert options_of({"tau": None, "seed": None, "lengths": None}) == AnalyzeOptions()
    assert AnalyzeOptions().all_lengths == [25, 50]
    assert AnalyzeOptions(seq_len=17).all_lengths == [8]
    assert AnalyzeOptions(seq_len=15).all_lengths == []
    assert options_of({"lengths": [9, 7, 9]}).all_lengths == [7, 9]
    assert AnalyzeOptions().num_loss_sequences == 20
    assert AnalyzeOptions(num_sequences=7).num_loss_sequences == 7
    assert AnalyzeOptions(num_sequences=7, loss_sequences=3).num_loss_sequences == 3


def test_a_number_is_the_same_setting_in_whatever_type_it_comes():
    plain = AnalyzeOptions(seq_len=16, tau=1.0)
    assert options_of({"seq_len": 16.0, "tau": 1}) == plain
    assert json.dumps(options_of({"seq_len": np.int64(16), "tau": np.float64(1)}).decisive()) == json.dumps(
        plain.decisive()
    )


# --- in a folder, and going on ---


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["fault", "signal"])
def test_stopped_in_any_part_it_goes_on_with_that_part(
    whole, tiny_folder, data_folder, tmp_path, monkeypatch, measured, part, how
):
    module, function = PARTS[part]
    original = getattr(module, function)

    def interrupted(walk, ids, *rest):
        if how == "fault":
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGTERM)
        return original(walk, ids, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        with pytest.raises(ZeroDivisionError if how == "fault" else StoppedError):
            analyze(tiny_folder, data_folder, out)
    names = list(PARTS)
    finished = names[: names.index(part)]
    assert sorted(path.stem for path in (out / "arrays").glob("*")) == sorted(finished)
    assert not (out / "analysis.json").exists()
    measured.clear()
    found = analyze(tiny_folder, data_folder, out)
    assert measured == ["load", *(name.partition("-")[0] for name in names if name not in finished)]
    assert timeless(found.record) == timeless(whole[1].record)
    assert set(found.record["seconds"]) == set(PARTS)
    assert [p.relative_to(out) for p in contents(out)] == [p.relative_to(whole[0]) for p in contents(whole[0])]


def test_a_finished_analysis_is_not_made_again(done, whole, tiny_folder, data_folder, measured):
    arrays = contents(done / "arrays")
    found = analyze(tiny_folder, data_folder, done)
    assert measured == []
    assert contents(done / "arrays") == arrays
    assert found.record == {key: value for key, value in whole[1].record.items() if key != "format_version"}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_measured_and_no_other(done, whole, tiny_folder, data_folder, measured, part):
    (done / "arrays" / f"{part}.safetensors").unlink()
    found = analyze(tiny_folder, data_folder, done)
    assert measured == ["load", part.partition("-")[0]]
    assert timeless(found.record) == timeless(whole[1].record)


def test_what_decides_no_number_may_change_in_the_same_folder(done, whole, tiny_folder, data_folder, measured):
    before = whole[1].record
    found = analyze(tiny_folder, data_folder, done, layers=4).record
    assert {each["num_layers"] for each in found["suggestions"] if each["by"] == "taylor"} == {4}
    assert found["layers"] == before["layers"]
    found = analyze(tiny_folder, data_folder, done, lazy_tolerance=30.0).record
    assert found["overall"]["lazy_layers"] == [0, 1, 2, 3, 4]
    assert all(layer["lazy"] for layer in found["layers"])
    found = analyze(tiny_folder, data_folder, done, stream=True).record
    assert timeless(found) == timeless(before)
    assert measured == []
    longer = analyze(tiny_folder, data_folder, done, greedy=3, layers=2).record
    assert measured == ["load", "greedy"]
    assert longer["greedy"]["order"][:2] == before["greedy"]["order"]
    assert longer["greedy"]["nll"][:2] == pytest.approx(before["greedy"]["nll"])
    kept = next(each["keep"] for each in longer["suggestions"] if each["by"] == "greedy")
    assert kept.count(",") + kept.count("-") == 1
    assert analyze(tiny_folder, data_folder, done, greedy=0).record["greedy"] is None
    assert timeless(analyze(tiny_folder, data_folder, done).record) == timeless(before)
    assert measured == ["load", "greedy"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_len", 12), ("num_sequences", 7), ("loss_sequences", 2), ("tau", 0.8), ("eta", 0.5), ("seed", 1),
        ("exact", True), ("precision", "bf16"), ("split", "held_out"), ("lengths", [5]), ("domains", ["beta"]),
    ],
)  # fmt: skip
def test_other_settings_do_not_get_into_the_same_folder(done, tiny_folder, data_folder, name, value):
    before = contents(done)
    with pytest.raises(UsageError, match=rf"with another {name} \(.*choose another folder \(-o\)"):
        analyze(tiny_folder, data_folder, done, **{name: value})
    assert contents(done) == before


def test_another_model_or_other_data_do_not_get_into_the_same_folder(
    done, tiny_folder, other_folder, data_folder, tmp_path
):
    before = contents(done)
    with pytest.raises(UsageError, match="another model"):
        analyze(other_folder, data_folder, done)
    corpora = corpora_file(tmp_path / "text", tiny_folder, num_documents=30)
    prepare(load_corpora(corpora), corpora.parent, tmp_path / "data")
    with pytest.raises(UsageError, match="another data"):
        analyze(tiny_folder, DataFolder(tmp_path / "data"), done)
    assert contents(done) == before


def test_a_model_moved_elsewhere_is_the_same_model(done, tiny_folder, data_folder, tmp_path, measured):
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    assert analyze(moved, data_folder, done).record["model"]["name"] == str(moved)
    assert measured == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def rewritten(path, **facts):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | facts
    save_file(load_file(path), path, metadata)


BROKEN = {
    "cut": cut,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 500),
    "newer": lambda path: rewritten(path, format_version="2"),
    "another's": lambda path: rewritten(path, identity="0" * 64),
    "nobody's": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("part", ["forward", "lens"])
def test_a_broken_part_is_named_with_what_to_do_and_that_helps(
    done, whole, tiny_folder, data_folder, part, breaking, measured
):
    path = done / "arrays" / f"{part}.safetensors"
    breaking(path)
    before = contents(done)
    with pytest.raises(DataError, match=rf"{part}.*remove it"):
        analyze(tiny_folder, data_folder, done)
    assert contents(done) == before
    path.unlink()
    assert timeless(analyze(tiny_folder, data_folder, done).record) == timeless(whole[1].record)
    assert measured == ["load", part]


@pytest.mark.parametrize("place", [0.2, 0.9])
def test_a_bit_that_flips_in_a_part_is_found(done, tiny_folder, data_folder, place):
    path = done / "arrays" / "removal.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) - 8 if place > 0.5 else data.index(b'"whole"') + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="removal"):
        analyze(tiny_folder, data_folder, done)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ("[]", "format_version"), ('{"format_version": 2}', "install a newer Scion")],
)
def test_broken_settings_are_named(done, tiny_folder, data_folder, text, words):
    (done / "settings.json").write_text(text)
    before = contents(done)
    with pytest.raises(DataError, match=rf"settings\.json.*{words}"):
        analyze(tiny_folder, data_folder, done)
    assert contents(done) == before


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, tiny_folder, data_folder):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    for out in (foreign, foreign / "thesis.txt"):
        with pytest.raises(UsageError, match=r"not empty|not a folder"):
            analyze(tiny_folder, data_folder, out)
    with pytest.raises(StorageError, match="a part of the path is a file"):
        analyze(tiny_folder, data_folder, foreign / "thesis.txt" / "out")
    assert contents(tmp_path) == before


def test_an_empty_folder_will_do(tmp_path, tiny_folder, data_folder):
    analyze(tiny_folder, data_folder, tmp_path, greedy=0)
    assert (tmp_path / "analysis.json").exists()


def full_disk(monkeypatch, name):
    """Let there be no room for a file."""
    write = analysis_store.write_bytes_atomic

    def fail(path, data):
        if path.name.startswith(name):
            raise StorageError(f"cannot use {path}: the disk is full")
        write(path, data)

    monkeypatch.setattr(analysis_store, "write_bytes_atomic", fail)
    monkeypatch.setattr("scionlm.core.files.write_bytes_atomic", fail)


@pytest.mark.parametrize(
    "name",
    [
        "settings.json", "forward", "gradients", "greedy-2", "maps.json", "heads.csv", "analysis.json",
    ],
)  # fmt: skip
def test_when_the_disk_was_full_the_same_command_goes_on(whole, tiny_folder, data_folder, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        with pytest.raises(StorageError, match="disk is full"):
            analyze(tiny_folder, data_folder, out)
    assert not (out / "analysis.json").exists()
    assert timeless(analyze(tiny_folder, data_folder, out).record) == timeless(whole[1].record)


@pytest.mark.parametrize("leftover", [".lock", ".settings.json.0123456789ab.tmp"])
def test_what_a_kill_left_is_no_foreign_work(tiny_folder, data_folder, tmp_path, leftover):
    (tmp_path / leftover).touch()
    analyze(tiny_folder, data_folder, tmp_path, greedy=0)


def test_who_comes_second_is_refused_and_changes_nothing(done, tiny_folder, data_folder):
    (done / "arrays" / "lens.safetensors").unlink()
    with folder_lock(done):
        before = contents(done)
        with pytest.raises(UsageError, match="in use by another scion process"):
            analyze(tiny_folder, data_folder, done)
        assert contents(done) == before


# --- read layer by layer ---


def test_a_model_read_layer_by_layer_gives_the_same(whole, tiny_folder, data_folder, tmp_path, capsys):
    found = analyze(tiny_folder, data_folder, tmp_path / "out", stream=True)
    assert "read layer by layer" in capsys.readouterr().err
    for part, arrays in whole[1].arrays.items():
        for name, values in arrays.items():
            streamed = found.arrays[part][name]
            assert streamed.dtype == values.dtype
            if values.dtype.kind in "iu":
                assert np.array_equal(streamed, values), (part, name)
            else:
                assert np.allclose(streamed, values, rtol=1e-5, atol=1e-6), (part, name)
    mine, theirs = found.record, whole[1].record
    assert [each["keep"] for each in mine["suggestions"]] == [each["keep"] for each in theirs["suggestions"]]
    assert mine["greedy"]["order"] == theirs["greedy"]["order"]


@pytest.mark.parametrize("memory", [1000, 10**12, None])
def test_memory_decides_whether_layers_are_read_one_by_one(tiny_folder, data_folder, monkeypatch, capsys, memory):
    monkeypatch.setattr(Runtime, "memory", lambda runtime: memory)
    analyze(tiny_folder, data_folder, greedy=0, precision="fp32")
    assert ("read layer by layer" in capsys.readouterr().err) == (memory == 1000)
    analyze(tiny_folder, data_folder, greedy=0, stream=False)
    assert "read layer by layer" not in capsys.readouterr().err


# --- side by side ---


@pytest.fixture(scope="module")
def others(tmp_path_factory, other_folder, data_folder):
    """A finished analysis of the other model."""
    out = tmp_path_factory.mktemp("others") / "out"
    analyze(other_folder, data_folder, out, greedy=0)
    return out


def test_another_model_and_its_analysis_come_to_the_same(
    done, others, tiny_folder, other_folder, data_folder, measured, whole
):
    by_analysis = analyze(tiny_folder, data_folder, done, against=str(others)).record
    assert measured == []
    by_model = analyze(tiny_folder, data_folder, done, against=str(other_folder)).record
    assert measured == ["load", "forward", "gradients", "removal", "lens"], "greedy removal is not for the other one"
    assert by_model["against"] == by_analysis["against"]
    assert by_model["against"]["model"]["num_hidden_layers"] == 3
    assert timeless(by_model | {"against": None}) == timeless(whole[1].record)
    again = analyze(tiny_folder, data_folder, done, against=str(other_folder)).record
    assert again == by_model
    assert len(measured) == 5
    theirs = analyze(other_folder, data_folder, done / "against", greedy=0).record
    assert len(measured) == 5, "what was measured of it is an analysis of its own"
    assert theirs["layers"] == by_model["against"]["layers"]
    in_memory = analyze(tiny_folder, data_folder, against=str(other_folder)).record
    assert in_memory["against"] == by_model["against"]


def test_stopped_in_the_other_model_it_goes_on_there(
    done, tiny_folder, other_folder, data_folder, others, measured, monkeypatch
):
    lens = removal.lens_losses

    def stopped(walk, ids, on_progress):
        os.kill(os.getpid(), signal.SIGINT)
        return lens(walk, ids, on_progress)

    with monkeypatch.context() as patch:
        patch.setattr(removal, "lens_losses", stopped)
        with pytest.raises(StoppedError):
            analyze(tiny_folder, data_folder, done, against=str(other_folder))
    assert not (done / "against" / "analysis.json").exists()
    measured.clear()
    found = analyze(tiny_folder, data_folder, done, against=str(other_folder)).record
    assert measured == ["load", "lens"]
    theirs = json.loads((others / "analysis.json").read_text())
    assert found["against"]["lens"] == theirs["lens"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_len", 20), ("num_sequences", 7), ("loss_sequences", 4), ("tau", 0.8), ("eta", 0.8), ("seed", 2),
        ("precision", "bf16"), ("split", "held_out"), ("domains", ["beta"]), ("lengths", [4]), ("exact", True),
    ],
)  # fmt: skip
def test_an_analysis_made_otherwise_is_refused_by_name(tiny_folder, data_folder, others, tmp_path, name, value):
    with pytest.raises(UsageError, match=rf"with another {name} \(.*give the model itself"):
        analyze(tiny_folder, data_folder, tmp_path / "out", against=str(others), **{name: value})
    assert not (tmp_path / "out").exists()


def break_other(others, tmp_path, change):
    shutil.copytree(others, tmp_path / "o")
    theirs = json.loads((others / "analysis.json").read_text())
    (tmp_path / "o" / "analysis.json").write_text(json.dumps(change(theirs)))
    return str(tmp_path / "o")


@pytest.mark.parametrize(
    "key",
    [
        "format_version", "domains", "model", "layers", "overall", "heads", "groups", "lengths", "lens",
    ],
)  # fmt: skip
def test_an_analysis_that_lacks_something_is_broken(done, others, tiny_folder, data_folder, tmp_path, key):
    folder = break_other(others, tmp_path, lambda theirs: {k: v for k, v in theirs.items() if k != key})
    before = contents(done)
    with pytest.raises(DataError, match=r"analysis\.json"):
        analyze(tiny_folder, data_folder, done, against=folder)
    assert contents(done) == before


def test_an_analysis_of_a_newer_scion_is_refused(done, others, tiny_folder, data_folder, tmp_path):
    folder = break_other(others, tmp_path, lambda theirs: theirs | {"format_version": 2})
    with pytest.raises(DataError, match=r"analysis\.json has format_version 2.*install a newer"):
        analyze(tiny_folder, data_folder, done, against=folder)


def test_more_layers_may_be_kept_than_the_other_model_has(tiny_folder, other_folder, data_folder):
    assert analyze(tiny_folder, data_folder, against=str(other_folder), layers=4).record["against"]


@pytest.mark.parametrize("wrong", ["missing", "tau", "newer", "tokenizer", "context"])
def test_a_wrong_other_model_is_refused_before_anything_is_measured(
    tiny_folder, data_folder, others, tmp_path, measured, wrong
):
    options = {}
    if wrong == "missing":
        against = str(tmp_path / "nowhere")
    elif wrong == "tau":
        against, options = str(others), {"tau": 0.8}
    elif wrong == "newer":
        against = break_other(others, tmp_path, lambda theirs: theirs | {"format_version": 2})
    elif wrong == "tokenizer":
        against = str(other_tokenizer(tmp_path / "m", tiny_folder))
    else:
        against = str(model_folder(tmp_path / "m", max_position_embeddings=8))
    before = contents(tmp_path)
    with pytest.raises(ScionError):
        analyze(tiny_folder, data_folder, tmp_path / "out", against=against, **options)
    assert measured == []
    assert contents(tmp_path) == before


# --- models and data that do not fit, or are broken ---


def other_tokenizer(folder, tiny_folder):
    shutil.copytree(tiny_folder, folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 320, "content": "<|more|>"})
    path.write_text(json.dumps(spec))
    return folder


def test_a_model_with_another_tokenizer_is_refused(tiny_folder, data_folder, tmp_path):
    model = other_tokenizer(tmp_path / "model", tiny_folder)
    with pytest.raises(DataError, match="prepare it again with tokenizer"):
        analyze(model, data_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_weights(folder, tiny_folder, change):
    shutil.copytree(tiny_folder, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


PLACES = {
    "embedding": "model.embed_tokens.weight",
    "query": "model.layers.0.self_attn.q_proj.weight",
    "value": "model.layers.2.self_attn.v_proj.weight",
    "mlp": "model.layers.1.mlp.up_proj.weight",
    "last mlp": "model.layers.4.mlp.up_proj.weight",
    "norm": "model.norm.weight",
}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_numbers_that_are_not_finite_are_the_models_fault(tiny_folder, data_folder, tmp_path, place, number):
    def change(state):
        state[PLACES[place]].view(-1)[:] = number

    model = with_weights(tmp_path / "model", tiny_folder, change)
    with pytest.raises(DataError, match=r"weights.* are broken"):
        analyze(model, data_folder)


def test_a_model_that_turns_out_broken_leaves_no_folder(tiny_folder, data_folder, tmp_path):
    def change(state):
        state[PLACES["last mlp"]][:] = float("nan")

    model = with_weights(tmp_path / "model", tiny_folder, change)
    with pytest.raises(DataError):
        analyze(model, data_folder, tmp_path / "out")
    left = tmp_path / "out"
    assert not left.exists() or list((left / "arrays").iterdir())


def test_damaged_tokens_are_the_datas_fault(tiny_folder, data_folder, tmp_path):
    data = DataFolder(Path(shutil.copytree(data_folder.path, tmp_path / "data")))
    shard = next((data.path / "alpha").glob("train*"))
    whole = bytearray(shard.read_bytes())
    whole[-12_000:-2_000] = b"\xff" * 10_000
    shard.write_bytes(whole)
    with pytest.raises(DataError, match="alpha"):
        analyze(tiny_folder, data, tmp_path / "out")


def test_progress_says_what_is_done_and_ends_at_the_whole(tiny_folder, data_folder, monkeypatch):
    told = {}
    update, begin = Progress.update, Progress.__init__

    def beginning(self, title, total, done=0.0):
        begin(self, title, total, done)
        told[title] = [total]

    def updating(self, done, detail=""):
        told[self._title].append(done)
        update(self, done, detail)

    monkeypatch.setattr(Progress, "__init__", beginning)
    monkeypatch.setattr(Progress, "update", updating)
    analyze(tiny_folder, data_folder)
    assert len(told) == len(PARTS)
    for title, (total, *done) in told.items():
        assert done == sorted(done), title
        assert done[-1] == total, title
