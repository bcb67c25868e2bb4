"""Scores of heads, channels and layers against computations that know nothing of hooks, and against planted units."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import (
    TOUCHED,
    gate_input,
    gate_output,
    gate_stream,
    layer_of,
    llama_gates,
    parameters,
    plain_llama,
    sizes,
    slope,
    source_of,
    tokens,
    zero_unit,
    zero_values,
)

from factories import MODEL_IDS, MODELS, VOCAB_SIZE, tiny_model
from scionlm.analysis.importance import activation_scores, taylor_scores
from scionlm.analysis.magnitude import magnitude_scores
from scionlm.analysis.points import hook_points
from scionlm.core.errors import DataError
from scionlm.families.weights import StateWeights

EVERY_MODEL = pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
BOTH = pytest.mark.parametrize("score", [activation_scores, taylor_scores])


def test_activation_scores_are_those_of_a_llama_written_out():
    model, ids = tiny_model("llama"), tokens()
    _, seen, stream = plain_llama(model, ids, llama_gates(model, ids))
    seen["heads"] = [x.norm(dim=-1) for x in seen["heads"]]
    by_hand = {
        name: np.array([[np.linalg.norm(column) for column in np.abs(x.detach().numpy()).mean(1).T] for x in layers])
        for name, layers in seen.items()
    }
    scores = activation_scores(model, [ids])
    np.testing.assert_allclose(scores["heads"], by_hand["heads"], rtol=1e-5)
    np.testing.assert_allclose(scores["ffn"], by_hand["ffn"], rtol=1e-5)
    np.testing.assert_allclose(scores["hidden"], (by_hand["attention_read"] + by_hand["mlp_read"]).sum(0), rtol=1e-5)
    cosines = [
        [(a @ b / a.norm() / b.norm()).item() for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
        for x, y in pairwise(stream)
    ]
    np.testing.assert_allclose(scores["layers"], 1 - np.mean(cosines, axis=1), atol=1e-6)


def test_taylor_scores_are_gradients_of_gates_of_a_llama_written_out():
    model, ids = tiny_model("llama"), tokens()
    gates = llama_gates(model, ids)
    losses, _, _ = plain_llama(model, ids, gates)
    losses.sum().backward()
    by_hand = {name: gate.grad.squeeze(2).abs().sum(1).numpy() for name, gate in gates.items()}
    scores = taylor_scores(model, [ids])
    for name, expected in (
        ("heads", by_hand["heads"]),
        ("ffn", by_hand["ffn"]),
        ("hidden", (by_hand["attention_read"] + by_hand["mlp_read"]).sum(0)),
    ):
        np.testing.assert_allclose(scores[name], expected, rtol=1e-3, atol=1e-4 * expected.max())
        assert not np.allclose(scores[name] * 1.01, expected, rtol=1e-3, atol=1e-4 * expected.max())


# ---- every family --------------------------------------------------------------------------------


@EVERY_MODEL
def test_every_family_gives_every_score_and_stays_as_it_was(model_type, changes):
    model = tiny_model(model_type, **changes)
    shape = sizes(model)[2]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_of(model, 1).train()  # a mixture, which eval() and train() would not bring back
    frozen = next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    batches = [tokens(1, 2), tokens(2, 1, 7)]
    done = []
    for score in (activation_scores, taylor_scores):
        scores = score(model, iter(batches), done.append)
        assert {name: values.shape for name, values in scores.items() if name != "layers"} == {
            "hidden": (shape.hidden_size,),
            "heads": (shape.num_hidden_layers, shape.num_attention_heads),
            "ffn": (shape.num_hidden_layers, shape.intermediate_size),
        }
        assert all(values.dtype == np.float64 and values.std() > 0 for values in scores.values())
    assert done == [20, 27] * 2
    assert_untouched(model)
    assert [module.training for module in model.modules()] == modes
    assert [p is frozen for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def assert_untouched(model):
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert all(parameter.grad is None for parameter in model.parameters())


@EVERY_MODEL
def test_hidden_points_see_what_attention_and_mlp_read(model_type, changes):
    model = tiny_model(model_type, **changes)
    family, config, shape = sizes(model)
    read, normed = {}, []
    for index in range(shape.num_hidden_layers):
        for spec in family.layer:
            if not family.has(spec, config) or spec.repeat:
                continue
            module = layer_of(model, index).get_submodule(spec.module)
            if spec.role in ("query", "key", "value", "qkv", "gate", "up", "gate_up"):
                half = "attention" if spec.part == "attention" else "mlp"
                module.register_forward_pre_hook(
                    lambda m, args, key=(index, half): read.setdefault(key, []).append(args[0])
                )
            elif spec.role in ("attention_norm", "mlp_norm"):
                module.register_forward_hook(lambda m, args, out: normed.append(out))
    points = [point for point in hook_points(config) if point.kind == "hidden"]
    seen = {}
    for point in points:
        model.get_submodule(point.module).register_forward_pre_hook(
            lambda m, args, point=point: seen.__setitem__(point, args[0])
        )
    with torch.no_grad():
        model(input_ids=tokens())
    for point in points:
        assert point.is_normed == any(seen[point] is out for out in normed)
    assert {point.is_normed for point in points} == {model_type not in ("olmo2", "olmo3")}
    for (index, _), inputs in read.items():
        # a half without a point of its own (a shared norm) reads what another one shows
        shown = [seen[point] for point in points if point.layer == index]
        assert all(any(x is y for y in shown) for x in inputs)
    assert len({id(x) for x in seen.values()}) == len(points)  # and nothing counts twice


@EVERY_MODEL
def test_taylor_is_the_slope_of_the_loss_in_a_units_size(model_type, changes):
    model, ids = tiny_model(model_type, **changes, num_hidden_layers=1).double(), tokens(3, 1)
    shape = sizes(model)[2]
    step = 1e-5 if model_type == "opt" else 0.02  # ReLUs bend at once; RMS norms compute in float32 even here
    scores = taylor_scores(model, [ids])
    channels = {"heads": range(shape.head_dim), "ffn": [0], "hidden": [0]}
    slopes = {"heads": [], "ffn": [], "hidden": []}
    for point in hook_points(model.config.to_dict()):
        best = int(scores[point.kind].argmax())
        unit = [best * len(channels[point.kind]) + i for i in channels[point.kind]]
        module = model.get_submodule(point.module)
        if point.kind != "hidden":
            slopes[point.kind].append(slope(model, ids, lambda gate, m=module: gate_input(m, gate), unit, step))
        elif (source := source_of(model, ids, module)) is not None:  # other readers of it are gated too
            slopes["hidden"].append(slope(model, ids, lambda gate, m=source: gate_output(m, gate), unit, step))
        else:  # OLMo's residual stream behind attention
            layer = layer_of(model, 0)
            slopes["hidden"].append(slope(model, ids, lambda gate, m=layer: gate_stream(m, gate), unit, step))
    for kind, found in slopes.items():
        assert scores[kind].max() == pytest.approx(sum(found), rel=5e-3)


@EVERY_MODEL
def test_a_unit_that_is_not_read_has_taylor_score_zero(model_type, changes):
    model = tiny_model(model_type, **changes)
    assert (taylor_scores(model, [tokens()])["heads"] > 0).all()  # before
    head, channel = 2, 7
    zero_unit(model, ("attention_output",), "heads", head)
    zero_unit(model, ("mlp_output",), "ffn", channel)
    scores = taylor_scores(model, [tokens()])
    assert scores["heads"][TOUCHED, head] == 0 == scores["ffn"][TOUCHED, channel]
    assert (scores["heads"] == 0).sum() == 1
    assert activation_scores(model, [tokens()])["heads"][TOUCHED, head] > 0  # which looks at the unit, not its readers


@EVERY_MODEL
def test_a_head_without_values_and_a_channel_without_input_have_activation_zero(model_type, changes):
    model = tiny_model(model_type, **changes)
    shape = sizes(model)[2]
    zero_values(model, 0)
    zero_unit(model, ("gate", "up", "gate_up"), "ffn", 7)
    scores = activation_scores(model, [tokens()])
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    assert (scores["heads"][TOUCHED, :per_group] == 0).all()
    assert (scores["heads"] == 0).sum() == per_group
    assert scores["ffn"][TOUCHED, 7] == 0


@EVERY_MODEL
def test_a_layer_that_adds_nothing_has_no_influence(model_type, changes):
    model = tiny_model(model_type, **changes)
    assert (activation_scores(model, [tokens()])["layers"] > 0.01).all()
    with torch.no_grad():
        for parameter, _ in parameters(model, TOUCHED, "attention_output", "mlp_output"):
            parameter.zero_()
    influence = activation_scores(model, [tokens()])["layers"]
    assert abs(influence[TOUCHED]) < 1e-6
    assert influence.argmin() == TOUCHED
    assert (np.delete(influence, TOUCHED) > 0.01).all()


# ---- one unit, many samples, other numbers -------------------------------------------------------


def test_a_larger_unit_raises_its_own_score_only():
    """In the last layer, behind which nothing is looked at."""
    plain, larger = tiny_model("llama"), tiny_model("llama")
    last = layer_of(larger, -1)
    with torch.no_grad():
        last.self_attn.v_proj.weight[8:].mul_(2)  # key/value head 1: query heads 2 and 3
        last.mlp.up_proj.weight[9].mul_(3)
    before, after = (activation_scores(model, [tokens()]) for model in (plain, larger))
    np.testing.assert_allclose(after["heads"][-1, 2:], 2 * before["heads"][-1, 2:], rtol=1e-6)
    assert (after["heads"][-1, :2] == before["heads"][-1, :2]).all()
    for name in ("heads", "ffn", "layers"):
        assert (after[name][:-1] == before[name][:-1]).all()
    with torch.no_grad():
        last.self_attn.v_proj.weight[8:].div_(2)
        last.post_attention_layernorm.weight[4].mul_(2)
        last.mlp.up_proj.weight[:, 4].div_(2)  # what reads it stays as it was
        last.mlp.gate_proj.weight[:, 4].div_(2)
    after = activation_scores(larger, [tokens()])
    others = np.arange(48) != 9
    np.testing.assert_allclose(after["ffn"][-1, 9], 3 * before["ffn"][-1, 9], rtol=1e-5)
    np.testing.assert_allclose(after["ffn"][-1, others], before["ffn"][-1, others], rtol=1e-5)
    others = np.arange(32) != 4
    assert after["hidden"][4] > 1.01 * before["hidden"][4]
    assert (after["hidden"][others] == before["hidden"][others]).all()


def test_a_residual_stream_that_no_norm_precedes_is_counted_by_its_shares():
    model, ids = tiny_model("olmo2", num_hidden_layers=2), tokens()
    read = []
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
            module.register_forward_pre_hook(lambda m, args: read.append(args[0].double().numpy()))
    scores = activation_scores(model, [ids])
    shares = [np.abs(x) / np.sqrt((x**2).mean(-1, keepdims=True)) for x in read]
    expected = sum(np.sqrt((x.mean(1) ** 2).sum(0)) for x in shares)
    np.testing.assert_allclose(scores["hidden"], expected, rtol=1e-5)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.0  # a vector of zeros has no shares
    assert np.isfinite(activation_scores(model, [ids * 0])["hidden"]).all()


SEQUENCES = tokens(5, 7, 9)


@BOTH
@settings(max_examples=12)
@given(cuts=st.sets(st.integers(1, 6)), model_type=st.sampled_from(["llama", "opt", "gpt2"]))
def test_scores_do_not_depend_on_how_sequences_are_divided_into_batches(score, cuts, model_type):
    model = tiny_model(model_type)
    ends = [0, *sorted(cuts), 7]
    whole = score(model, [SEQUENCES])
    parts = score(model, [SEQUENCES[a:b] for a, b in pairwise(ends)])
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-5, atol=1e-6 * values.max())


@BOTH
def test_scores_depend_on_the_text(score):
    model = tiny_model("llama")
    a, b = (score(model, [tokens(seed)]) for seed in (1, 2))
    assert all(not np.allclose(a[name], b[name], rtol=1e-3) for name in a)


def test_samples_add_up_as_they_should():
    """Twice the same text: Taylor scores double, the L2 norm over samples grows by the root of two, influence stays."""
    model = tiny_model("llama")
    once, twice = (activation_scores(model, [tokens()] * n) for n in (1, 2))
    factors = {name: np.median(twice[name] / once[name]) for name in once}
    assert factors == pytest.approx({"hidden": 2**0.5, "heads": 2**0.5, "ffn": 2**0.5, "layers": 1.0})
    once, twice = (taylor_scores(model, [tokens()] * n) for n in (1, 2))
    assert all(np.allclose(twice[name], 2 * once[name], rtol=1e-12) for name in once)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "olmo2"])
def test_bfloat16_comes_close_to_float32(model_type):
    model, ids = tiny_model(model_type), tokens(4, 6, 24)
    full = [score(model, [ids]) for score in (activation_scores, taylor_scores)]
    half = [score(model.to(torch.bfloat16), [ids]) for score in (activation_scores, taylor_scores)]
    for name, values in full[0].items():
        np.testing.assert_allclose(half[0][name], values, rtol=0.1, atol=0.02 * values.max())
    for name, values in full[1].items():
        assert np.corrcoef(half[1][name].ravel(), values.ravel())[0, 1] > 0.98
        assert half[1][name].sum() == pytest.approx(values.sum(), rel=0.05)
    config = model.config.to_dict()
    sums = magnitude_scores(config, StateWeights(config, model.state_dict()))
    assert all(np.isfinite(values).all() for values in sums.values())


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scores_are_the_same_where_nothing_is_differentiated(score, mode):
    model = tiny_model("llama")
    outside = score(model, [tokens()])
    with mode():
        inside = score(model, [tokens() for _ in range(1)])
        made_inside = [tokens()]
    after = score(model, made_inside)
    assert all((outside[name] == inside[name]).all() and (outside[name] == after[name]).all() for name in outside)
    assert_untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@BOTH
def test_dropout_is_off_and_comes_back(score):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = score(model, [tokens()])
    model.train()
    scores = score(model, [tokens()])
    assert all((scores[name] == expected[name]).all() for name in scores)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert not torch.equal(model(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_taylor_computes_no_weight_gradient_and_leaves_one_that_is_there():
    model = tiny_model("llama")
    mark = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = mark
    asked = []
    taylor_scores(model, [tokens()], lambda done: asked.append([p.requires_grad for p in model.parameters()]))
    assert not any(asked[0])
    assert model.model.norm.weight.grad is mark
    assert (mark == 1).all()
    assert sum(p.grad is not None for p in model.parameters()) == 1


# ---- what can go wrong ---------------------------------------------------------------------------


def broken_text():
    yield tokens()
    raise OSError("the disk is gone")


def stop(done):
    raise KeyboardInterrupt


@BOTH
@pytest.mark.parametrize(
    ("batches", "on_progress", "error"),
    [
        (broken_text, None, OSError),
        (lambda: [tokens()], stop, KeyboardInterrupt),
        (lambda: [tokens(), tokens() + VOCAB_SIZE], None, IndexError),
        (lambda: [], None, DataError),
    ],
    ids=["text", "stop", "forward", "none"],
)
def test_whatever_happens_the_model_is_left_as_it_was(score, batches, on_progress, error):
    model = tiny_model("llama").train()
    with pytest.raises(error):
        score(model, batches(), on_progress)
    assert_untouched(model)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@BOTH
@pytest.mark.parametrize(
    "batch",
    [tokens()[0], torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 4)],
    ids=["one sequence", "no tokens", "no sequences", "floats"],
)
def test_batches_of_another_form_are_refused(score, batch):
    with pytest.raises(DataError, match="not token ids"):
        score(tiny_model("llama"), [batch])


def test_taylor_needs_a_next_token():
    with pytest.raises(DataError, match="one token"):
        taylor_scores(tiny_model("llama"), [tokens(length=1)])


@BOTH
def test_broken_weights_are_named_by_the_score_they_spoil(score):
    model = tiny_model("llama")
    with torch.no_grad():
        layer_of(model, -1).mlp.up_proj.weight[3, 0] = torch.nan
    with pytest.raises(DataError, match=r"scores of (ffn|heads) are not finite"):
        score(model, [tokens()])
