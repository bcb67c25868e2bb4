"""The same promises on the real 135M model."""

import pytest
import torch

from scionlm.sources import load_hf_model, resolve
from scionlm.surgery.apply import inherit_model
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.verify import verify_inheritance

IDS = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def source():
    return load_hf_model(resolve("smollm2-135m"))


@torch.no_grad()
def test_all_thirty_layers_are_the_source_bitwise(source):
    target = inherit_model(source, plan_depth(30, 30))
    for attention in ("sdpa", "eager"):
        source.set_attn_implementation(attention)
        target.set_attn_implementation(attention)
        assert torch.equal(source(IDS).logits, target(IDS).logits)
    source.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 8, 15])
def test_the_first_n_are_the_logit_lens_bitwise(source, layers):
    target = inherit_model(source, plan_depth(30, layers))
    hidden = source(IDS, output_hidden_states=True).hidden_states[layers]
    assert torch.equal(source.lm_head(source.model.norm(hidden)), target(IDS).logits)


@pytest.mark.parametrize("strategy", ["first_last", "spaced"])
def test_every_proof_holds(source, strategy):
    plan = plan_depth(30, 8, strategy=strategy)
    assert len(verify_inheritance(source, inherit_model(source, plan), plan).checks) == 4
