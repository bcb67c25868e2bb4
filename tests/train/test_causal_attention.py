import pytest
import torch
from torch.nn import functional as F

from factories import tiny_model
from scionlm.train import attention
from scionlm.train.attention import _attend, use_causal_attention


def tensors(heads, groups, length, size=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, size), (2, groups, length, size), (2, groups, length, size)]
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_() for shape in shapes]


def exact(inputs, scale):
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scale)
    return output.transpose(1, 2), (query, key, value)


def error(found, right):
    return float((found.detach().double() - right).norm() / right.norm())


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 200, 520])
def test_outputs_and_gradients_are_those_of_attention_to_what_came_before(heads, groups, length):
    inputs, scale = tensors(heads, groups, length), 0.3
    output, _ = _attend(torch.nn.Module(), *inputs, None, scaling=scale)
    right, leaves = exact(inputs, scale)
    upstream = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = torch.autograd.grad(output, inputs, upstream)
    expected = torch.autograd.grad(right, leaves, upstream.double())
    assert error(output, right.detach()) < 5e-3
    assert all(error(mine, its) < 3e-2 for mine, its in zip(found, expected, strict=True))


def test_what_is_kept_of_short_sequences_changes_nothing(monkeypatch):
    def gradients():
        inputs = tensors(6, 2, 150)
        output = _attend(torch.nn.Module(), *inputs, None)[0]
        kept = sum(saved.numel() for saved in output.grad_fn.saved_tensors) - sum(given.numel() for given in inputs)
        return kept, torch.autograd.grad(output.float().square().sum(), inputs)

    kept, before = gradients()
    monkeypatch.setattr(attention, "kept_softmax", lambda length: 0)
    none, after = gradients()
    assert (kept, none) == (2 * 6 * (64 * 64 + 64 * 128 + 22 * 150), 0)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_other_products_stay_as_exact_as_they_were(monkeypatch):
    """Float32 products may be made in bfloat16 while scores are, which lose nothing by it, and at no other time."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    seen, product = [], torch.baddbmm

    def watched(*args, **kwargs):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", watched)
    inputs = tensors(4, 4, 100)
    _attend(torch.nn.Module(), *inputs, None)[0].sum().backward()
    assert set(seen) == {"bf16"}
    assert torch.backends.mkldnn.matmul.fp32_precision == before != "bf16"


def test_what_is_not_plainly_causal_goes_to_torch():
    inputs = tensors(4, 4, 8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)
    output, _ = _attend(torch.nn.Module(), *inputs, mask)
    right = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert torch.equal(output, right.transpose(1, 2))


def test_a_model_is_asked_to_use_it_only_where_it_would_use_torchs():
    chosen, left = tiny_model(), tiny_model()
    left.set_attn_implementation("eager")
    use_causal_attention(chosen)
    use_causal_attention(left)
    assert left.config._attn_implementation == "eager"
    ids = torch.arange(2 * 70).view(2, 70) % chosen.config.vocab_size
    chosen.to(torch.bfloat16)
    plain = tiny_model().to(torch.bfloat16)
    mine, right = chosen(input_ids=ids).logits.double(), plain(input_ids=ids).logits.double()
    assert error(mine, right.detach()) < 3e-2
