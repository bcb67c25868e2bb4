"""The attention of a model as it computes it, one matrix a query head, without a second definition of any family.

transformers hands every attention layer's queries, keys, values, mask and scale to a function that can be registered.
Ours has the model's own kernel do the work and shows what went in and came out; the matrices are made from that, a few
heads at a time, and are proven: times the values, they must give what the kernel gave.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scionlm.core.errors import BrokenModelError, ScionError

_NAME = "scion_seen"

# Of the largest output; the kernels round differently, the more the coarser the type.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Attention:
    """What one attention layer was given and made of it. Legend: B sequences, T positions, K query heads, H head_dim.

    Attributes:
        query: `[B, K, T, H]`, positions already in it.
        key: `[B, groups, T, H]`.
        value: `[B, groups, T, H]`.
        mask: Added to the scores, `[B or 1, 1, T, T]`; None where everything is seen.
        scale: What scores are multiplied by.
        softcap: Where scores are squeezed by tanh, up to where.
        output: `[B, T, K, H]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None
    output: torch.Tensor

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    def matrices(self, sequence: int, heads: slice) -> torch.Tensor:
        """Return the attention of some heads on one sequence, `[heads, T, T]`, float32: rows attend to columns.

        Raises:
            BrokenModelError: It is not finite.
            ScionError: Times the values, it does not give the layer's output: this model computes something else.
        """
        groups = torch.arange(self.num_heads)[heads] // (self.num_heads // self.key.shape[1])
        scores = self.query[sequence, heads].float() @ self.key[sequence, groups].float().mT * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is not None:
            scores = scores + self.mask[min(sequence, len(self.mask) - 1)].float()
        found = torch.softmax(scores, dim=-1)
        expected = self.output[sequence].transpose(0, 1)[heads].float()
        difference = float((found @ self.value[sequence, groups].float() - expected).abs().max())
        largest = float(self.value[sequence, groups].abs().max())
        if not difference < torch.inf:
            raise BrokenModelError("attention is not finite: the model's weights are broken")
        if not difference <= _TOLERANCE[self.query.dtype] * max(largest, 1e-3):
            raise ScionError(
                f"attention that was recomputed gives another output than the model's own ({difference:g} apart, of "
                f"{largest:g}): it is not understood, so nothing is said about it"
            )
        return found


See = Callable[[Attention], None]
_seers: list[tuple[str, See]] = []


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    kernel, see = _seers[-1]
    if kernel == "eager":  # every family has its own
        attend: Any = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    else:
        attend = ALL_ATTENTION_FUNCTIONS[kernel]
    cap = {} if softcap is None else {"softcap": softcap}
    output, _ = attend(module, query, key, value, attention_mask, scaling=scaling, **cap, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    see(Attention(query, key, value, attention_mask, scale, softcap, output))
    return output, None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def attention_seen(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Show `see` the attention of every layer that runs while the block does."""
    kernel = model.config._attn_implementation or "sdpa"
    standard = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"  # which takes a cap on scores too
    own = kernel if kernel in ("eager", "sdpa") else standard
    model.set_attn_implementation(_NAME)
    _seers.append((own, see))
    try:
        yield
    finally:
        _seers.pop()
        model.set_attn_implementation(kernel)
