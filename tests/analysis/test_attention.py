"""The matrices that are looked at are the model's own: against transformers' eager attention, in every family."""

from dataclasses import replace

import pytest
import torch
from handmade import all_matrices, attention_of, causal_softmax, seen
from planted import layer_of, parameters, sizes, tokens

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.analysis.attention import attention_seen
from scionlm.core.errors import BrokenModelError, ScionError

EVERY_MODEL = pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
WINDOW, LENGTH = 8, 14
# Those whose every layer has a window if there is one; elsewhere `layer_types` says which.
ALL_SLIDE = ("mistral", "starcoder2", "phi3")


def sharp_model(model_type, **changes):
    """A tiny model whose attention is far from uniform."""
    model = tiny_model(model_type, **changes)
    for index in range(model.config.num_hidden_layers):
        for weight, spec in parameters(model, index, "query", "key", "qkv"):
            if len(spec.axes) == 2:
                weight.data.mul_(3.0)
    return model


def window_of(model, index):
    """How many tokens a position of a layer sees, by hand."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return WINDOW if kinds[index] == "sliding_attention" else LENGTH
    if model.config.model_type in ALL_SLIDE and model.config.sliding_window is not None:
        return min(model.config.sliding_window, LENGTH)
    return LENGTH


def eager(model, ids):
    """The attention that transformers' own eager implementation gives back."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(own)
    return found


@EVERY_MODEL
def test_matrices_are_those_of_the_model(model_type, changes):
    model, ids = sharp_model(model_type, **changes), tokens(1, 2, LENGTH)
    shape = sizes(model)[2]
    layers, expected = seen(model, ids), eager(model, ids)
    assert len(layers) == len(expected) == shape.num_hidden_layers
    apart = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    for index, (attention, wanted) in enumerate(zip(layers, expected, strict=True)):
        assert attention.num_heads == shape.num_attention_heads
        assert attention.key.shape[1] == shape.num_key_value_heads
        found = all_matrices(attention)
        assert found.shape == (2, shape.num_attention_heads, LENGTH, LENGTH)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4, check_stride=False)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        hidden = (apart < 0) | (apart >= window_of(model, index))
        assert (found[..., hidden] == 0).all()
        assert (found[..., ~hidden] > 0).float().mean() > 0.9
        values = attention.value.repeat_interleave(attention.num_heads // attention.value.shape[1], dim=1)
        torch.testing.assert_close((found @ values).transpose(1, 2), attention.output, atol=1e-5, rtol=1e-4)
        assert found.std() > 0.05  # which is not uniform
        assert not torch.allclose(found[:, 0], found[:, -1], atol=0.05)
    assert not torch.allclose(expected[0], expected[-1], atol=0.05)


def test_windows_are_there_to_be_respected():
    """What the test above relies on: some models do have shorter windows than the text, and layers of both kinds."""
    windows = {
        identity: {window_of(model, index) for index in range(model.config.num_hidden_layers)}
        for (model_type, changes), identity in zip(MODELS, MODEL_IDS, strict=True)
        for model in [tiny_model(model_type, **changes)]
    }
    assert windows["mistral-sliding_window"] == {WINDOW}
    assert sum(each == {WINDOW, LENGTH} for each in windows.values()) >= 8


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "cohere2", "stablelm"])
def test_either_kernel_of_a_model_is_understood(model_type, kernel):
    model, ids = tiny_model(model_type), tokens(2, 2, LENGTH)
    expected = eager(model, ids)
    model.set_attn_implementation(kernel)
    for attention, wanted in zip(seen(model, ids), expected, strict=True):
        torch.testing.assert_close(all_matrices(attention), wanted, atol=2e-6, rtol=1e-4, check_stride=False)
    assert model.config._attn_implementation == kernel


def test_scores_that_are_squeezed_are_squeezed():
    model, ids = tiny_model("gemma2", attn_logit_softcapping=0.5), tokens(1, 2, LENGTH)
    attention = seen(model, ids)[1]
    assert attention.softcap == 0.5
    torch.testing.assert_close(all_matrices(attention), eager(model, ids)[1], atol=2e-6, rtol=1e-4, check_stride=False)
    visible = all_matrices(attention)[0, 0, -1]
    assert visible.max() / visible[visible > 0].min() <= 2.72  # e, of scores between -0.5 and 0.5
    with pytest.raises(ScionError, match="not understood"):
        all_matrices(replace(attention, softcap=None))


def test_a_scale_that_depends_on_the_layer_is_seen():
    plain, scaled = (tiny_model("gpt2", scale_attn_by_inverse_layer_idx=each) for each in (False, True))
    ids = tokens(1, 2, LENGTH)
    scales = [[attention.scale for attention in seen(model, ids)] for model in (plain, scaled)]
    assert scales[0] == pytest.approx([8**-0.5] * 5)
    assert scales[1] == pytest.approx([8**-0.5 / number for number in range(1, 6)])


# ---- the proof -----------------------------------------------------------------------------------


@EVERY_MODEL
def test_attention_recomputed_otherwise_is_refused(model_type, changes):
    model, ids = sharp_model(model_type, **changes), tokens(1, 2, LENGTH)
    window = window_of(model, 0)
    attention = seen(model, ids)[0]
    all_matrices(attention)
    queries, keys = attention.query.clone(), attention.key.clone()
    queries[:, 1, LENGTH - 1] *= 1.1
    keys[:, 0, 2, 0] += 0.5
    wrong = {
        "scale": replace(attention, scale=1.05 * attention.scale),
        "query": replace(attention, query=queries),
        "key": replace(attention, key=keys),
        "order of heads": replace(attention, query=attention.query.roll(1, 1)),
        "order of positions": replace(attention, query=attention.query.roll(1, 2)),
        "unmasked": replace(attention, mask=torch.zeros(1, 1, LENGTH, LENGTH)),
        "squeezed": replace(attention, softcap=1.0),
        "value": replace(attention, value=attention.value * 1.01),
    }
    if window < LENGTH:
        wide = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
        wrong["window"] = replace(attention, mask=wide[None, None])
    for name, other in wrong.items():
        with pytest.raises(ScionError, match="not understood"):
            pytest.fail(f"{name}: {all_matrices(other)[0, 0, 0, 0]}")


