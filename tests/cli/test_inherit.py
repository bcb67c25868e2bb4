"""`scion inherit` and `scion inspect` with every flag, on folders of a few kilobytes."""

import json
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from factories import model_folder, tiny_model
from scionlm.cli import main as cli
from scionlm.cli.inherit import parse_bytes
from scionlm.core.errors import UsageError
from scionlm.families import ModelShape, count_parameters
from scionlm.sources import open_folder
from scionlm.surgery.plan import SurgeryPlan


@pytest.fixture
def scion(capsys, monkeypatch, tmp_path, tiny_folder):
    """Run a command line in `tmp_path`, where `tiny` is a model; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_folder, tmp_path / "tiny")

    def run(line):
        code = cli.run(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def weights(folder):
    return {k: t for file in sorted(Path(folder).glob("*.safetensors")) for k, t in load_file(file).items()}


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def plan_of(folder):
    return SurgeryPlan.from_dict(json.loads((Path(folder) / "provenance.json").read_text())["plan"])


FLAGS = {
    "first": "--layers 2",
    "steps": "--keep 0-4:2",
    "any order": "--keep 3,0-1",
    "twice": "--keep 0-2,1-2 --repeat",
    "strategy": "--layers 4 --strategy first_last:1",
    "every": "--strategy every:3",
    "stack": "--layers 7 --strategy stack",
    "width": "--hidden-size 24 --intermediate-size 20 --num-attention-heads 2",
    "groups": "--num-key-value-heads 1 --layers 2",
    "magnitude": "--layers 2 --hidden-size 16 --intermediate-size 8 --importance magnitude",
    "vocabulary": "--layers 1 --vocab-size 290 --pad-vocab-to 64",
    "padding": "--pad-vocab-to 128",
    "fresh": "--layers 2 --fresh mlp,mlp_norm --seed 7",
    "grown by a stack": "--grow stack --layers 6",
    "grown by nothing": "--grow zero_output --layers 6",
    "grown at random": "--grow random --layers 6",
    "all at once": "--keep 4,1 --hidden-size 16 --vocab-size 300 --fresh attention --pad-vocab-to 64",
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_dry_run_writes_nothing_and_says_what_is_written_afterwards(scion, tmp_path, flags):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = scion(f"inherit tiny {flags} --dry-run --json")
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    foretold = json.loads(out)
    code, out, err = scion(f"inherit tiny {flags} -o out --json")
    assert code == 0, err
    done = json.loads(out)
    assert {key: done[key] for key in foretold} == foretold
    assert done["format_version"] == 1
    assert done["checks"]
    found = weights("out")
    assert sum(t.numel() for t in found.values()) == done["num_parameters"]
    assert sum(t.nbytes for t in found.values()) == done["bytes"]
    assert len(found) == sum(kind["tensors"] for kind in done["tensors"].values())
    shape = ModelShape.of(config("out"))
    assert shape.to_dict() == done["target_shape"]
    assert count_parameters(config("out"))["total"] == done["num_parameters"]
    assert plan_of("out") == SurgeryPlan.from_dict(done["plan"])
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_hidden_layers == shape.num_hidden_layers
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("flags", ["--layers 2", "--vocab-size 280 --pad-vocab-to 64", "--grow random --layers 6"])
def test_the_summary_for_people_says_the_same(scion, flags):
    code, out, _ = scion(f"inherit tiny {flags} --dry-run")
    assert code == 0
    assert out.startswith("would write: ")
    assert "layers" in out
    assert "proven" not in out
    _, again, _ = scion(f"inherit tiny {flags} --dry-run -o out")
    assert again.startswith("would write"), "nothing was written to out"
    code, out, _ = scion(f"inherit tiny {flags} -o out")
    assert out.startswith("out: ")
    assert "proven: " in out


def test_layers_kept_are_the_sources_bitwise(scion):
    assert scion("inherit tiny --keep 0-4:2,1 -o out")[0] == 0
    source, found = weights("tiny"), weights("out")
    for number, index in enumerate([0, 2, 4, 1]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(found[name.format(number)], source[name.format(index)])
    assert plan_of("out").keep == (0, 2, 4, 1)


def test_scores_from_a_file_choose_the_layers(scion, tmp_path):
    (tmp_path / "s.json").write_text('{"format_version": 1, "layer_scores": [1, 5, 2.5, -3, 4]}')
    assert scion("inherit tiny --layers 2 --scores s.json -o out")[0] == 0
    assert plan_of("out").keep == (1, 4)


def test_files_are_no_larger_than_asked_for(scion, tmp_path):
    model_folder(tmp_path / "large", vocab_size=4096, hidden_size=128, intermediate_size=256)
    assert scion("inherit large --layers 3 --shard-size 1MB -o out")[0] == 0
    files = list(Path("out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights("out").values())
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 10**6 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert scion("inherit large --layers 3 -o whole")[0] == 0
    one, other = weights("out"), weights("whole")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1m", 10**6),
        ("1000kb", 10**6),
        ("2T", 2 * 10**12),
        ("3000000", 3 * 10**6),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "shard-size") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "-5GB", "1.5GB", "5", "999kb", "5mg", "5kk", "\u0665GB", "9" * 5000, "5 G B"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="shard-size"):
        parse_bytes(text, "shard-size")


def test_without_the_proof_of_the_whole_the_files_are_checked_and_the_same(scion):
    assert scion("inherit tiny --keep 0,3 --intermediate-size 20 -o a")[0] == 0
    code, out, _ = scion("inherit tiny --keep 0,3 --intermediate-size 20 -o b --no-verify --json")
    assert code == 0
    assert any("read back" in check or "equal" in check for check in json.loads(out)["checks"])
    assert (Path("a") / "model.safetensors").read_bytes() == (Path("b") / "model.safetensors").read_bytes()
    assert config("a") == config("b")


def test_a_trimmed_vocabulary_comes_with_its_tokenizer(scion):
    assert scion("inherit tiny --vocab-size 280 --pad-vocab-to 64 -o out")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert (len(tokenizer), config("out")["vocab_size"]) == (280, 320)
    assert (
        tokenizer.decode(tokenizer("for the others \u2013 na\u00efve").input_ids) == "for the others \u2013 na\u00efve"
    )
    assert scion("inherit tiny --tokenizer out --layers 2 -o again")[0] == 0
    assert config("again")["vocab_size"] == 280
    assert torch.equal(weights("again")["model.embed_tokens.weight"], weights("out")["model.embed_tokens.weight"][:280])
    assert (Path("again") / "tokenizer.json").read_bytes() == (Path("out") / "tokenizer.json").read_bytes()


def test_a_model_grows_by_the_next_layers_of_its_source(scion):
    assert scion("inherit tiny --keep 0,2 -o student")[0] == 0
    assert scion("inherit student --grow source_next --layers 4 --donor tiny -o grown")[0] == 0
    source, found = weights("tiny"), weights("grown")
    for name, tensor in found.items():
        assert torch.equal(tensor, source[name]), name


def test_an_heir_of_an_heir_is_not_grown_in_the_wrong_order(scion):
    """Its layers are 0 and 4 of tiny; layers 1 and 3 belong between them."""
    assert scion("inherit tiny --keep 0,2,4 -o child")[0] == 0
    assert scion("inherit child --keep 0,2 -o grandchild")[0] == 0
    assert scion("inherit grandchild --grow source_next --layers 4 --donor tiny -o grown")[0] == 0
    source, found = weights("tiny"), weights("grown")
    name = "model.layers.{}.mlp.down_proj.weight"
    order = [next(i for i in range(5) if torch.equal(found[name.format(n)], source[name.format(i)])) for n in range(4)]
    assert order == sorted(order)


def test_width_by_importance_of_a_model_that_grows_by_another(scion):
    """Scores are those of one model: layers of another cannot be cut by them."""
    assert scion("inherit tiny --keep 0,2 -o student")[0] == 0
    line = "inherit student --grow source_next --layers 4 --donor tiny --intermediate-size 20 --importance magnitude"
    code, _, err = scion(f"{line} -o grown")
    assert (code, "layers come from two; cut the width in a second step" in err) == (2, True)


def test_licences_card_and_provenance_come_along(scion, tmp_path):
    (tmp_path / "tiny" / "NOTICE.txt").write_text("Notice\n")
    assert scion("inherit tiny --layers 2 -o out")[0] == 0
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "Notice\n"
    card = tmp_path / "out" / "README.md"
    assert "license: mit" in card.read_text()
    # What is made of it in turn names the same base.
    card.write_text(card.read_text().replace("license: mit", "license: mit\nbase_model: org/base"))
    assert open_folder(tmp_path / "out").base_model == "org/base"
    assert scion("inherit out --layers 1 -o next")[0] == 0
    assert "base_model: org/base" in (tmp_path / "next" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["format_version"] == 1
    assert set(record["sha256"]) == {"model.safetensors"}


def test_a_model_of_two_donors_names_both_and_their_licences(scion, tmp_path):
    assert scion("inherit tiny --keep 0,2 -o student")[0] == 0
    student = tmp_path / "student"
    (student / "LICENSE").write_text("Other licence\n")
    (student / "USE_POLICY.md").write_text("Be kind\n")
    (student / "README.md").write_text("---\nlicense: llama3\n---\n")
    (tmp_path / "merge.yaml").write_text(
        "slices:\n- sources: [{model: student, layer_range: [0, 2]}]\n- sources: [{model: tiny, layer_range: [3, 5]}]\n"
        "- sources: [{model: student, layer_range: [1, 2]}]\n"
    )
    code, _, err = scion("inherit merge.yaml -o out")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in card
    assert "Layers 0, 1 of **student**, 3, 4 of **tiny**, 1 of **student** (" in card
    assert "llama3 of student and mit of tiny" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "Other licence\n"
    assert (tmp_path / "out" / "LICENSE-donor-1").read_text() == (tmp_path / "tiny" / "LICENSE").read_text()
    assert (tmp_path / "out" / "USE_POLICY.md").read_text() == "Be kind\n"


# --- mergekit ---


def test_slices_of_mergekit_are_a_source(scion, tmp_path):
    (tmp_path / "merge.yaml").write_text(
        "slices:\n- sources: [{model: tiny, layer_range: [0, 2]}]\n- sources: [{model: tiny, layer_range: [1, 5]}]\n"
    )
    code, out, err = scion("inherit merge.yaml --intermediate-size 20 --json -o out")
    assert code == 0, err
    assert json.loads(out)["plan"]["keep"] == [0, 1, 1, 2, 3, 4]
    assert config("out")["intermediate_size"] == 20
    for flags in ("--layers 2", "--keep 1", "--strategy first", "--grow stack --layers 9", "--donor tiny"):
        code, _, err = scion(f"inherit merge.yaml {flags} -o other")
        assert (code, "names the layers already" in err) == (2, True), flags


# --- pickles ---


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def pickled(folder, *states):
    """Turn a folder's weights into pickles."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for number, state in enumerate(states, start=1):
        name = "pytorch_model.bin" if len(states) == 1 else f"pytorch_model-{number:05d}-of-{len(states):05d}.bin"
        torch.save(state, folder / name)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_converted_on_request(scion, tmp_path, shards):
    state = weights("tiny") if Path("tiny").exists() else {}
    assert state
    names = sorted(state)
    parts = [{name: state[name] for name in names[i::shards]} for i in range(shards)]
    pickled(tmp_path / "tiny", *parts)
    code, _, err = scion("inherit tiny --layers 2 -o out")
    assert (code, "--allow-pickle" in err) == (65, True)
    assert not (tmp_path / "out").exists()
    code, _, err = scion("inherit tiny --layers 2 --allow-pickle -o out")
    assert code == 0, err
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights("out").items())
    assert (tmp_path / "out" / "LICENSE").exists()
    code, out, _ = scion("inspect tiny --allow-pickle --json")
    assert (code, json.loads(out)["num_hidden_layers"]) == (0, 5)


