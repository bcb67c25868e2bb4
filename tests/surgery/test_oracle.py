"""Masked is cut, from the other side: what the oracle itself promises, with references that know nothing of it.

Numbers in brackets are those of the list in the method notes on shearing, section 7.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from factories import MODELS, tiny_model, tiny_source
from scionlm.families import ModelShape, family_of
from scionlm.families.weights import StateWeights
from scionlm.sources import load_hf_model
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.oracle import _count_kept_only, build_oracle, load_needed
from scionlm.surgery.plan import LayerPlan, SurgeryPlan

IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(4))


_loaded = {}


def load(source):
    """Return a copy of the source that a test may change."""
    if source.path not in _loaded:
        _loaded.clear()
        _loaded[source.path] = load_hf_model(source, torch.float32)
    return copy.deepcopy(_loaded[source.path])


@pytest.fixture(params=[(t, c) for t, c in MODELS if not c], ids=[t for t, c in MODELS if not c])
def plain_source(request, sources_root):
    """A tiny model of each family, as it comes."""
    return tiny_source(sources_root, *request.param)


def layers_of(model):
    return model.get_submodule(family_of(model.config.to_dict()).layers)


def whole(**changes) -> SurgeryPlan:
    """Return the plan that keeps everything, with changes to its layers, or to `hidden`."""
    plan = plan_depth(5, 5)
    hidden = changes.pop("hidden", None)
    return replace(plan, layers=tuple(replace(layer, **changes) for layer in plan.layers), hidden=hidden)


def run(model, plan):
    weights = StateWeights(model.config.to_dict(), dict(model.named_parameters()))
    return build_oracle([load_needed(model.config.to_dict(), weights, set(plan.keep))], plan)(IDS)


@torch.no_grad()
def plain(model):
    return model(IDS).logits


def close(a, b, bound=1e-5):
    return float((a - b).abs().max()) <= bound * float(b.abs().max())


def test_everything_kept_is_the_source_bitwise(source):
    """[6] Also with masks of ones, which is more than doing nothing."""
    shape = ModelShape.of(source.config)
    ones = whole(
        heads=tuple(range(shape.num_attention_heads)),
        kv_heads=tuple(range(shape.num_key_value_heads)),
        ffn=tuple(range(shape.intermediate_size)),
        hidden=tuple(range(shape.hidden_size)),
    )
    expected = plain(load(source))
    assert torch.equal(run(load(source), whole()), expected)
    assert torch.equal(run(load(source), ones), expected)


@torch.no_grad()
def test_leaving_a_layer_out_is_zeroing_what_it_adds(plain_source):
    """[7] Output projections of zero add nothing, behind a norm of their own too."""
    model = load(plain_source)
    for spec in family_of(plain_source.config).layer:
        if spec.role in ("attention_output", "mlp_output"):
            parameters = dict(layers_of(model)[2].named_parameters())
            if spec.name in parameters:
                parameters[spec.name].zero_()
    assert torch.equal(run(load(plain_source), plan_depth(5, keep=[0, 1, 3, 4])), plain(model))
    assert not close(run(load(plain_source), plan_depth(5, keep=[0, 1, 2, 4])), plain(model))


@torch.no_grad()
def zero_columns(model, role, dropped):
    """Zero the input channels `dropped` of every projection with this role, by hand."""
    for spec in family_of(model.config.to_dict()).layer:
        if spec.role == role and spec.name.endswith(".weight"):
            axis = 1 - spec.axes.index("hidden")
            for layer in layers_of(model):
                layer.get_parameter(spec.name).index_fill_(axis, torch.tensor(dropped), 0.0)
    return model


def test_leaving_heads_out_is_zeroing_their_columns_of_the_output_projection(plain_source):
    """[8] Except where a norm runs over the queries of all heads together: that one counts the kept ones only."""
    together = any(
        spec.axes == ("heads",) and spec.role == "query_norm" for spec in family_of(plain_source.config).layer
    )
    shape = ModelShape.of(plain_source.config)
    kept = (0, 3) if shape.num_key_value_heads != 1 else (0, 1)
    dropped = [h * shape.head_dim + i for h in range(4) if h not in kept for i in range(shape.head_dim)]
    masked = run(load(plain_source), whole(heads=kept))
    assert close(masked, plain(zero_columns(load(plain_source), "attention_output", dropped)), 1e-6) is not together
    assert not torch.equal(masked, plain(load(plain_source)))


def test_leaving_a_group_of_keys_out_leaves_all_its_queries_out(llama):
    by_group = run(load(llama), whole(kv_heads=(1,)))
    assert torch.equal(by_group, run(load(llama), whole(heads=(2, 3), kv_heads=(1,))))
    assert not torch.equal(by_group, run(load(llama), whole(heads=(0, 1), kv_heads=(0,))))


def test_leaving_channels_of_the_mlp_out_is_zeroing_their_columns_of_the_down_projection(plain_source):
    """[8]"""
    kept = tuple(range(1, 48, 3))
    masked = run(load(plain_source), whole(ffn=kept))
    dropped = [i for i in range(48) if i not in kept]
    assert close(masked, plain(zero_columns(load(plain_source), "mlp_output", dropped)), 1e-6)
    assert not torch.equal(masked, plain(load(plain_source)))


@torch.no_grad()
def poison(model, channels):
    """Put 1e4 wherever a channel of the residual stream enters from a table, is read by the head, or is biased."""
    family = family_of(model.config.to_dict())
    at = torch.tensor(channels)
    for spec in family.outside:
        if spec.role in ("embedding", "position", "head"):
            model.get_submodule(spec.module).weight.index_fill_(1, at, 1e4)
    for layer in layers_of(model):
        for spec in family.layer:
            if spec.axes == ("hidden",) and spec.name.endswith(".bias") and "output" in spec.role:
                parameter = dict(layer.named_parameters()).get(spec.name)
                if parameter is not None:
                    parameter.index_fill_(0, at, 1e4)
    return model


def test_dropped_channels_hold_what_they_like(source):
    """[10] Embedding columns of 1e4 change no logit by a bit; one column that is kept changes them."""
    size = ModelShape.of(source.config).hidden_size
    kept = tuple(i for i in range(size) if i % 3 != 1)
    dropped = [i for i in range(size) if i % 3 == 1]
    expected = run(load(source), whole(hidden=kept))
    assert torch.isfinite(expected).all()
    assert torch.equal(run(poison(load(source), dropped), whole(hidden=kept)), expected)
    assert not close(run(poison(load(source), [0]), whole(hidden=kept)), expected)


def reference_norm(norm, x, kept):
    """The same norm over the kept channels, from its definition, in float64."""
    part, weight = x[..., kept].double(), norm.weight[kept].double()
    if isinstance(norm, nn.LayerNorm):
        centred = part - part.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return scaled * weight + norm.bias[kept].double()
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if type(norm).__name__ == "Cohere2LayerNorm":
        part = part - part.mean(-1, keepdim=True)
    scaled = part / (part.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * (weight + 1 if type(norm).__name__.startswith("Gemma") else weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "cohere2", "opt", "gpt_neox", "olmo2"]
)
def test_a_norm_counts_only_the_channels_that_are_kept(model_type):
    """[9]"""
    model = tiny_model(model_type)
    norm = model.get_submodule(family_of(model.config.to_dict()).one("final_norm").module)
    size = norm.weight.shape[0]
    kept = torch.tensor([i for i in range(size) if i % 3])
    x = 3 * torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0)) + 1
    before = norm(x)
    _count_kept_only(norm, kept)
    found = norm(x)
    expected = reference_norm(norm, x, kept)
    assert float((found[..., kept].double() - expected).abs().max()) < 1e-5
    dropped = torch.tensor([i for i in range(size) if not i % 3])
    assert not found[..., dropped].any()
    assert float((before[..., kept].double() - expected).abs().max()) > 1e-2  # the control: it is not the whole norm
    assert torch.equal(norm(x.index_fill(-1, dropped, 1e4)), found)


def test_a_layer_that_stands_twice_has_its_own_heads_each_time(llama):
    """Masks of one place do not leak into the other."""
    once, other = LayerPlan(0, heads=(0, 2)), LayerPlan(0, heads=(1, 3))
    plan = SurgeryPlan(("m",), (5,), (once, other))
    model = load(llama)
    layers = layers_of(model)
    shape = ModelShape.of(llama.config)
    masked = run(load(llama), plan)
    first, second = layers[0], copy.deepcopy(layers[0])
    with torch.no_grad():
        for layer, kept in ((first, (0, 2)), (second, (1, 3))):
            for head in set(range(4)) - set(kept):
                layer.self_attn.o_proj.weight[:, head * shape.head_dim : (head + 1) * shape.head_dim] = 0.0
    model.model.layers = nn.ModuleList([first, second])
    model.config.num_hidden_layers = 2
    assert close(masked, plain_without_cache(model), 1e-6)
    assert not close(masked, run(load(llama), replace(plan, layers=(other, once))))


@torch.no_grad()
def plain_without_cache(model):
    return model(input_ids=IDS, use_cache=False).logits
