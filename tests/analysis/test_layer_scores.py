"""What layers are worth: passes forward and backward, removal, the lens; each against its definition."""

import math

import numpy as np
import pytest
import torch
from handmade import hidden_states, mean_losses, without_layers
from planted import layer_of, sizes, tokens

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.analysis import forward, walk
from scionlm.analysis.collapse import CollapseSettings, HeadCounts
from scionlm.analysis.forward import forward_pass
from scionlm.analysis.gradients import gradient_pass
from scionlm.analysis.importance import activation_scores
from scionlm.analysis.removal import greedy_removal, lens_losses, removal_losses
from scionlm.analysis.walk import Walk, streamed
from scionlm.core.errors import BrokenModelError
from scionlm.families.weights import StateWeights

EVERY_MODEL = pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
LENGTH = 12
IDS = tokens(1, 3, LENGTH)


def forward_of(model, ids=IDS, seed=0, **settings):
    with Walk(model) as walked:
        return forward_pass(walked, ids, CollapseSettings(ids.shape[1], **settings), seed)


def gradients_of(model, ids=IDS):
    with Walk(model) as walked:
        return gradient_pass(walked, ids)


def numbers(findings):
    """Every array of findings by name."""
    found = {}
    for name, value in vars(findings).items():
        if isinstance(value, HeadCounts):
            found |= {f"heads.{each}": getattr(value, each) for each in HeadCounts.names()}
        elif isinstance(value, dict):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            found[name] = np.asarray(value)
    return found