@pytest.mark.parametrize("shards", [1, 2])
def test_code_in_a_pickle_is_never_run(scion, tmp_path, shards):
    canary = tmp_path / "canary"
    state = weights("tiny")
    evil = state | {"model.norm.weight": Evil(canary)}
    pickled(tmp_path / "tiny", *([evil] if shards == 1 else [state, {"more": Evil(canary)}]))
    for command in ("inherit tiny --layers 2 -o out", "inspect tiny"):
        for flag in ("", " --allow-pickle"):
            code, out, err = scion(command + flag)
            assert code == 65, err
            assert ".bin" in err
            assert "Traceback" not in err + out
            assert not canary.exists()
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    torch.load(sorted((tmp_path / "tiny").glob("*.bin"))[-1], weights_only=False)
    assert canary.exists(), "the pickle was harmless: the test could not fail"


@pytest.mark.parametrize("state", [[1, 2], {"a": 3}, {"model.norm.weight": torch.zeros(3)}, {}])
def test_pickles_of_something_else_are_refused(scion, tmp_path, state):
    pickled(tmp_path / "tiny", state)
    code, _, err = scion("inherit tiny --layers 2 --allow-pickle -o out")
    assert code == 65, err
    assert len(err.strip().splitlines()[-1]) < 400
    assert not (tmp_path / "out").exists()


