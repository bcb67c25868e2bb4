"""The proof refuses what is wrong, naming check and layer, and lets through what is right."""

import copy
import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from factories import tiny_model, tiny_source
from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.families import ModelShape, family_of
from scionlm.families.models import assemble
from scionlm.families.registry import FAMILIES
from scionlm.families.weights import FolderWeights
from scionlm.recipes.inherit import check, inherit_folder
from scionlm.sources import open_folder
from scionlm.sources.tensors import FolderTensors
from scionlm.surgery import probe as probe_module
from scionlm.surgery.apply import whole
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.fresh import lazy_fresh
from scionlm.surgery.probe import probe_layers
from scionlm.surgery.proof import Proof
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width

TYPES = [model_type for family in FAMILIES for model_type in family.model_types]
WITH_LAYER_TYPES = [t for t in TYPES if "layer_types" in family_of({"model_type": t}).per_layer_config]
# They have nothing of their own in what is proven; tests/surgery/test_families.py proves them, and refuses one index.
ALIKE = ("mistral", "qwen2", "granite", "smollm3", "olmo3", "starcoder2", "cohere2", "gemma2")
EACH_OWN = [pytest.param(t, marks=[pytest.mark.slow] if t in ALIKE else []) for t in TYPES]
MIDDLE = r"the first layer that differs is 1, from the source's 2\)"
# Softmax takes no notice of a bias of the keys where positions are not rotated into them.
INVISIBLE = {("gpt2", "c_attn.bias"), ("opt", "k_proj.bias"), ("cohere2", "k_proj.bias")}


