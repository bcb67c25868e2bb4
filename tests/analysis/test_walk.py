"""A model one layer at a time is that model: with all its layers, without some, and with one in memory at a time."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from handmade import hidden_states, without_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import layer_of, sizes, tokens

from factories import MODEL_IDS, MODELS, VOCAB_SIZE, tiny_model
from scionlm.analysis import walk as walks
from scionlm.analysis.walk import Walk, check_tokens, streamed
from scionlm.core.errors import DataError
from scionlm.families.shape import expected_tensors
from scionlm.families.weights import FolderWeights, StateWeights
from scionlm.sources.tensors import FolderTensors

EVERY_MODEL = pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
PLAIN = pytest.mark.parametrize("model_type", [model_type for model_type, changes in MODELS if not changes])
IDS = tokens(1, 3, 14)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def walked(walk, ids=IDS, without=()):
    """Hidden states before each layer and behind the last, and the logits."""
    states = [walk.embed(ids)]
    for index in range(walk.num_layers):
        with walk.at(index):
            states.append(states[-1] if index in without else walk.layer(index, ids, states[-1]))
    return states, walk.logits(ids, states[-1])


# ---- every family --------------------------------------------------------------------------------


@EVERY_MODEL
def test_layer_by_layer_a_model_is_what_it_is(model_type, changes):
    model = tiny_model(model_type, **changes)
    logits, states = logits_of(model), hidden_states(model, IDS)
    with Walk(model) as walk:
        assert walk.num_layers == len(states) - 1 == 5
        found, made = walked(walk)
    assert all(torch.equal(one, other) for one, other in zip(found, states, strict=True))
    assert torch.equal(made, logits)
    assert not any(torch.equal(a, b) for a, b in pairwise(states))


@EVERY_MODEL
def test_a_layer_that_is_left_out_is_as_if_it_had_never_been(model_type, changes):
    model = tiny_model(model_type, **changes)
    whole = logits_of(model)
    for gone in ({2}, {0}, {4}, {1, 3, 4}):
        expected = logits_of(without_layers(model, gone))
        with Walk(model) as walk:
            found = walked(walk, without=gone)[1]
        assert torch.equal(found, expected)
        assert not torch.allclose(found, whole, atol=1e-3)


@EVERY_MODEL
def test_logits_of_any_layer_are_those_of_final_norm_and_head(model_type, changes):
    """As a model that ends there gives them."""
    model = tiny_model(model_type, **changes)
    with Walk(model) as walk:
        states, _ = walked(walk)
        with torch.no_grad():
            early = walk.logits(IDS, states[2])
    assert torch.equal(early, logits_of(without_layers(model, {2, 3, 4})))


@EVERY_MODEL
def test_the_model_is_left_as_it_was(model_type, changes):
    model = tiny_model(model_type, **changes)
    before = logits_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = next(model.parameters()).requires_grad_(False)
    layer_of(model, 3).train()
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    own = [set(vars(module)) for module in model.modules()]
    with Walk(model) as walk:
        with torch.no_grad():
            walk.layer(2, IDS, walk.embed(IDS))
        assert "forward" in vars(layer_of(model, 2))
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), Walk(model):
            raise error
    assert [set(vars(module)) for module in model.modules()] == own
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == flags
    assert not frozen.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    layer_of(model, 3).eval()
    assert torch.equal(logits_of(model), before)


def test_a_forward_of_its_own_comes_back():
    """Where something else has already put itself in a layer's place."""
    model = tiny_model("llama", num_hidden_layers=2)
    layer = layer_of(model, 1)
    calls, own = [], layer.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = forward
    expected = logits_of(model)
    calls.clear()
    with Walk(model) as walk:
        assert torch.equal(walked(walk)[1], expected)
    assert len(calls) == 1
    assert vars(layer)["forward"] is forward


def test_an_error_inside_a_layer_ends_well():
    model = tiny_model("llama")
    before = logits_of(model)
    with Walk(model) as walk:
        with pytest.raises(IndexError), torch.no_grad():
            walk.layer(1, IDS + VOCAB_SIZE, walk.embed(IDS))
        with pytest.raises(RuntimeError), torch.no_grad():
            walk.layer(1, IDS, walk.embed(IDS)[..., :-1])
        assert torch.equal(walked(walk)[1], before)  # nothing of it is remembered
    with walk:  # the same one again
        assert torch.equal(walked(walk)[1], before)
    assert torch.equal(logits_of(model), before)


def test_layers_come_in_any_order_and_read_anything():
    model = tiny_model("llama")
    state = torch.randn(3, 14, 32, generator=torch.Generator().manual_seed(0))
    with Walk(model) as walk, torch.no_grad():
        first = walk.layer(3, IDS, state)
        walk.layer(0, IDS, state)
        again = walk.layer(3, IDS, state)
        one = walk.layer(3, IDS[1:2], state[1:2])
        embedded = walk.embed(IDS)
    assert torch.equal(first, again)
    torch.testing.assert_close(one, first[1:2])
    assert torch.equal(embedded, hidden_states(model, IDS)[0])


# ---- streamed ------------------------------------------------------------------------------------


class Counted(StateWeights):
    """Weights that tell which of them are read."""

    def __init__(self, config, state):
        super().__init__(config, state)
        self.read = []

    def rows(self, name, start, stop):
        self.read.append(name)
        return super().rows(name, start, stop)