def test_only_what_is_asked_for_is_proven():
    """One head that is wrong does not spoil the others, and is found."""
    attention = seen(tiny_model("llama"), tokens(1, 2, LENGTH))[0]
    output = attention.output.clone()
    output[1, :, 2] += 0.01
    broken = replace(attention, output=output)
    for row, heads in ((0, slice(0, 4)), (1, slice(0, 2)), (1, slice(3, 4))):
        torch.testing.assert_close(broken.matrices(row, heads), all_matrices(attention)[row, heads])
    with pytest.raises(ScionError, match="not understood"):
        broken.matrices(1, slice(2, 3))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_heads_of_a_group_share_keys(groups):
    """Also where only some of them are asked for."""
    matrices = causal_softmax(2, 6, 5, 5)
    attention = attention_of(matrices, groups)
    for heads in (slice(0, 6), slice(1, 4), slice(5, 6)):
        for row in range(2):
            torch.testing.assert_close(attention.matrices(row, heads), matrices[row, heads], atol=1e-6, rtol=1e-5)


def test_every_sequence_has_its_own_mask():
    matrices = causal_softmax(3, 2, 6, 6)
    matrices[1, :, 4:] = torch.tensor([0.0, 0.0, 0.5, 0.25, 0.25, 0.0])
    seen_all = matrices.clone().clamp_min(1e-6)
    attention = attention_of(seen_all / seen_all.sum(-1, keepdim=True))
    mask = torch.where(matrices[:, :1] > 0, 0.0, torch.finfo(torch.float32).min)
    values = attention.value
    own = replace(attention, mask=mask, output=(matrices @ values).transpose(1, 2))
    for row in range(3):
        torch.testing.assert_close(own.matrices(row, slice(0, 2)), matrices[row], atol=1e-4, rtol=1e-4)
        assert (own.matrices(row, slice(0, 2))[matrices[row] == 0] == 0).all()
    alone = replace(own, mask=mask[:1])
    torch.testing.assert_close(alone.matrices(2, slice(0, 2)), matrices[2], atol=1e-4, rtol=1e-4)  # is the same


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["query", "key", "value", "output"])
def test_attention_that_is_not_finite_is_a_broken_model(part, value):
    attention = seen(tiny_model("llama"), tokens(1, 2, LENGTH))[0]
    spoiled = getattr(attention, part).clone()
    spoiled[0, 1, 3, 0] = value
    with pytest.raises(BrokenModelError, match="not finite"):
        all_matrices(replace(attention, **{part: spoiled}))


# ---- other types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3", "olmo2"])
def test_coarser_types_are_understood(model_type, dtype):
    model, ids = tiny_model(model_type), tokens(1, 2, 24)
    expected = eager(model, ids)
    layers = seen(model.to(dtype), ids)
    for attention, wanted in zip(layers, expected, strict=True):
        found = all_matrices(attention)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        assert (found - wanted).abs().mean() < 0.05
    with pytest.raises(ScionError, match="not understood"):
        all_matrices(replace(layers[0], scale=2 * layers[0].scale))


def test_double_precision_is_understood():
    model, ids = tiny_model("llama").double(), tokens(1, 2, LENGTH)
    for attention, wanted in zip(seen(model, ids), eager(model, ids), strict=True):
        torch.testing.assert_close(all_matrices(attention), wanted.float(), atol=1e-5, rtol=1e-4, check_stride=False)


# ---- the model is left as it was -----------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")])
def test_the_model_is_left_as_it_was(model_type, kernel):
    model, ids = tiny_model(model_type), tokens(1, 2, LENGTH)
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    seen(model, ids)
    assert model.config._attn_implementation == kernel
    for error in (ScionError, KeyboardInterrupt):
        with pytest.raises(error), attention_seen(model, lambda attention, error=error: raise_(error)):
            model(input_ids=ids)
        assert model.config._attn_implementation == kernel
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def raise_(error):
    raise error("no more of it")


def test_nothing_is_seen_outside_and_the_innermost_sees():
    model, ids = tiny_model("llama"), tokens(1, 2, LENGTH)
    outer, inner = [], []
    with torch.no_grad(), attention_seen(model, outer.append):
        with attention_seen(model, inner.append):
            model(input_ids=ids)
        assert (len(outer), len(inner)) == (0, 5)
        model(input_ids=ids)
        assert (len(outer), len(inner)) == (5, 5)
    with torch.no_grad():
        model(input_ids=ids)
    assert (len(outer), len(inner)) == (5, 5)
    torch.testing.assert_close(all_matrices(outer[2]), all_matrices(inner[2]), atol=0, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere2"])
def test_being_looked_at_changes_no_result(model_type):
    model, ids = tiny_model(model_type), tokens(1, 2, LENGTH)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with attention_seen(model, lambda attention: None):
            during = model(input_ids=ids).logits
    torch.testing.assert_close(during, before, atol=1e-4, rtol=1e-4)


def test_dropout_of_a_model_in_training_is_not_taken_for_attention():
    model = tiny_model("gpt2", attn_pdrop=0.5)
    layer_of(model, 0).attn.train()
    with pytest.raises(ScionError, match="not understood"):
        all_matrices(seen(model, tokens(1, 2, LENGTH))[0])
