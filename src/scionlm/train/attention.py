"""Causal attention for bfloat16 on a CPU: a few large matrix products in place of torch's kernel of small ones.

torch's own kernel for a CPU multiplies bfloat16 in tiles that its matrix products are slow at, above all on the way
back. Here the queries go by blocks: each is multiplied with all keys up to its end, the heads that share keys together,
so what lies beyond the diagonal is mostly left out and the keys are not repeated. Scores and softmax are float32, so
that gradients are as exact as those of torch's kernel. The softmax of short sequences is kept for the way back in
bfloat16, as it is multiplied there; of long ones it is made again.
"""

import math
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scionlm.families.causal import blocks, kept_softmax

_NAME = "scion_causal"


def use_causal_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU that would use torch's kernel use this one where attention is plainly causal."""
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(_NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and query.dtype == torch.bfloat16
    plain = plain and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "s_aux", "cache"))
    if not (plain and query.device.type == "cpu" and query.shape[2] == key.shape[2] > 1):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keep = torch.is_grad_enabled() and query.requires_grad
    return _Causal.apply(query, key, value, scale, keep), None


class _Causal(torch.autograd.Function):
    """Both ways as operators that a compiler calls as they are."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, keep: bool
    ) -> torch.Tensor:
        output, kept = _forward(query, key, value, scale, keep)
        ctx.save_for_backward(query, key, value, kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(gradients[0], *ctx.saved_tensors, ctx.scale), None, None


@torch.library.custom_op("scionlm::causal_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[sequences, length, heads, size]` of the others' `[sequences, heads, length, size]`, and what is kept."""
    sequences, heads, length, _ = query.shape
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    output = value.new_empty(sequences, length, heads, value.shape[-1])
    kept = query.new_empty(_num_kept(query) if keep else 0)
    wide, place = keys.float(), 0
    for start, end in blocks(length):
        p = _softmax(_rows(query, len(keys), start, end), wide[:, :end], start, scale)
        if len(kept):
            place, p = place + p.numel(), kept[place : place + p.numel()].view(p.shape).copy_(p)
        else:
            p = p.to(value.dtype)
        mine = (p @ values[:, :end]).view(sequences, heads, end - start, -1)
        output[:, start:end] = mine.transpose(1, 2)
    return output, kept


@torch.library.custom_op("scionlm::causal_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sequences, heads, length, _ = query.shape
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    of_output = gradient.transpose(1, 2)
    of_query = query.new_empty(query.shape)
    of_keys, of_values = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (keys, values))
    wide, place = keys if len(kept) else keys.float(), 0
    for start, end in blocks(length):
        queries, above = (_rows(tensor, len(keys), start, end) for tensor in (query, of_output))
        if len(kept):
            shape = (*queries.shape[:2], end)
            p = kept[place : place + math.prod(shape)].view(shape)
            place += p.numel()
        else:
            p = _softmax(queries, wide[:, :end], start, scale).to(value.dtype)
        of_values[:, :end] += p.mT @ above
        of_p = above @ values[:, :end].mT
        of_scores = torch.ops.aten._softmax_backward_data(of_p, p, -1, p.dtype)
        of_query[:, :, start:end] = (of_scores @ keys[:, :end]).view(sequences, heads, end - start, -1)
        of_keys[:, :end] += of_scores.mT @ queries
    of_key = of_keys.mul_(scale).to(key.dtype).view(key.shape)
    return of_query.mul_(scale), of_key, of_values.to(value.dtype).view(value.shape)


@_forward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return output, query.new_empty(_num_kept(query) if keep else 0)


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _num_kept(query: torch.Tensor) -> int:
    sequences, heads, length, _ = query.shape
    return sequences * heads * kept_softmax(length)


def _rows(tensor: torch.Tensor, groups: int, start: int, end: int) -> torch.Tensor:
    """Return some rows of all heads, those that share keys one after the other: `[groups, rows, size]`."""
    return tensor[:, :, start:end].reshape(groups, -1, tensor.shape[-1])


def _softmax(queries: torch.Tensor, keys: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Return the softmax in float32, of keys that are float32 already."""
    scores = _products(queries, keys, scale)
    rows = keys.shape[1] - start
    beyond = torch.full((rows, rows), -torch.inf).triu_(1)
    scores.view(len(keys), -1, rows, keys.shape[1])[..., start:].add_(beyond)
    return torch.softmax(scores, dim=-1)


def _products(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scaled scores in float32, as exact as ever: both factors are bfloat16 by value.

    A processor with units for bfloat16 multiplies with these then, and adds up in float32.
    """
    onednn: Any = torch.backends.mkldnn
    setting = onednn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return torch.baddbmm(queries.new_empty(1, dtype=torch.float32), queries.float(), keys.mT, beta=0, alpha=scale)
    finally:
        setting.fp32_precision = before


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
