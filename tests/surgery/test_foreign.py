"""Files that others wrote: other names, constants, tied copies, mixed types; and what is broken, refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import tiny_model, tiny_source
from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.families import family_of
from scionlm.families.registry import FAMILIES
from scionlm.families.shape import canonical_names
from scionlm.recipes.inherit import inherit_folder
from scionlm.sources import load_hf_model, open_folder, resolve

TYPES = [model_type for family in FAMILIES for model_type in family.model_types]
IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(6))
KEEP = {"keep": "0,2,4"}


def copy_of(source, path: Path) -> Path:
    return Path(shutil.copytree(source.path, path))


def rewrite(folder: Path, change) -> Path:
    """Replace the weights by what `change` makes of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def change_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def shard(folder: Path, files: int = 3) -> Path:
    """Put the weights into several files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(files):
        part = dict(list(weights.items())[number::files])
        save_file(part, folder / f"part-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def change_index(folder: Path, **changes) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"] | changes}))


def cut(folder: Path, out: Path, verify: bool = True, **options):
    inherit_folder(str(folder), out, KEEP | options, verify, 0)
    return load_file(out / "model.safetensors")


def refuse(folder: Path, tmp_path: Path, match: str, error=DataError, options=None) -> None:
    with pytest.raises(error, match=match) as caught:
        inherit_folder(str(folder), tmp_path / "made" / "out", KEEP if options is None else options, True, 0)
    assert caught.value.exit_code == {DataError: 65, UsageError: 2}[error]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# What is only written otherwise.


@pytest.mark.parametrize("model_type", TYPES)
def test_names_of_the_bare_decoder_with_constants_and_a_tied_copy_give_the_same_model(
    sources_root, tmp_path, model_type
):
    """As `h.0.attn.bias`, `decoder.layers.0...` and `layers.0...` of files that older programs wrote."""
    source = tiny_source(sources_root, model_type, {})
    family = family_of(source.config)
    constants = {
        "gpt2": {
            "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "h.0.attn.masked_bias": torch.tensor(-1e4),
        },
        "gpt_neox": {
            "layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "layers.0.attention.masked_bias": torch.tensor(-1e9),
            "layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
        "opt": {},
    }.get(model_type, {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})

    def bare(weights):
        names = canonical_names(family, list(weights))
        head, embedding = family.one("head").name, family.one("embedding").name
        full = {name: weights[stored] for name, stored in names.items()}
        full.setdefault(head, full[embedding].clone())
        stored_as = family.stored_as.get(head, head)
        short = {stored_as if n == head else n.removeprefix(family.prefix): t for n, t in full.items()}
        assert not any(name.startswith(family.prefix) for name in short)
        return short | constants

    folder = rewrite(copy_of(source, tmp_path / "bare"), bare)
    assert equal(cut(folder, tmp_path / "a"), cut(source.path, tmp_path / "b", verify=False))


def test_a_head_of_gpt_neox_under_either_name_is_the_head(sources_root, tmp_path):
    source = tiny_source(sources_root, "gpt_neox", {})
    assert "embed_out.weight" in load_file(source.path / "model.safetensors")
    folder = rewrite(
        copy_of(source, tmp_path / "new"),
        lambda w: {n.replace("embed_out", "lm_head"): t for n, t in w.items()},
    )
    made = cut(folder, tmp_path / "a")
    assert "embed_out.weight" in made  # the name that every program knows
    assert equal(made, cut(source.path, tmp_path / "b"))


def test_a_copy_of_the_tied_head_is_left_out_and_the_result_is_tied(llama, tmp_path):
    folder = rewrite(
        copy_of(llama, tmp_path / "copy"), lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}
    )
    assert "lm_head.weight" not in cut(folder, tmp_path / "out")
    model = load_hf_model(open_folder(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_is_no_copy_in_a_tied_model_is_not_dropped_in_silence(llama, tmp_path, capsys):
    """The configuration says tied, the file holds another head: one of the two is wrong."""
    folder = rewrite(copy_of(llama, tmp_path / "other"), lambda w: w | {"lm_head.weight": torch.randn(320, 32)})
    said = ""
    try:
        cut(folder, tmp_path / "out")
    except DataError as error:
        said = str(error)
    assert "lm_head.weight" in said + capsys.readouterr().err


def test_every_tensor_keeps_the_type_it_has(llama, tmp_path):
    """Norms in float32 among bfloat16, as some trainers leave them."""
    folder = rewrite(
        copy_of(llama, tmp_path / "mixed"),
        lambda w: {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in w.items()},
    )
    change_config(folder, dtype="bfloat16")
    for options in ({}, {"hidden_size": 24, "intermediate_size": 20}):
        made = cut(folder, tmp_path / f"out{len(options)}", **options)
        assert {n: t.dtype for n, t in made.items()} == {
            n: torch.float32 if "norm" in n else torch.bfloat16 for n in made
        }


def test_fresh_parts_get_the_type_that_most_tensors_have(llama, tmp_path):
    folder = rewrite(
        copy_of(llama, tmp_path / "mixed"),
        lambda w: {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in w.items()},
    )
    made = cut(folder, tmp_path / "out", fresh="mlp")
    assert made["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_shards_and_one_file_give_the_same_model(llama, tmp_path):
    folder = shard(copy_of(llama, tmp_path / "shards"))
    assert equal(cut(folder, tmp_path / "a"), cut(llama.path, tmp_path / "b"))


def test_a_source_through_links_like_those_of_a_hub_cache_is_read(llama, tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(llama.path.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert equal(cut(tmp_path / "snapshot", tmp_path / "a"), cut(llama.path, tmp_path / "b"))


def test_the_source_is_never_touched(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "source")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    cut(folder, tmp_path / "out", hidden_size=24)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


# What is broken.


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 6}, r"layers\.5\."),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers"),
        ({"hidden_size": 33}, "hidden_size|embed_tokens"),
        ({"hidden_size": 33, "head_dim": None}, "not divisible by num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"vocab_size": 10**12}, "vocab_size|embed_tokens"),
        ({"vocab_size": 319}, "embed_tokens"),
        ({"model_type": "mixtral"}, "not a family that Scion knows"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "holds a language model inside"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "runs no code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight' is missing"),
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
        ({"surprise": [1, 2, 3, 4, 5]}, "'surprise'"),
        ({"surprise": {"inner": [1, 2, 3, 4, 5]}}, r"'surprise\.inner'"),
        ({"hidden_act": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_cut_honestly_is_refused_and_says_why(llama, tmp_path, changes, match):
    refuse(change_config(copy_of(llama, tmp_path / "m"), **changes), tmp_path, match)


@pytest.mark.parametrize("length", [0, 4, 6])
def test_a_per_layer_list_of_another_length_is_refused_by_name(sources_root, tmp_path, length):
    source = tiny_source(sources_root, "gemma2", {})
    folder = change_config(copy_of(source, tmp_path / "m"), layer_types=["full_attention"] * length)
    refuse(folder, tmp_path, "layer_types")


@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "model.extra.weight", "model.layers.0.mlp.bias"])
def test_a_tensor_that_the_family_does_not_have_is_refused_by_name(llama, tmp_path, name):
    folder = rewrite(copy_of(llama, tmp_path / "m"), lambda w: w | {name: torch.zeros(2)})
    refuse(folder, tmp_path, f"tensor '{name}'")


@pytest.mark.parametrize("keep", ["0,2,4", "0"])
def test_a_tensor_that_is_missing_is_refused_by_name_even_in_a_layer_left_out(llama, tmp_path, keep):
    name = "model.layers.4.mlp.up_proj.weight"
    folder = rewrite(copy_of(llama, tmp_path / "m"), lambda w: {n: t for n, t in w.items() if n != name})
    refuse(folder, tmp_path, f"tensor '{name}' is missing", options={"keep": keep})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(llama, tmp_path, dtype):
    name = "model.layers.2.mlp.up_proj.weight"
    folder = rewrite(copy_of(llama, tmp_path / "m"), lambda w: w | {name: w[name].to(dtype)})
    refuse(folder, tmp_path, f"tensor '{name}' is stored as")


@pytest.mark.parametrize("name", ["../model.safetensors", "..", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(llama, tmp_path, name):
    folder = shard(copy_of(llama, tmp_path / "m"))
    shutil.copy(llama.path / "model.safetensors", tmp_path / "model.safetensors")
    change_index(folder, **{"model.norm.weight": name})
    refuse(folder, tmp_path, "leaves the model folder")


def test_an_index_that_promises_a_tensor_that_is_not_there_is_refused_by_name(llama, tmp_path):
    folder = shard(copy_of(llama, tmp_path / "m"))
    change_index(folder, **{"model.layers.2.mlp.up_proj.weight": "part-0.safetensors"})
    refuse(folder, tmp_path, "tensor 'model.layers.2.mlp.up_proj.weight'")


def test_a_tensor_in_two_shards_is_refused_by_name(llama, tmp_path):
    folder = shard(copy_of(llama, tmp_path / "m"))
    second = load_file(folder / "part-1.safetensors")
    name = next(iter(load_file(folder / "part-0.safetensors")))
    save_file(second | {name: torch.zeros(1)}, folder / "part-1.safetensors", {"format": "pt"})
    refuse(folder, tmp_path, f"tensor '{name}' is in both")


@pytest.mark.parametrize("where", [0, 4, 100, -1])
def test_a_shard_that_is_cut_short_is_refused_by_name(llama, tmp_path, where):
    folder = shard(copy_of(llama, tmp_path / "m"))
    path = folder / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:where])
    refuse(folder, tmp_path, r"part-1\.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_file_of_settings_that_is_none_is_refused_by_name(llama, tmp_path, name, content):
    folder = shard(copy_of(llama, tmp_path / "m"))
    (folder / name).write_text(content)
    refuse(folder, tmp_path, name.replace(".", r"\."))


@pytest.mark.parametrize("keep", ["5", "0,0", "-1", "0-5", "", "x"])
def test_layers_that_are_not_there_are_a_wrong_request(llama, tmp_path, keep):
    refuse(llama.path, tmp_path, "keep", UsageError, {"keep": keep})


@pytest.mark.parametrize("layers", [-1, 0, 6])
def test_a_number_of_layers_out_of_range_is_a_wrong_request(llama, tmp_path, layers):
    refuse(llama.path, tmp_path, "5 layers", UsageError, {"layers": layers})


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 0},
        {"hidden_size": 33},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"intermediate_size": 49},
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_or_are_too_large_are_a_wrong_request(llama, tmp_path, sizes):
    refuse(llama.path, tmp_path, next(iter(sizes)), UsageError, sizes)


def test_pickles_are_only_opened_when_asked_and_then_give_the_same_model(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copy_of(llama, tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    refuse(folder, tmp_path, "pickle")
    assert equal(cut(folder, tmp_path / "a", allow_pickle=True), cut(llama.path, tmp_path / "b"))
    (folder / "LICENSE").write_text("added since")
    resolve(str(folder), allow_pickle=True)
    assert (resolve(str(folder)).path / "LICENSE").read_text() == "added since"
    older = copy_of(llama, tmp_path / "older")  # a file as torch wrote them before it packed them into a zip
    (older / "model.safetensors").unlink()
    torch.save(weights, older / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert equal(cut(older, tmp_path / "c", allow_pickle=True), cut(llama.path, tmp_path / "d"))


def test_halves_that_a_family_stores_in_one_tensor_come_apart_where_the_source_has_them(tmp_path):
    """A source of bfloat16 in one file of two kinds: phi3 with a tied copy; nothing of it is lost."""
    model = tiny_model("phi3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    made = cut(tmp_path / "m", tmp_path / "out", intermediate_size=20)
    stored = load_file(tmp_path / "m" / "model.safetensors")["model.layers.2.mlp.gate_up_proj.weight"]
    assert torch.equal(made["model.layers.1.mlp.gate_up_proj.weight"], torch.cat([stored[:20], stored[48 : 48 + 20]]))


def test_a_failed_proof_leaves_nothing(llama, tmp_path, monkeypatch):
    from scionlm.surgery import apply

    real = apply._select
    monkeypatch.setattr(apply, "_select", lambda block, axis, index: real(block, axis, index).flip(axis))
    with pytest.raises(ScionError, match="surgery failed its own proof"):
        inherit_folder(str(llama.path), tmp_path / "made" / "out", {"num_attention_heads": 2}, True, 0)
    assert not (tmp_path / "made").exists()


def test_a_wrong_cut_is_also_caught_without_the_whole_proof(llama, tmp_path, monkeypatch):
    """`--no-verify`: the files are what was meant to be cut, but what was meant is wrong."""
    from scionlm.surgery import apply

    real = apply._select
    monkeypatch.setattr(apply, "_select", lambda block, axis, index: real(block, axis, index).flip(axis))
    with pytest.raises(ScionError, match="surgery failed its own proof"):
        inherit_folder(str(llama.path), tmp_path / "made" / "out", {"num_attention_heads": 2}, False, 0)
    assert not (tmp_path / "made").exists()
