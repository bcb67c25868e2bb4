"""Random weights as papers draw them: spreads by role, seeds, and the loss that they begin with."""

import json
import math

import pytest
import torch

from factories import MODEL_IDS, MODELS, tiny_config
from scionlm.families import ModelShape, family_of
from scionlm.families.initialization import standard_deviations
from scionlm.families.models import empty_model, random_model
from scionlm.families.shape import expected_tensors

PAPERS = ("tinyllama", "gpt_neox")


def config_of(**sizes):
    return tiny_config("llama", tie_word_embeddings=False, head_dim=None, **sizes).to_dict()


def test_the_spreads_are_the_published_ones():
    shape = ModelShape.of({"model_type": "llama", "vocab_size": 1, "hidden_size": 2048, "num_hidden_layers": 22,
                           "num_attention_heads": 32, "intermediate_size": 5632})  # fmt: skip
    assert standard_deviations("tinyllama", shape) == pytest.approx((0.013975, 0.0010044), rel=1e-4)
    assert standard_deviations("gpt_neox", shape) == pytest.approx((0.013975, 0.0020088), rel=1e-4)
    with pytest.raises(ValueError, match="transformers has no spread"):
        standard_deviations("transformers", shape)


@pytest.mark.parametrize("init", PAPERS)
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_every_weight_of_every_family_is_drawn_by_its_role(model_type, changes, init):
    config = tiny_config(model_type, **changes).to_dict()
    family, shape = family_of(config), ModelShape.of(config)
    others, outputs = standard_deviations(init, shape)
    state = random_model(config, seed=1, init=init).state_dict()
    for place in expected_tensors(config):
        weights, role = state[place.name].double(), place.spec.role
        if place.name.endswith(".bias"):
            assert torch.count_nonzero(weights) == 0
        elif weights.dim() == 1:
            assert role.endswith("norm")
            assert torch.equal(weights + family.norm_offset, torch.ones_like(weights))
        else:
            wanted = outputs if role in ("attention_output", "mlp_output") else others
            error = 5 / math.sqrt(2 * weights.numel())
            assert weights.square().mean().sqrt() / wanted == pytest.approx(1, abs=error), place.name
            assert abs(weights.mean()) < 5 * wanted / math.sqrt(weights.numel())


def test_weights_depend_on_the_seed_and_on_nothing_else():
    config = config_of()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = random_model(config, 3, init="tinyllama").state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)  # nor does anything else depend on them
    torch.manual_seed(8)
    again, other = (random_model(config, seed, init="tinyllama").state_dict() for seed in (3, 4))
    matrices = [name for name, weights in one.items() if weights.dim() == 2]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    # And no two tensors are one another's copies.
    assert len({one[name].flatten()[:8].numpy().tobytes() for name in matrices}) == len(matrices)


def test_a_tied_head_is_the_embedding():
    model = random_model(tiny_config("llama").to_dict(), 0, init="gpt_neox")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("init", [*PAPERS, "transformers"])
def test_the_loss_begins_at_the_entropy_of_guessing_and_half_the_variance_of_the_logits(init):
    """Variance: hidden_size * 2 / (5 hidden_size) = 0.4 whatever the width; of transformers' 0.02, 64 * 0.0004."""
    vocab = 4096
    model = random_model(config_of(hidden_size=64, vocab_size=vocab), 0, init=init)
    ids = torch.randint(0, vocab, (64, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    variance = 64 * 0.0004 if init == "transformers" else 0.4
    error = 5 * math.sqrt(variance / ids[:, 1:].numel())
    assert loss == pytest.approx(math.log(vocab) + variance / 2, abs=error)
    assert error < 0.06  # tells 0.2 from nothing


def test_a_configuration_stays_as_it_was_given():
    """transformers fills in what nested sections leave out, in place."""
    config = tiny_config().to_dict() | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config.pop("rope_parameters", None)
    before = json.dumps(config, sort_keys=True)
    random_model(config, 0)
    empty_model(config, torch.float32)
    assert json.dumps(config, sort_keys=True) == before