def make(path, model_type, dtype=torch.float32, edit=None, config=None, **changes):
    """Return a folder with a tiny model whose attention is far from uniform: a wrong query must show."""
    model = tiny_model(model_type, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn", "qkv_proj", "query_key_value")):
                parameter.mul_(3.0)
        if edit is not None:
            edit(model.get_submodule(family_of(model.config.to_dict()).layers))
    model.to(dtype).save_pretrained(path)
    if config is not None:
        file = path / "config.json"
        whole_config = json.loads(file.read_text()) | config
        file.write_text(json.dumps({k: v for k, v in whole_config.items() if v != "absent"}))
    return open_folder(path)


def cut(source, keep=(0, 2, 4), **sizes):
    shape = ModelShape.of(source.config)
    rng = np.random.default_rng(3)
    scores = {
        "hidden": rng.random(shape.hidden_size),
        "heads": rng.random((shape.num_hidden_layers, shape.num_attention_heads)),
        "ffn": rng.random((shape.num_hidden_layers, shape.intermediate_size)),
    }
    plan = plan_depth(shape.num_hidden_layers, keep=list(keep))
    return plan_width(plan, family_of(source.config), shape, WidthTarget(**sizes), scores, "test")


def narrow(source) -> dict[str, int]:
    """Return a cut along every axis, one that every family can write down."""
    shape = ModelShape.of(source.config)
    hidden = 24 if family_of(source.config).has_head_dim else 2 * shape.head_dim
    return {"hidden_size": hidden, "intermediate_size": 20, "num_attention_heads": 2}


class Bench:
    """A surgery whose target can be spoilt before it is proven."""

    def __init__(self, surgery):
        self.surgery = surgery
        self.state = {op.place.name: self.made(op) for op in surgery.operations}

    def made(self, operation):
        return whole(operation, self.surgery.weights, lazy_fresh(self.surgery.config, 0))

    def prove(self, state=None, config=None):
        state = self.state if state is None else self.state | state
        return self.surgery.prove(assemble(config or self.surgery.config, state, torch.float32))

    def refuses(self, match, state=None, config=None, why=""):
        try:
            self.prove(state, config)
        except ScionError as error:
            said, code = str(error), error.exit_code
        else:
            pytest.fail(f"the proof let this through: {why}")
        assert code == 1
        assert "surgery failed its own proof: " in said
        assert "nothing was written" in said
        assert re.search(match, said), (why, said)


@contextmanager
def bench(source, plan):
    with open_surgery([source], plan) as surgery:
        yield Bench(surgery)


@pytest.mark.parametrize("model_type", EACH_OWN)
def test_every_single_tensor_from_the_neighbouring_layer_is_caught_in_its_layer(tmp_path, model_type):
    source = make(tmp_path, model_type)
    with bench(source, cut(source)) as b:
        b.prove()
        for op in b.surgery.operations:
            if op.place.layer == 1:
                wrong = replace(op, source=op.source.replace(".2.", ".3.", 1))
                b.refuses(MIDDLE, {op.place.name: b.made(wrong)}, why=op.place.name)


@pytest.mark.parametrize("model_type", EACH_OWN)
def test_every_axis_of_every_tensor_with_one_wrong_place_is_caught_in_its_layer(tmp_path, model_type):
    """A dropped channel in the place of a kept one, two exchanged, or the first ones instead of the chosen."""
    gelu = {"activation_function": "gelu"} if model_type == "opt" else {}  # a dead relu hides its channel
    source = make(tmp_path, model_type, **gelu)
    rng = np.random.default_rng(5)
    with bench(source, cut(source, **narrow(source))) as b:
        b.prove()
        for op in b.surgery.operations:
            if op.place.layer not in (None, 1):
                continue
            for axis, index in enumerate(op.index):
                if index is None:
                    continue
                size = b.surgery.weights[0].shape(op.source)[axis]
                at = int(rng.integers(len(index)))
                wrong = index.copy()
                wrong[at] = next(i for i in range(size) if i not in index)
                changed = b.made(replace(op, index=(*op.index[:axis], wrong, *op.index[axis + 1 :])))
                if any(model_type == t and op.place.name.endswith(name) for t, name in INVISIBLE):
                    continue
                where = MIDDLE if op.place.layer == 1 else ""
                b.refuses(where, {op.place.name: changed}, why=f"{op.place.name} axis {axis} place {at}")


@pytest.mark.parametrize("model_type", TYPES)
def test_what_stands_outside_the_layers_is_caught_and_no_layer_is_blamed(tmp_path, model_type):
    source = make(tmp_path, model_type)
    with bench(source, cut(source)) as b:
        for op in b.surgery.operations:
            if op.place.layer is not None:
                continue
            right = b.state[op.place.name]
            wrong = right.roll(1, 0) if right.ndim == 2 else torch.ones_like(right)
            b.refuses("^(?!.*layer that differs).*logits equal", {op.place.name: wrong}, why=op.place.name)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_position_table_that_is_off_by_one_is_caught(tmp_path, model_type):
    source = make(tmp_path, model_type)
    name = family_of(source.config).one("position").name
    with bench(source, cut(source)) as b:
        for by in (-1, 1):
            b.refuses("logits equal", {name: b.state[name].roll(by, 0)}, why=f"by {by}")


def test_halves_of_a_fused_gate_and_segments_of_a_fused_attention_exchanged_are_caught(tmp_path):
    source = make(tmp_path, "phi3", num_key_value_heads=4)
    with bench(source, cut(source, **narrow(source))) as b:
        gate_up = b.state["model.layers.1.mlp.gate_up_proj.weight"]
        gate, up = gate_up.chunk(2)
        b.refuses(MIDDLE, {"model.layers.1.mlp.gate_up_proj.weight": torch.cat([up, gate])})
        query, key, value = b.state["model.layers.1.self_attn.qkv_proj.weight"].chunk(3)
        for order in ((key, query, value), (query, value, key), (value, key, query)):
            b.refuses(MIDDLE, {"model.layers.1.self_attn.qkv_proj.weight": torch.cat(order)})


def test_a_qkv_that_is_stored_head_by_head_taken_for_one_in_segments_is_caught(tmp_path):
    source = make(tmp_path, "gpt_neox")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    with bench(source, cut(source, **narrow(source))) as b:
        heads = b.state[name].view(2, 3, 8, -1)
        b.refuses(MIDDLE, {name: heads.transpose(0, 1).reshape(b.state[name].shape)})
        op = next(op for op in b.surgery.operations if op.place.name == name)
        kept = b.surgery.plan.layers[1].heads
        fused = np.concatenate([part * 32 + head * 8 + np.arange(8) for part in range(3) for head in kept])
        b.refuses(MIDDLE, {name: b.made(replace(op, index=(fused, op.index[1])))})


@pytest.mark.parametrize("model_type", [t for t in TYPES if family_of({"model_type": t}).has_kv_heads])
def test_the_wrong_group_of_keys_or_two_heads_exchanged_are_caught(tmp_path, model_type):
    source = make(tmp_path, model_type)
    family = family_of(source.config)
    hidden = {} if family.has_head_dim else {"hidden_size": 16}
    with bench(source, cut(source, num_attention_heads=2, num_key_value_heads=2, **hidden)) as b:
        for spec in family.layer:
            if spec.role not in ("query", "key", "value", "attention_output") or spec.name.endswith("bias"):
                continue
            name = f"{family.layers}.1.{spec.name}"
            axis = 0 if spec.axes[0] != "hidden" else 1
            right = b.state[name]
            b.refuses(MIDDLE, {name: right.roll(right.shape[axis] // 2, axis)}, why=name)


@pytest.mark.parametrize("model_type", WITH_LAYER_TYPES)
def test_kinds_of_layers_that_were_not_cut_along_are_caught_however_wide_the_window(tmp_path, model_type):
    source = make(tmp_path, model_type, sliding_window=4096)
    with bench(source, cut(source, (1, 3))) as b:
        right = b.surgery.config
        assert right["layer_types"] != source.config["layer_types"][:2]
        b.refuses("bitwise .*differs is 0", config=right | {"layer_types": source.config["layer_types"][:2]})
        target = b.surgery.build(torch.float32)
        b.surgery.prove(target)
        windows = {getattr(m, "sliding_window", None) for m in [target.config, *target.modules()]}
        assert windows == {None, 4096}  # whatever the proof did to them, it took back


def test_rotations_that_were_not_cut_along_are_caught(tmp_path):
    source = make(tmp_path, "smollm3")
    with bench(source, cut(source)) as b:
        b.refuses(MIDDLE, config=b.surgery.config | {"no_rope_layers": source.config["no_rope_layers"][:3]})


def test_an_inverse_scale_that_was_not_folded_is_caught(tmp_path):
    source = make(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True)
    with bench(source, cut(source)) as b:
        b.prove()
        for op in b.surgery.operations:
            if op.scale is not None and op.place.layer == 1:
                b.refuses(MIDDLE, {op.place.name: b.made(replace(op, scale=None))}, why=op.place.name)


def test_embeddings_of_a_gemma_that_do_not_make_up_for_their_scale_are_caught(tmp_path):
    source = make(tmp_path, "gemma2")
    with bench(source, cut(source, hidden_size=24)) as b:
        b.prove()
        scaled = [op for op in b.surgery.operations if op.scale is not None]
        assert {op.place.spec.role for op in scaled} == {"embedding", "final_norm"}
        for op in scaled:
            b.refuses("masks", {op.place.name: b.made(replace(op, scale=None))}, why=op.place.name)


SILENT = {
    "untied": {"tie_word_embeddings": False},
    "context": {"max_position_embeddings": 64},
    "window": {"sliding_window": 5000},
}


@pytest.mark.parametrize("what", SILENT)
def test_settings_that_a_short_prompt_cannot_tell_apart_are_caught(tmp_path, what):
    source = make(tmp_path, "gemma3_text", sliding_window=4096)
    with bench(source, cut(source)) as b:
        state = {"lm_head.weight": b.state["model.embed_tokens.weight"].clone()} if what == "untied" else {}
        b.refuses("", state, b.surgery.config | SILENT[what], why=str(SILENT[what]))


def test_a_cache_that_does_not_fit_its_layers_is_caught(tmp_path):
    """Layers moved without renumbering: transformers' own slicing trap."""
    source = make(tmp_path, "llama")
    with bench(source, cut(source)) as b:
        target = b.surgery.build(torch.float32)
        for layer, number in zip(target.model.layers, (0, 0, 0), strict=True):
            layer.self_attn.layer_idx = number
        with pytest.raises(ScionError, match="cached greedy generation equals uncached"):
            b.surgery.prove(target)


def test_a_parameter_too_many_is_caught(tmp_path):
    source = make(tmp_path, "llama")
    with bench(source, cut(source)) as b:
        target = b.surgery.build(torch.float32)
        target.model.layers[0].extra = torch.nn.Parameter(torch.zeros(1))
        with pytest.raises(ScionError, match="parameters, as the formula says"):
            b.surgery.prove(target)


def test_a_tiny_change_of_one_number_is_caught_bitwise_and_in_its_layer(tmp_path):
    source = make(tmp_path, "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    with bench(source, cut(source)) as b:
        changed = b.state[name].clone()
        changed[0, 0] += 1e-5
        b.refuses(MIDDLE, {name: changed})


# What is right and must pass.

HALVES = [("llama", {}), ("qwen3", {}), ("gemma2", {}), ("gemma2", {"tie_word_embeddings": False}), ("gemma3_text", {})]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model_type", "changes"), HALVES, ids=str)
def test_sources_of_two_bytes_prove_themselves_when_cut(tmp_path, model_type, changes, dtype):
    source = make(tmp_path, model_type, dtype, **changes)
    for sizes in ({}, narrow(source)):
        with open_surgery([source], cut(source, **sizes)) as surgery:
            assert surgery.dtype == dtype
            surgery.prove(surgery.build(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moved_layer_with_an_inverse_scale_proves_itself_in_every_type(tmp_path, dtype):
    source = make(tmp_path, "gpt2", dtype, scale_attn_by_inverse_layer_idx=True)
    with open_surgery([source], cut(source)) as surgery:
        surgery.prove(surgery.build(torch.float32))


@pytest.mark.parametrize("keep", [(3, 1), (2, 4), (4, 0, 2)])
def test_layers_that_are_probed_alone_have_the_scale_of_their_place(tmp_path, monkeypatch, keep):
    source = make(tmp_path / "source", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with open_surgery([source], cut(source, keep=keep)) as surgery:
        surgery.write(tmp_path)
        with FolderTensors(tmp_path) as tensors:
            written, proof = FolderWeights(surgery.config, tensors, tmp_path), Proof()
            probe_layers(surgery, written, proof)
            monkeypatch.setattr(probe_module, "_set_place", lambda model, index: None)
            with pytest.raises(ScionError, match="a layer alone"):
                probe_layers(surgery, written, Proof())
    assert "each alone" in proof.checks[0]


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotations_prove_themselves(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ROPES[kind]
    source = make(tmp_path, "llama", rope_parameters=rope)
    for sizes in ({}, {"hidden_size": 24, "num_attention_heads": 2}):
        with open_surgery([source], cut(source, **sizes)) as surgery:
            surgery.prove(surgery.build(torch.float32))
            assert surgery.config["rope_parameters"] == source.config["rope_parameters"]


def test_an_older_way_to_write_a_scaled_rotation_proves_itself(tmp_path):
    old = {"rope_parameters": "absent", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | ROPES["llama3"]}
    source = make(tmp_path, "llama", config=old)
    with open_surgery([source], cut(source, hidden_size=24)) as surgery:
        surgery.prove(surgery.build(torch.float32))


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
}


def long_phi3(path):
    return make(path, "phi3", hidden_size=32, rope_parameters=copy.deepcopy(LONG), original_max_position_embeddings=64)


def test_a_phi3_with_a_long_context_proves_itself(tmp_path):
    source = long_phi3(tmp_path)
    for sizes in ({}, {"intermediate_size": 20}, {"hidden_size": 16, "num_attention_heads": 2}):
        with open_surgery([source], cut(source, **sizes)) as surgery:
            surgery.prove(surgery.build(torch.float32))


@pytest.mark.parametrize("sizes", [{"hidden_size": 24}, {"num_attention_heads": 2}], ids=str)
def test_sizes_that_transformers_refuses_for_a_phi3_with_a_long_context_are_a_wrong_request(tmp_path, sizes):
    """Its check of the factors takes hidden_size over heads for the size of a head."""
    source = long_phi3(tmp_path / "source")
    with pytest.raises(UsageError, match="phi3 has no head_dim setting: hidden_size"):
        inherit_folder(str(source.path), tmp_path / "out", dict(sizes), verify=False, shard_bytes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_hidden_size_that_transformers_refuses_is_a_wrong_request(sources_root, tmp_path, model_type, verify):
    source = tiny_source(sources_root, model_type, {})
    with pytest.raises(UsageError, match="22"):
        inherit_folder(str(source.path), tmp_path / "out", {"hidden_size": 22}, verify=verify, shard_bytes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "starcoder2", "olmo2"])
def test_one_group_of_keys_for_all_heads_proves_itself(tmp_path, model_type):
    source = make(tmp_path, model_type, num_key_value_heads=1)
    for sizes in ({}, narrow(source), {"hidden_size": 24}):
        with open_surgery([source], cut(source, **sizes)) as surgery:
            surgery.prove(surgery.build(torch.float32))


@pytest.mark.parametrize("value", [None, "absent"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_head_size_that_is_null_or_absent_proves_itself(tmp_path, model_type, value):
    source = make(tmp_path, model_type, config={"head_dim": value}, hidden_size=32)
    for sizes in ({}, {"hidden_size": 24}, {"hidden_size": 24, "num_attention_heads": 2}):
        with open_surgery([source], cut(source, **sizes)) as surgery:
            surgery.prove(surgery.build(torch.float32))
            assert not sizes or surgery.config["head_dim"] == 8


@pytest.mark.parametrize("model_type", TYPES)
def test_a_configuration_that_does_not_say_whether_the_head_is_tied_proves_itself(tmp_path, model_type):
    tied = family_of({"model_type": model_type}).defaults["tie_word_embeddings"]
    source = make(tmp_path, model_type, config={"tie_word_embeddings": "absent"}, tie_word_embeddings=tied)
    with open_surgery([source], cut(source, (1, 3))) as surgery:
        target = surgery.build(torch.float32)
        surgery.prove(target)
    assert (target.get_output_embeddings().weight is target.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("length", [8, 28])
@pytest.mark.parametrize(("model_type", "key"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_a_model_of_few_positions_proves_itself(tmp_path, model_type, key, length):
    source = make(tmp_path, model_type, **{key: length})
    with open_surgery([source], cut(source)) as surgery:
        surgery.prove(surgery.build(torch.float32))


def not_a_number(layers):
    layers[2].mlp.down_proj.weight[0, 0] = float("nan")


def test_a_source_that_is_not_a_number_is_blamed_and_not_the_surgery(tmp_path):
    source = make(tmp_path / "source", "llama", edit=not_a_number)
    with pytest.raises(DataError, match=r"model\.layers\.2\.mlp\.down_proj\.weight.*not finite"):
        inherit_folder(str(source.path), tmp_path / "out", {"layers": 3}, verify=True, shard_bytes=0)
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_none_in_a_layer_left_out_is_no_obstacle(tmp_path):
    source = make(tmp_path / "source", "llama", edit=not_a_number)
    inherit_folder(str(source.path), tmp_path / "out", {"keep": "0,1,4"}, verify=True, shard_bytes=0)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_proven_model_carries_nothing_of_the_proof(tmp_path):
    """A hook left behind would keep every layer's output, and its graph, of every step of a training."""
    source = make(tmp_path, "gemma2")
    with open_surgery([source], cut(source)) as surgery:
        before = surgery.build(torch.float32)
        target = surgery.build(torch.float32)
        surgery.prove(target)
    for module, plain in zip(target.modules(), before.modules(), strict=True):
        assert not module._forward_hooks, type(module)
        assert not module._forward_pre_hooks, type(module)
        assert vars(module).keys() == vars(plain).keys()
    assert target.config.to_dict() == before.config.to_dict()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in target.parameters())


# Files.


@pytest.fixture
def written(llama, tmp_path):
    """A surgery and the folder it wrote."""
    with open_surgery([llama], cut(llama, hidden_size=24, intermediate_size=20)) as surgery:
        surgery.write(tmp_path)
        yield surgery, tmp_path


@pytest.mark.parametrize("verify", [True, False])
def test_files_as_written_pass(written, verify):
    surgery, folder = written
    assert any("read back" in line for line in check(surgery, folder, verify).checks)


@pytest.mark.parametrize("part", ["first", "last"])
def test_one_bit_of_a_file_changed_is_caught_by_name(written, part):
    surgery, folder = written
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    at = -1 if part == "last" else 8 + int.from_bytes(data[:8], "little")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ScionError, match=r"read back|reads back") as caught:
        check(surgery, folder, True)
    assert "model." in str(caught.value)


@pytest.mark.parametrize("verify", [True, False])
def test_a_layer_of_the_files_exchanged_for_another_is_caught(written, verify):
    from safetensors.torch import load_file, save_file

    surgery, folder = written
    tensors = load_file(folder / "model.safetensors")
    swapped = {
        name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1."): tensor
        for name, tensor in tensors.items()
    }
    save_file(swapped, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScionError, match=r"layers\.[01]\."):
        check(surgery, folder, verify)


@pytest.mark.parametrize("verify", [True, False])
def test_files_in_another_type_than_the_source_are_caught(written, verify):
    from safetensors.torch import load_file, save_file

    surgery, folder = written
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScionError):
        check(surgery, folder, verify)


@pytest.mark.parametrize("fresh", [("mlp",), ("attention", "attention_norm"), ("embedding", "final_norm")])
def test_what_is_inherited_beside_fresh_parts_is_proven(tmp_path, fresh):
    source = make(tmp_path, "llama")
    plan = replace(cut(source, num_attention_heads=2), fresh=fresh)
    with open_surgery([source], plan) as surgery:
        assert any("inherited tensors" in check for check in surgery.prove(surgery.build(torch.float32)).checks)
        taken = [op for op in surgery.operations if op.fill == "source" and op.place.layer == 1]
        for operation in taken:
            wrong = replace(operation, source=operation.source.replace(".2.", ".3."))
            others = [wrong if op is operation else op for op in surgery.operations]
            with pytest.raises(ScionError, match="inherited tensors"):
                surgery.prove(replace(surgery, operations=others).build(torch.float32))


@pytest.mark.parametrize("fresh", [("embedding",), ("mlp",)])
def test_a_narrower_gemma_with_a_fresh_embedding_is_proven(tmp_path, fresh):
    """Its final norm takes back the scale of an inherited embedding alone."""
    source = make(tmp_path, "gemma2")
    with open_surgery([source], replace(cut(source, hidden_size=24), fresh=fresh)) as surgery:
        assert any("inherited tensors" in check for check in surgery.prove(surgery.build(torch.float32)).checks)


def test_layers_added_at_random_leave_the_others_proven(tmp_path):
    source = make(tmp_path, "gemma2")
    with open_surgery([source], plan_growth(["source"], 5, 7, "random")) as surgery:
        checks = surgery.prove(surgery.build(torch.float32)).checks
    assert any("own layers run in this order" in check for check in checks)