def assert_same(one, other, rtol=1e-5):
    one, other = numbers(one), numbers(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        if values.dtype.kind == "i":
            assert (values == other[name]).all(), name
        else:
            np.testing.assert_allclose(other[name], values, rtol=rtol, atol=rtol * np.abs(values).max(), err_msg=name)


# ---- forward -------------------------------------------------------------------------------------


def unbiased_cka(x, y):
    """By U-centred Gram matrices (Szekely and Rizzo 2014), written out."""

    def centred(features):
        gram = features @ features.T
        n = len(gram)
        np.fill_diagonal(gram, 0.0)
        rows = gram.sum(1, keepdims=True) / (n - 2)
        gram = gram - rows - rows.T + gram.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(gram, 0.0)
        return gram

    k, m = centred(x), centred(y)
    return (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())


@EVERY_MODEL
def test_forward_pass_is_what_its_definitions_say(model_type, changes):
    model = tiny_model(model_type, **changes)
    states = [state.double().numpy() for state in hidden_states(model, IDS)]
    found = forward_of(model)
    for index in range(5):
        before, after = states[index].reshape(36, -1), states[index + 1].reshape(36, -1)
        pairs = list(zip(before, after, strict=True))
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
        updates = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs]
        assert found.block_influence[index] == pytest.approx(1 - np.mean(cosines), rel=1e-4, abs=1e-6)
        assert found.update_norm[index] == pytest.approx(np.mean(updates), rel=1e-4)
        assert found.output_norm[index] == pytest.approx(np.mean([np.linalg.norm(b) for b in after]), rel=1e-4)
        squares = sum(float(p.detach().double().square().sum()) for p in layer_of(model, index).parameters())
        assert found.weight_norm[index] == pytest.approx(math.sqrt(squares))
    last = [[v / np.linalg.norm(v) for v in state[:, -1]] for state in states]
    for i in range(6):
        for j in range(6):
            angles = [math.acos(min(1.0, a @ b)) / math.pi for a, b in zip(last[i], last[j], strict=True)]
            assert found.angular[i, j] == pytest.approx(np.mean(angles), rel=1e-3, abs=1e-5)
            wanted = unbiased_cka(states[i].reshape(36, -1), states[j].reshape(36, -1))
            assert found.similarity[i, j] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    # and what has been measured before in another way is the same
    scores = activation_scores(model, [IDS])
    np.testing.assert_allclose(found.block_influence, scores["layers"], rtol=1e-3, atol=1e-5)
    assert found.activation.keys() == {"heads", "ffn", "hidden"}
    for name, values in found.activation.items():
        np.testing.assert_allclose(values, scores[name], rtol=1e-3, atol=1e-5 * scores[name].max())
        assert not np.allclose(values, scores[name] * 1.01, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2", "opt"])
def test_batches_change_nothing_in_the_forward_pass(model_type, monkeypatch):
    model = tiny_model(model_type)
    ids = tokens(3, 5, LENGTH)
    whole = forward_of(model, ids, lengths=(4,))
    for memory in (1, 2 * 4 * LENGTH * 48):
        monkeypatch.setattr(walk, "_BATCH_BYTES", memory)
        with Walk(model) as walked:
            assert len(walked.batches(ids)) == (5 if memory == 1 else 3)
        assert_same(whole, forward_of(model, ids, lengths=(4,)))


def test_attention_is_there_layer_by_layer():
    found = forward_of(tiny_model("llama"), lengths=(5,))
    assert found.heads.ranks.shape == found.heads.masses.shape == (5, 2, 4, 4, 3)
    assert found.heads.maps.shape == (5, 4, LENGTH, LENGTH)
    assert found.heads.entropy.shape == (5, 4, 3)
    assert found.angular.shape == found.similarity.shape == (6, 6)
    np.testing.assert_allclose(found.heads.maps.sum(-1), 1.0, rtol=1e-5)


def test_cka_is_one_for_the_same_and_does_not_mind_turning_and_scale():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, LENGTH, 16, generator=generator)
    turned = 3.0 * x @ torch.linalg.qr(torch.randn(16, 16, generator=generator))[0] + 0.5
    other = torch.randn(3, LENGTH, 2000, generator=generator)
    compared = forward._Compared(IDS, 0)
    for state in (x, turned, other, x * torch.arange(1, 17)):
        compared.add(state)
    similarity = compared.similarity()
    np.testing.assert_allclose(np.diag(similarity), 1.0, rtol=1e-12)
    assert similarity[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert abs(similarity[0, 2]) < 0.15  # which grows with the channels where it is biased
    assert 0.5 < similarity[0, 3] < 0.999
    assert (similarity == similarity.T).all() or np.allclose(similarity, similarity.T, rtol=1e-12)


def test_a_seed_chooses_the_tokens_that_are_compared(monkeypatch):
    monkeypatch.setattr(forward, "_COMPARED", 10)
    model = tiny_model("llama")
    once, again, other = (forward_of(model, seed=seed).similarity for seed in (0, 0, 1))
    assert (once == again).all()
    assert not np.allclose(once, other, atol=1e-3)
    states = [state.reshape(36, -1).double().numpy() for state in hidden_states(model, IDS)]
    chosen = np.random.default_rng(0).permutation(36)[:10]
    assert once[1, 4] == pytest.approx(unbiased_cka(states[1][chosen], states[4][chosen]), rel=1e-3)


def test_tokens_that_are_all_alike_compare_as_nothing():
    found = forward_of(tiny_model("llama"), torch.full((2, LENGTH), 7))
    assert (np.abs(found.similarity) <= 1).all()
    assert (np.diag(found.similarity) == 1).all()


# ---- backward ------------------------------------------------------------------------------------


def query_and_key(model, index):
    """The gradients of the weights that make queries and those that make keys; family by family, by hand."""
    config, layer = model.config, layer_of(model, index)
    kind, shape = config.model_type, sizes(model)[2]
    width = shape.num_attention_heads * shape.head_dim
    if kind == "gpt2":  # [in, out], all queries, all keys, all values
        gradient = layer.attn.c_attn.weight.grad
        return gradient[:, :width], gradient[:, width : 2 * width]
    if kind == "gpt_neox":  # head by head: its query, its key, its value
        gradient = layer.attention.query_key_value.weight.grad.view(shape.num_attention_heads, 3, shape.head_dim, -1)
        return gradient[:, 0], gradient[:, 1]
    if kind == "phi3":
        gradient = layer.self_attn.qkv_proj.weight.grad
        return gradient[:width], gradient[width : width + shape.num_key_value_heads * shape.head_dim]
    return layer.self_attn.q_proj.weight.grad, layer.self_attn.k_proj.weight.grad


def by_autograd(model, ids):
    """(Taylor, query, key) of each layer, from the graph of the whole model."""
    made, handles = [], []

    def keep(module, args, kwargs, output):
        after = output[0] if isinstance(output, tuple) else output
        after.retain_grad()
        made.append((args[0] if args else kwargs["hidden_states"], after))

    layers = range(sizes(model)[2].num_hidden_layers)
    for index in layers:
        handles.append(layer_of(model, index).register_forward_hook(keep, with_kwargs=True))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    log_probs = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])
    (-log_probs.mean()).backward()
    for handle in handles:
        handle.remove()
    taylor = []
    for before, after in made:
        each = [float(((y - x) * g).detach().sum()) for x, y, g in zip(before, after, after.grad, strict=True)]
        taylor.append(sum(abs(value) for value in each))  # gradients are of the mean already
    norms = [[float(g.norm()) for g in query_and_key(model, index)] for index in layers]
    return np.array(taylor), *np.array(norms).T