# --- wrong requests ---

WRONG = [
    ("", 2, "nothing is asked for"),
    ("--layers 2 --keep 0-1", 2, "keep names the layers"),
    ("--keep 0-1 --strategy first", 2, "keep names the layers"),
    ("--keep 0-1 --scores s.json", 2, "keep names the layers"),
    ("--layers 2 --scores s.json --strategy first", 2, "strategy"),
    ("--scores s.json", 2, "layers"),
    ("--layers 2 --scores missing.json", 2, "missing.json"),
    ("--layers 2 --scores short.json", 2, "3 layer scores"),
    ("--layers 2 --scores nan.json", 2, "NaN"),
    ("--layers 2 --scores words.json", 65, "layer_scores"),
    ("--layers 2 --scores none.json", 65, "layer_scores"),
    ("--layers 2 --scores newer.json", 65, "format_version 9"),
    ("--layers 2 --scores huge.json", 65, "huge.json"),
    ("--layers 2 --scores broken.json", 65, "broken.json"),
    ("--layers 2 --scores tiny", 2, "tiny"),
    ("--keep 0,0", 2, "twice"),
    ("--keep 0,9", 2, "layer 9"),
    ("--keep ''", 2, "keep"),
    ("--keep 3-1", 2, "3-1"),
    ("--keep -1", 2, "keep"),
    ("--layers 2 --repeat", 2, "repeat"),
    ("--layers 2 --strategy ''", 2, "strategy"),
    ("--layers 2 --strategy every:0", 2, "every:0: the number behind the colon must be 1 or more"),
    ("--layers 2 --strategy random:x", 2, "random:x: the number behind the colon must be 0 or more"),
    ("--layers 2 --strategy frist", 2, "hybrid_stack, block_influence)"),
    ("--layers 2 --strategy block_influenc", 2, "did you mean 'block_influence'?"),
    ("--layers 2 --strategy removal", 2, "is measured: scion analyze tiny --data DATA --layers N"),
    (
        "--layers 2 --strategy taylor --data nowhere",
        2,
        "is measured: scion analyze tiny --data DATA --layers N -o ANALYSIS lists",
    ),
    ("--layers 3 --strategy greedy", 2, "--greedy M (the number that goes) lists the layers that it keeps, for"),
    ("--layers 2 --strategy lazy", 2, "strategy lazy is measured; in a recipe inherit.strategy measures it by itself"),
    ("--layers 2 --strategy first:2", 2, "first:2"),
    ("--layers 3 --strategy every:3", 2, "every:3"),
    ("--layers 3 --strategy hybrid_stack", 2, "even"),
    ("--layers 99 --strategy stack", 2, "stack"),
    ("--strategy first", 2, "layers"),
    ("--grow stack", 2, "layers"),
    ("--grow stack --layers 5", 2, "no growth"),
    ("--grow stack --layers 3", 2, "no growth"),
    ("--grow sideways --layers 7", 2, "sideways"),
    ("--grow '' --layers 7", 2, "grow"),
    ("--grow source_next --layers 7", 2, "donor"),
    ("--grow source_next --layers 7 --donor tiny", 2, "5 layers"),
    ("--grow source_next --layers 7 --donor missing", 2, "missing"),
    ("--grow stack --layers 7 --donor tiny", 2, "donor"),
    ("--grow stack --layers 7 --keep 0-1", 2, "grow"),
    ("--layers 2 --donor tiny", 2, "donor"),
    ("--hidden-size 0", 2, "hidden_size: 0"),
    ("--hidden-size 33", 2, "hidden_size: 33"),
    ("--hidden-size -8", 2, "hidden_size: -8"),
    ("--intermediate-size 49", 2, "intermediate_size: 49"),
    ("--num-attention-heads 3", 2, "num_attention_heads 3"),
    ("--num-attention-heads 5", 2, "num_attention_heads: 5"),
    ("--num-key-value-heads 3", 2, "num_key_value_heads: 3"),
    ("--num-attention-heads 4 --num-key-value-heads 1", 2, "num_key_value_heads 1"),
    ("--hidden-size 16 --importance best", 2, "importance 'best'"),
    ("--hidden-size 16 --importance activation", 2, "--data"),
    ("--hidden-size 16 --importance taylor --data nowhere", 2, "nowhere"),
    ("--layers 2 --importance magnitude", 2, "importance"),
    ("--layers 2 --data nowhere", 2, "data"),
    ("--hidden-size 16 --importance magnitude --data nowhere", 2, "data"),
    ("--vocab-size 0", 2, "vocab_size: 0"),
    ("--vocab-size 100", 2, "must stay"),
    ("--vocab-size 999", 2, "vocab_size: 999"),
    ("--vocab-size 300 --tokenizer tiny", 2, "either tokenizer or vocab_size"),
    ("--tokenizer missing", 2, "missing"),
    ("--tokenizer ''", 2, "tokenizer"),
    ("--tokenizer empty", 65, "tokenizer.json"),
    ("--pad-vocab-to 0", 2, "pad_vocab_to: 0"),
    ("--pad-vocab-to -64", 2, "pad_vocab_to: -64"),
    ("--layers 2 --fresh mpl", 2, "'mpl'"),
    ("--layers 2 --fresh ''", 2, "fresh"),
    ("--layers 2 --fresh position", 2, "position"),
    ("--layers 2 --fresh head", 2, "head"),
    ("--layers 2 --seed -1", 2, "--seed"),
    ("--layers 2 --shard-size 5", 2, "shard-size"),
    ("--layers 2 --shard-size big", 2, "shard-size"),
]