@EVERY_MODEL
def test_streamed_a_model_is_what_it_is(model_type, changes):
    model = tiny_model(model_type, **changes)
    config, family = model.config.to_dict(), sizes(model)[0]
    weights = Counted(config, model.state_dict())
    walk = streamed(config, weights, torch.float32)
    assert not [name for name in weights.read if name.startswith(f"{family.layers}.")]
    with walk:
        states, logits = walked(walk)
    expected, wanted = walked(Walk(model).__enter__())
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))
    assert torch.equal(logits, wanted)
    assert sorted(weights.read) == sorted(place.name for place in expected_tensors(config))  # each once


@EVERY_MODEL
def test_streamed_weights_of_a_layer_are_there_while_it_is_asked_for(model_type, changes):
    model = tiny_model(model_type, **changes)
    config = model.config.to_dict()
    weights = Counted(config, model.state_dict())
    walk = streamed(config, weights, torch.float32)
    empty = [dict(walk.module(index).named_parameters()) for index in range(walk.num_layers)]
    for index, error in ((3, None), (1, ValueError)):
        weights.read.clear()
        with pytest.raises(error) if error else nullcontext(), walk.at(index):
            own = dict(walk.module(index).named_parameters())
            wanted = dict(layer_of(model, index).named_parameters())
            assert own.keys() == wanted.keys()
            for name, parameter in own.items():
                assert torch.equal(parameter, wanted[name])
                assert parameter.data_ptr() != wanted[name].data_ptr()
                assert not parameter.requires_grad
            assert all(f".{index}." in name for name in weights.read)
            others = [dict(walk.module(i).named_parameters()) for i in range(walk.num_layers) if i != index]
            kept = [parameters for i, parameters in enumerate(empty) if i != index]
            assert all(a[name] is b[name] for a, b in zip(others, kept, strict=True) for name in b)
            if error:
                raise error
        left = dict(walk.module(index).named_parameters())
        assert all(left[name] is empty[index][name] for name in left)
    assert not any(parameter.requires_grad for parameter in walk.model.parameters())
    assert not walk.model.training


@PLAIN
def test_streamed_from_a_folder(model_type, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()
    with FolderTensors(tmp_path) as tensors:
        weights = FolderWeights(config, tensors, tmp_path)
        with streamed(config, weights, torch.float32) as walk:
            assert torch.equal(walked(walk)[1], logits_of(model))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_streamed_in_another_type(model_type):
    model = tiny_model(model_type)
    config = model.config.to_dict()
    with streamed(config, StateWeights(config, model.state_dict()), torch.bfloat16) as walk:
        assert {parameter.dtype for parameter in walk.model.parameters()} == {torch.bfloat16}
        found = walked(walk)[1]
    expected = logits_of(tiny_model(model_type).to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


# ---- losses and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "cohere2"])
def test_losses_are_means_of_cross_entropies(model_type, monkeypatch):
    model = tiny_model(model_type)
    log_probs = torch.log_softmax(logits_of(model).double(), -1)
    by_hand = [-sum(float(log_probs[row, at, IDS[row, at + 1]]) for at in range(13)) / 13 for row in range(3)]
    with Walk(model) as walk, torch.no_grad():
        states, _ = walked(walk)
        whole = walk.losses(IDS, states[-1])
        monkeypatch.setattr(walks, "_BATCH_BYTES", 1)
        parts = walk.losses(IDS, states[-1])
    assert whole.dtype == torch.float64
    assert whole.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert parts.tolist() == pytest.approx(by_hand, rel=1e-6)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 300), st.integers(1, 2**28), st.one_of(st.none(), st.integers(1, 300_000)))
def test_batches_are_every_sequence_once(num_sequences, length, memory, channels):
    walk, before = Walk(WALKED), walks._BATCH_BYTES
    walks._BATCH_BYTES = memory
    try:
        batches = walk.batches(torch.zeros(num_sequences, length, dtype=torch.int64), channels)
    finally:
        walks._BATCH_BYTES = before
    assert [row for rows in batches for row in range(num_sequences)[rows]] == list(range(num_sequences))
    most = max(rows.stop - rows.start for rows in batches)
    width = channels or max(48, 4 * length)
    assert most == 1 or 4 * most * length * width <= memory
    assert len({rows.stop - rows.start for rows in batches[:-1]}) <= 1


WALKED = tiny_model("llama")


# ---- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "not token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), "not token ids"),
        (torch.zeros(2, 4), "not token ids"),
        (torch.zeros(0, 4, dtype=torch.int64), "not token ids"),
        (torch.zeros(4, 0, dtype=torch.int64), "not token ids"),
        (torch.zeros(3, 1, dtype=torch.int64), "one token"),
        (torch.full((2, 4), VOCAB_SIZE), f"between {VOCAB_SIZE} and {VOCAB_SIZE}; the model has {VOCAB_SIZE}"),
        (torch.tensor([[5, -1]]), "between -1 and 5"),
    ],
)
def test_tokens_that_cannot_be_are_refused(ids, message):
    with pytest.raises(DataError, match=message):
        check_tokens(ids, VOCAB_SIZE)


def test_tokens_that_can_be_are_not():
    check_tokens(torch.tensor([[0, VOCAB_SIZE - 1]]), VOCAB_SIZE)
    check_tokens(tokens(), VOCAB_SIZE)