@EVERY_MODEL
def test_gradients_are_those_of_the_whole_graph(model_type, changes):
    model = tiny_model(model_type, **changes)
    frozen = list(model.parameters())[3].requires_grad_(False)
    found = gradients_of(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen.requires_grad_(True)
    taylor, query, key = by_autograd(model, IDS)
    np.testing.assert_allclose(found.taylor, taylor, rtol=2e-3, atol=1e-5 * taylor.max())
    np.testing.assert_allclose(found.query_gradient, query, rtol=2e-3)
    np.testing.assert_allclose(found.key_gradient, key, rtol=2e-3)
    assert not np.allclose(found.query_gradient, key, rtol=1e-2)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2"])
def test_batches_change_nothing_in_gradients(model_type, monkeypatch):
    model, ids = tiny_model(model_type), tokens(3, 5, LENGTH)
    whole = gradients_of(model, ids)
    for memory in (1, 2 * 4 * LENGTH * 48):
        monkeypatch.setattr(walk, "_BATCH_BYTES", memory)
        assert_same(whole, gradients_of(model, ids), rtol=2e-5)
    assert_same(whole, gradients_of(model, ids.flip(0)), rtol=2e-5)
    twice = gradients_of(model, torch.cat([ids, ids]))  # means stay where they are
    assert_same(whole, twice, rtol=2e-5)


def test_taylor_is_the_slope_of_the_loss_in_what_a_layer_adds():
    model, ids = tiny_model("llama").double(), IDS[:1]

    def loss(index, gate):
        def gated(module, args, output):
            return args[0] + gate * (output - args[0])

        handle = layer_of(model, index).register_forward_hook(gated)
        try:
            return float(mean_losses(model, ids)[0])
        finally:
            handle.remove()

    found = gradients_of(model, ids)
    for index in range(5):
        slope = (loss(index, 1.02) - loss(index, 0.98)) / 0.04
        assert found.taylor[index] == pytest.approx(abs(slope), rel=0.02)


def test_gradients_that_are_there_stay_and_errors_end_well():
    model = tiny_model("llama")
    mark = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = mark
    asked, done = [], []

    def tell(layers):
        done.append(layers)
        asked.append([parameter.requires_grad for parameter in model.parameters()])

    with torch.no_grad(), Walk(model) as walked:  # of the caller
        gradient_pass(walked, IDS, tell)
    assert done == list(range(1, 11))
    assert not any(any(flags) for flags in asked)
    assert model.model.norm.weight.grad is mark
    assert (mark == 1).all()
    for fail_at in (1, 5, 6, 10):

        def stop(layers, fail_at=fail_at):
            if layers == fail_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Walk(model) as walked:
            gradient_pass(walked, IDS, stop)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_inside_a_layer_leaves_no_weight_to_be_trained():
    """As when memory runs out on the way back, in a model of which some weights are frozen."""
    model = tiny_model("llama").requires_grad_(False)
    with Walk(model) as walked:
        own = walked.layer

        def fails(index, ids, hidden):
            if torch.is_grad_enabled():
                raise MemoryError
            return own(index, ids, hidden)

        walked.layer = fails
        with pytest.raises(MemoryError):
            gradient_pass(walked, IDS)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_are_the_same_where_nothing_is_differentiated():
    model = tiny_model("llama")
    with torch.inference_mode():
        found = gradients_of(model)
    assert_same(found, gradients_of(model))


# ---- removal, lens -------------------------------------------------------------------------------


@EVERY_MODEL
def test_losses_without_a_layer_are_those_of_a_model_that_never_had_it(model_type, changes):
    model = tiny_model(model_type, **changes)
    whole = mean_losses(model, IDS).numpy()
    with Walk(model) as walked:
        found = removal_losses(walked, IDS)
        fewer = removal_losses(walked, IDS, removed=(1, 4))
        lens = lens_losses(walked, IDS)
    assert found.candidates == [0, 1, 2, 3, 4]
    assert found.whole.dtype == found.without.dtype == np.float64
    np.testing.assert_allclose(found.whole, whole, rtol=1e-5)
    for index, losses in zip(found.candidates, found.without, strict=True):
        expected = mean_losses(without_layers(model, {index}), IDS).numpy()
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert not np.allclose(expected, whole, rtol=1e-4)
    assert fewer.candidates == [0, 2, 3]
    np.testing.assert_allclose(fewer.whole, mean_losses(without_layers(model, {1, 4}), IDS).numpy(), rtol=1e-5)
    for index, losses in zip(fewer.candidates, fewer.without, strict=True):
        expected = mean_losses(without_layers(model, {1, 4, index}), IDS).numpy()
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert lens.shape == (6, 3)
    np.testing.assert_allclose(lens[-1], whole, rtol=1e-5)
    for depth in (1, 3):
        expected = mean_losses(without_layers(model, set(range(depth, 5))), IDS).numpy()
        np.testing.assert_allclose(lens[depth], expected, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "cohere2"])