@pytest.fixture
def files(tmp_path):
    """Files of scores, right and wrong."""
    scores = {
        "s": "[1, 5, 2, 3, 4]", "short": "[1, 2, 3]", "nan": "[1, NaN, 2, 3, 4]", "words": '["a", 1, 2, 3, 4]',
        "none": "null", "huge": f"[1{'0' * 400}, 1, 2, 3, 4]", "broken": "[1,",
    }  # fmt: skip
    for name, value in scores.items():
        (tmp_path / f"{name}.json").write_text(f'{{"format_version": 1, "layer_scores": {value}}}')
    (tmp_path / "newer.json").write_text('{"format_version": 9, "layer_scores": [1, 5, 2, 3, 4]}')
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize(
    ("end", "flags", "code", "words"),
    [("-o out", *case) for case in WRONG] + [("--dry-run", *case) for case in WRONG[::12]],
    ids=[case[0] or "nothing" for case in WRONG] + [f"{case[0] or 'nothing'}, dry" for case in WRONG[::12]],
)
def test_a_wrong_request_has_its_code_and_message_and_leaves_nothing(scion, files, tmp_path, end, flags, code, words):
    before = sorted(tmp_path.rglob("*"))
    started = time.process_time()
    found, out, err = scion(f"inherit tiny {flags} {end}")
    assert (found, out) == (code, ""), err + out
    assert words in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2
    assert "Traceback" not in err
    assert time.process_time() - started < 5
    assert sorted(tmp_path.rglob("*")) == before


