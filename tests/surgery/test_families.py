"""What surgery promises, for every family in every variant: the table of the documentation is made of these checks."""

import numpy as np
import pytest
import torch

from factories import MODEL_IDS, MODELS
from scionlm.families import ModelShape, family_of
from scionlm.families.weights import FolderWeights, StateWeights
from scionlm.sources import load_hf_model, open_folder
from scionlm.sources.tensors import FolderTensors
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.files import check_files
from scionlm.surgery.probe import probe_layers
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width

VARIANTS_ARE_SLOW = pytest.mark.parametrize(
    "source",
    [pytest.param(model, marks=[pytest.mark.slow] if model[1] else []) for model in MODELS],
    ids=MODEL_IDS,
    indirect=True,
)
"""Of what takes long, and asks of variants nothing that other tests do not."""
IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))


def build(source, plan):
    with open_surgery([source], plan) as surgery:
        model = surgery.build(torch.float32)
        return model, surgery.prove(model)


def scores(shape: ModelShape, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.random(shape.hidden_size),
        "heads": rng.random((shape.num_hidden_layers, shape.num_attention_heads)),
        "ffn": rng.random((shape.num_hidden_layers, shape.intermediate_size)),
    }


def check_written(surgery, folder, sample):
    with FolderTensors(folder) as tensors:
        written = FolderWeights(surgery.config, tensors, folder)
        proof = check_files(surgery, written, sample)
        probe_layers(surgery, written, proof)


def cut(source, keep=(0, 2, 4), seed=0, **sizes):
    shape = ModelShape.of(source.config)
    depth = plan_depth(5, keep=list(keep))
    return plan_width(depth, family_of(source.config), shape, WidthTarget(**sizes), scores(shape, seed), "test")


def widths(source) -> list[dict[str, int]]:
    """Return the cuts that the family can express."""
    shape = ModelShape.of(source.config)
    if not family_of(source.config).has_head_dim:
        both = {"hidden_size": 2 * shape.head_dim, "num_attention_heads": 2}
        return [{"intermediate_size": 20}, both, both | {"intermediate_size": 20}]
    cuts = [{"hidden_size": 24}, {"intermediate_size": 20}, {"num_attention_heads": 2}]
    if shape.num_key_value_heads > 1:
        cuts.append({"num_attention_heads": 2, "num_key_value_heads": 2})
        cuts.append({"num_key_value_heads": 1})
    return [*cuts, {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2}]


@torch.no_grad()
def test_all_layers_are_the_source_bitwise(source):
    target, _ = build(source, plan_depth(5, 5))
    theirs = load_hf_model(source, torch.float32)
    assert torch.equal(theirs(IDS).logits, target(IDS).logits)
    assert all(torch.equal(t, target.state_dict()[name]) for name, t in theirs.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_the_first_n_layers_are_the_logit_lens_bitwise(source, layers):
    """Head of norm of hidden state n: a second oracle, transformers' own."""
    target, _ = build(source, plan_depth(5, layers))
    model = load_hf_model(source, torch.float32)
    family = family_of(source.config)
    seen = {}
    stack = model.get_submodule(family.layers)
    norm = model.get_submodule(family.one("final_norm").module)
    stack[layers - 1].register_forward_hook(lambda m, a, out: seen.update(h=out[0] if isinstance(out, tuple) else out))
    norm.register_forward_pre_hook(lambda m, args: (seen["h"],))
    assert torch.equal(model(IDS).logits, target(IDS).logits)


def test_any_layers_prove_themselves(source):
    _, proof = build(source, plan_depth(5, keep=[0, 2, 4]))
    assert len(proof.checks) == 4


@VARIANTS_ARE_SLOW
@pytest.mark.parametrize("keep", [[1, 2], [4]])
def test_any_other_layers_prove_themselves(source, keep):
    _, proof = build(source, plan_depth(5, keep=keep))
    assert len(proof.checks) == 4


@VARIANTS_ARE_SLOW
@pytest.mark.parametrize("keep", [[4, 0, 2], [0, 1, 0, 1], [3, 3, 3]])
def test_layers_out_of_order_and_twice_prove_themselves(source, keep):
    build(source, plan_depth(5, keep=keep, repeat=True))


@torch.no_grad()
def test_growth_with_zero_outputs_changes_nothing_bitwise(source):
    target, _ = build(source, plan_growth(["source"], 5, 8, "zero_output"))
    assert len(target.get_submodule(family_of(source.config).layers)) == 8
    if not source.config.get("scale_attn_by_inverse_layer_idx"):  # there the factor is folded into the queries
        assert torch.equal(load_hf_model(source, torch.float32)(IDS).logits, target(IDS).logits)


@VARIANTS_ARE_SLOW
@pytest.mark.parametrize("init", ["stack", "random"])
def test_other_growth_keeps_what_there_was(source, init):
    target, _ = build(source, plan_growth(["source"], 5, 7, init))
    theirs = load_hf_model(source, torch.float32).state_dict()
    scaled = bool(family_of(source.config).inverse_layer_scale) and init == "stack"
    for name, tensor in target.state_dict().items():
        if name in theirs and not scaled:
            assert torch.equal(theirs[name], tensor)


def test_every_width_proves_itself(source):
    for sizes in widths(source):
        target, proof = build(source, cut(source, **sizes))
        assert any("masks" in check for check in proof.checks)
        shape = ModelShape.of(target.config.to_dict())
        assert {key: getattr(shape, key) for key in sizes} == sizes
        assert shape.head_dim == ModelShape.of(source.config).head_dim


@VARIANTS_ARE_SLOW
@torch.no_grad()
def test_one_index_wrong_exceeds_every_bound_a_hundredfold(source):
    """The negative control: a neighbouring head, channel or layer in the place of the right one."""
    for sizes in [{}, *widths(source)]:
        right, wrong = cut(source, **sizes), cut(source, (0, 3, 4) if not sizes else (0, 2, 4), seed=1, **sizes)
        a, _ = build(source, right)
        b, _ = build(source, wrong)
        expected = a(IDS).logits
        assert float((expected - b(IDS).logits).abs().max()) > 1e-3 * float(expected.abs().max())


def test_written_files_load_as_the_model_in_memory(source, tmp_path):
    plan = cut(source, **widths(source)[-1])
    with open_surgery([source], plan) as surgery:
        surgery.write(tmp_path, shard_bytes=30_000)
        model = surgery.build(torch.float32)
        for sample in (False, True):
            check_written(surgery, tmp_path, sample)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load_hf_model(open_folder(tmp_path))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    out = tmp_path / "again"
    again.save_pretrained(out)
    third = load_hf_model(open_folder(out))
    assert torch.equal(again(IDS).logits, third(IDS).logits)


def test_an_unmapped_tensor_is_an_error_that_names_it(source):
    model = load_hf_model(source)
    state = dict(model.state_dict()) | {"model.layers.0.surprise.weight": torch.zeros(2)}
    with pytest.raises(Exception, match="surprise"):
        StateWeights(source.config, state)