def test_the_lens_begins_with_the_head_on_the_embedding(model_type):
    model = tiny_model(model_type)
    family = sizes(model)[0]
    with torch.no_grad():
        embedded = hidden_states(model, IDS)[0]
        normed = model.get_submodule(family.one("final_norm").module)(embedded)
        logits = model.get_output_embeddings()(normed).double() * getattr(model.config, "logit_scale", 1.0)
        chosen = torch.log_softmax(logits, -1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
        with Walk(model) as walked:
            np.testing.assert_allclose(lens_losses(walked, IDS)[0], -chosen.mean(1), rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_greedy_removal_is_that_of_brute_force(model_type):
    model = tiny_model(model_type)
    gone, losses = [], []
    for _ in range(4):
        costs = {
            index: float(mean_losses(without_layers(model, {*gone, index}), IDS).mean())
            for index in range(5)
            if index not in gone
        }
        gone.append(min(costs, key=lambda index: costs[index]))
        losses.append(costs[gone[-1]])
    steps = []
    with Walk(model) as walked:
        found = greedy_removal(walked, IDS, 4, steps.append)
        assert greedy_removal(walked, IDS, 2).order == gone[:2]
        assert greedy_removal(walked, IDS, 0).order == []
    assert found.order == gone
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert steps == [1, 2, 3, 4]


def test_batches_and_progress_change_nothing_in_losses(monkeypatch):
    model, ids, done = tiny_model("llama"), tokens(3, 5, LENGTH), []
    with Walk(model) as walked:
        whole = removal_losses(walked, ids, (3,), done.append), lens_losses(walked, ids, done.append)
        monkeypatch.setattr(walk, "_BATCH_BYTES", 1)
        parts = removal_losses(walked, ids, (3,)), lens_losses(walked, ids)
    assert done == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert_same(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-6)


# ---- streamed, other types, small ----------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_a_model_that_is_streamed_gives_the_same(model_type):
    model = tiny_model(model_type)
    config = model.config.to_dict()
    with streamed(config, StateWeights(config, model.state_dict()), torch.float32) as walked:
        assert_same(forward_of(model), forward_pass(walked, IDS, CollapseSettings(LENGTH), 0), rtol=1e-6)
        assert_same(gradients_of(model), gradient_pass(walked, IDS), rtol=1e-6)
        streamed_losses = removal_losses(walked, IDS), lens_losses(walked, IDS)
        assert not any(parameter.requires_grad for parameter in walked.model.parameters())
    with Walk(model) as walked:
        assert_same(removal_losses(walked, IDS), streamed_losses[0], rtol=1e-9)
        np.testing.assert_allclose(lens_losses(walked, IDS), streamed_losses[1], rtol=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_bfloat16_comes_close_to_float32(model_type):
    model, ids = tiny_model(model_type), tokens(3, 4, 24)
    full = forward_of(model, ids), gradients_of(model, ids)
    half = (forward_of(model.to(torch.bfloat16), ids), gradients_of(model, ids))
    for one, other in zip(map(numbers, full), map(numbers, half), strict=True):
        for name, values in one.items():
            if values.dtype.kind == "f" and name not in ("heads.maps", "heads.sink_attention", "taylor"):
                np.testing.assert_allclose(
                    other[name], values, rtol=0.15, atol=0.05 * np.abs(values).max(), err_msg=name
                )
    with Walk(model) as walked:
        assert removal_losses(walked, ids).without.dtype == np.float64


@pytest.mark.parametrize(("layers", "sequences", "length"), [(1, 1, 2), (1, 1, 3), (2, 1, 2), (2, 2, 2), (2, 1, 5)])
def test_small_models_and_short_texts(layers, sequences, length):
    model, ids = tiny_model("llama", num_hidden_layers=layers), tokens(0, sequences, length)
    found = forward_of(model, ids)
    for name, values in (numbers(found) | numbers(gradients_of(model, ids))).items():
        assert np.isfinite(values).all(), name
    assert np.diag(found.similarity) == pytest.approx(1.0)
    assert (np.abs(found.similarity) <= 1 + 1e-9).all()
    with Walk(model) as walked:
        losses = removal_losses(walked, ids)
        assert losses.without.shape == (layers, sequences)
        assert lens_losses(walked, ids).shape == (layers + 1, sequences)
        assert len(greedy_removal(walked, ids, layers - 1).order) == layers - 1
    if layers == 1:
        with Walk(model) as walked:
            np.testing.assert_allclose(losses.without[0], lens_losses(walked, ids)[0])


# ---- broken models -------------------------------------------------------------------------------


def broken(name, index, value=torch.nan):
    model = tiny_model("llama")
    with torch.no_grad():
        layer_of(model, index).get_parameter(name)[3, 0] = value
    return model


PASSES = {
    "forward": lambda walked: forward_pass(walked, IDS, CollapseSettings(LENGTH), 0),
    "gradients": lambda walked: gradient_pass(walked, IDS),
    "removal": lambda walked: removal_losses(walked, IDS),
    "greedy": lambda walked: greedy_removal(walked, IDS, 2),
    "lens": lambda walked: lens_losses(walked, IDS),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", [1, 4])
@pytest.mark.parametrize("name", PASSES)
def test_a_number_that_is_not_finite_is_a_broken_model(name, index, value):
    model = broken("mlp.up_proj.weight", index, value)
    with Walk(model) as walked, pytest.raises(BrokenModelError):
        PASSES[name](walked)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "self_attn.v_proj.weight"])
def test_attention_that_is_not_finite_is_a_broken_model_too(name):
    with Walk(broken(name, 1)) as walked, pytest.raises(BrokenModelError):
        PASSES["forward"](walked)
