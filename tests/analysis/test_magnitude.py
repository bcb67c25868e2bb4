"""Magnitudes of units against every weight they own, counted one by one."""

import numpy as np
import pytest
import torch
from planted import labels_of, layer_of, sizes, tokens, zero_values

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.analysis import magnitude
from scionlm.analysis.importance import activation_scores
from scionlm.analysis.magnitude import magnitude_scores
from scionlm.core.errors import DataError
from scionlm.families.weights import StateWeights

EVERY_MODEL = pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)


def every_tensor(model):
    """Each tensor's name, entry, layer, and the query heads that have it to themselves."""
    family, config, shape = sizes(model)
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    for spec in family.outside:
        if family.has(spec, config) and not (spec.role == "head" and shape.tie_word_embeddings):
            yield spec.name, spec, 0, ()
    for row in range(shape.num_hidden_layers):
        for spec in family.layer:
            name = f"{family.layers}.{row}.{spec.name}"
            if not family.has(spec, config):
                continue
            if spec.repeat is None:
                yield name, spec, row, ()
            elif spec.repeat == "heads":
                yield from ((name.format(head=h), spec, row, (h,)) for h in range(shape.num_attention_heads))
            else:
                for group in range(shape.num_key_value_heads):
                    heads = range(group * per_group, (group + 1) * per_group)
                    yield name.format(head=group), spec, row, heads


def counted_one_by_one(model):
    """The squares of every weight, added to each unit that owns it."""
    family, _, shape = sizes(model)
    layers = shape.num_hidden_layers
    squares = {
        "hidden": np.zeros((1, shape.hidden_size)),
        "heads": np.zeros((layers, shape.num_attention_heads)),
        "ffn": np.zeros((layers, shape.intermediate_size)),
    }
    state = model.state_dict()
    for name, spec, row, own in every_tensor(model):
        weight = state[name].double().numpy() + (family.norm_offset if "norm" in spec.role else 0.0)
        for head in own:
            squares["heads"][row, head] += (weight**2).sum()
        for kind, table in squares.items():
            for dim, axis in enumerate(spec.axes):
                for i, units in enumerate(labels_of(axis, kind, shape)):
                    for unit in units:
                        table[0 if kind == "hidden" else row, unit] += (np.take(weight, i, dim) ** 2).sum()
    return squares | {"hidden": squares["hidden"][0]}


@EVERY_MODEL
def test_magnitude_is_the_norm_of_all_that_a_unit_owns(model_type, changes, monkeypatch):
    model = tiny_model(model_type, **changes)
    config = model.config.to_dict()
    weights = StateWeights(config, model.state_dict())
    scores, expected = magnitude_scores(config, weights), counted_one_by_one(model)
    assert scores.keys() == expected.keys()
    monkeypatch.setattr(magnitude, "_BLOCK_WEIGHTS", 7 * 32 + 1)  # blocks that divide nothing evenly
    in_blocks = magnitude_scores(config, weights)
    for name, squares in expected.items():
        np.testing.assert_allclose(scores[name], np.sqrt(squares), rtol=1e-12)
        np.testing.assert_allclose(in_blocks[name], np.sqrt(squares), rtol=1e-12)


@EVERY_MODEL
def test_magnitude_knows_which_weights_a_head_has(model_type, changes):
    """Heads found by what they do, not by the layout: one whose values are zero has lost just those."""
    model = tiny_model(model_type, **changes)
    config = model.config.to_dict()
    before = magnitude_scores(config, StateWeights(config, model.state_dict()))["heads"]
    zero_values(model, 0)
    after = magnitude_scores(config, StateWeights(config, model.state_dict()))["heads"]
    silent = activation_scores(model, [tokens()])["heads"] == 0
    assert silent.any()
    assert ((after < before) == silent).all()


def test_broken_weights_have_no_magnitude():
    model = tiny_model("llama")
    config = model.config.to_dict()
    with torch.no_grad():
        layer_of(model, -1).self_attn.q_proj.weight[3, 0] = torch.inf
    with pytest.raises(DataError, match="scores of hidden are not finite"):
        magnitude_scores(config, StateWeights(config, model.state_dict()))