def test_the_result_needs_a_place(scion, tmp_path):
    code, _, err = scion("inherit tiny --layers 2")
    assert (code, "-o OUT" in err) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years")
    assert scion("inherit tiny --layers 2 -o full")[0] == 2
    assert scion("inherit tiny --layers 2 -o tiny")[0] == 2
    assert scion("inherit tiny --layers 2 -o tiny/config.json")[0] in (2, 74)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis"]


# --- broken models ---


def changed(folder, **changes):
    found = config(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v != "GONE"}))


BROKEN = {
    "another type": ({"model_type": "mamba"}, "mamba"),
    "no type": ({"model_type": "GONE"}, "model_type"),
    "layers no number": ({"num_hidden_layers": "5"}, "num_hidden_layers"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "layers missing": ({"num_hidden_layers": 6}, "model.layers.5"),
    "layers too many": ({"num_hidden_layers": 4}, "model.layers.4"),
    "heads do not divide": ({"num_attention_heads": 3}, "num_key_value_heads"),
    "hidden does not divide": ({"hidden_size": 33, "head_dim": None}, "33"),
    "another width": ({"hidden_size": 40}, "shape"),
    "another vocabulary": ({"vocab_size": 321}, "321"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "its own code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "an unknown list": ({"strange_layers": [1, 2, 3, 4, 5]}, "strange_layers"),
}


@pytest.mark.parametrize(("changes", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_is_refused(scion, tmp_path, changes, words):
    changed(tmp_path / "tiny", **changes)
    before = sorted(tmp_path.rglob("*"))
    started = time.process_time()
    for line in ("inspect tiny", "inherit tiny --layers 2 -o out", "inherit tiny --layers 2 --no-verify -o out"):
        code, _, err = scion(line)
        assert (code, words in err) == (65, True), f"{line}: {code} {err}"
        assert len(err.strip().splitlines()) <= 2
        assert sorted(tmp_path.rglob("*")) == before
    assert time.process_time() - started < 15


@pytest.mark.parametrize("positions", [None, "x", 0, -4, 1.5, True])
def test_positions_that_are_no_number_are_refused(scion, tmp_path, positions):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    changed(tmp_path / "gpt2", n_positions=positions)
    lines = ["inspect gpt2", "inherit gpt2 --layers 2 -o out"]
    for line in [*lines, "inherit gpt2 --layers 2 --dry-run"] if positions in (None, "x") else lines:
        code, _, err = scion(line)
        assert code == 65, f"{line}: {code} {err}"
        assert "n_positions" in err or "wpe" in err or "config.json" in err


def test_a_number_of_layers_beyond_reason_is_refused_at_once(scion, tmp_path):
    changed(tmp_path / "tiny", num_hidden_layers=300_000)
    started = time.process_time()
    code, _, err = scion("inspect tiny")
    assert (code, "layers" in err) == (65, True), err
    assert time.process_time() - started < 3


def test_tokens_without_an_embedding_are_refused_not_read_from_elsewhere(scion, tmp_path):
    path = tmp_path / "tiny" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["<|im_start|>"] = 320
    path.write_text(json.dumps(spec))
    for flags in ("--vocab-size 300", "--vocab-size 300 --no-verify", "--tokenizer tiny"):
        code, _, err = scion(f"inherit tiny {flags} -o out")
        assert code in (2, 65), f"{flags}: {code} {err}"
        assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_the_models_fault_and_named(scion, tmp_path):
    """A broken source is no fault in Scion."""
    from safetensors.torch import save_file

    state = weights("tiny")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    code, _, err = scion("inherit tiny --layers 3 -o out")
    assert "model.layers.1.mlp.up_proj.weight" in err
    assert code in (0, 65), err
    code, _, err = scion("inherit tiny --keep 0,2 -o without")
    assert code == 0, err


def test_a_short_context_is_no_fault(scion, tmp_path):
    """A model of sixteen positions is proven on sixteen tokens."""
    tiny_model("gpt2", n_positions=16).save_pretrained(tmp_path / "short")
    code, _, err = scion("inherit short --layers 2 -o out")
    assert code == 0, err


def test_inspect_shows_layers_and_lists(scion, tmp_path):
    tiny_model("smollm3").save_pretrained(tmp_path / "s")
    code, out, _ = scion("inspect s --json")
    facts = json.loads(out)
    assert code == 0
    assert facts["num_parameters"] == sum(t.numel() for t in weights("s").values())
    assert facts["num_parameters"] == sum(facts["parameters_by_part"].values())
    assert [layer["no_rope_layers"] for layer in facts["layers"]] == config("s")["no_rope_layers"]
    assert [layer["layer_types"] for layer in facts["layers"]] == config("s")["layer_types"]
    inside = sum(layer["num_parameters"] for layer in facts["layers"])
    parts = facts["parameters_by_part"]
    assert inside == sum(n for part, n in parts.items() if part not in ("embedding", "head", "final_norm"))
    code, out, _ = scion("inspect s")
    assert code == 0
    assert "sliding_attention" in out
