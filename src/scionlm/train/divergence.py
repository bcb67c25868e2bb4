"""How far the student's distribution is from the teacher's, and the gradient of that with respect to its logits.

For each row, p is the student's distribution, q the teacher's, and r the logarithm of p / q. With g the derivative of
a divergence with respect to p, the gradient with respect to the logits is p (g - sum p g); it is written out, since a
graph through the vocabulary would keep several copies of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch.nn import functional

Name = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Pair = tuple[torch.Tensor, torch.Tensor]

_EXACT = 60.0  # above this, log(1 + exp(x)) is x to the last bit of float64


def forward_kl(p: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> Pair:
    """Return KL(q || p), `[rows]`, in nats, and its gradient p - q, `[rows, vocab]`: cover all the teacher does.

    Source: Hinton, Vinyals and Dean, arXiv:1503.02531.
    """
    return -torch.linalg.vecdot(q, r), p - q


def reverse_kl(p: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> Pair:
    """Return KL(p || q) and its gradient p (r - KL): do nothing that the teacher would not.

    Source: Gu et al. (MiniLLM), arXiv:2306.08543. Differs: of the next token alone, on given text.
    """
    value = torch.linalg.vecdot(p, r)
    return value, (r - value[..., None]).mul_(p)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> Pair:
    """Return the mean of KL(p || m) and KL(q || m), m = (p + q) / 2, and its gradient with g = log(p / m) / 2.

    log(p / m) is log 2 - s with s = log(1 + exp(-r)), and log(q / m) is log 2 - s - r.

    Source: Lin 1991; Agarwal et al. (GKD), arXiv:2306.13649, with beta one half.
    """
    s = functional.softplus(-r, threshold=_EXACT)
    from_p = torch.linalg.vecdot(p, s)
    value = math.log(2) - (from_p + torch.linalg.vecdot(q, s + r)) / 2
    return value, s.neg_().add_(from_p[..., None]).mul_(p).div_(2)


DIVERGENCES: Mapping[Name, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def divergence(name: Name, p: torch.Tensor, q: torch.Tensor, r: torch.Tensor, top_k: int | None = None) -> Pair:
    """Return a divergence and its gradient with respect to the student's logits.

    Args:
        name: Which.
        p: Student, `[rows, vocab]`.
        q: Teacher, likewise.
        r: log(p / q), likewise, exact also where p and q are too small to be told from 0.
        top_k: Look at the teacher's most likely tokens alone, and at all others as if they were one. It is never more
            than the divergence over all. Differs: other tools compare the two within the top tokens only, which does
            not see what the student gives to the rest.
    """
    if top_k is None or top_k >= p.shape[-1]:
        return DIVERGENCES[name](p, q, r)
    top = q.topk(top_k, dim=-1).indices
    rest_p, rest_q = (_rest(some, top) for some in (p, q))
    coarse_p = torch.cat([p.gather(-1, top), rest_p], dim=-1)
    coarse_q = torch.cat([q.gather(-1, top), rest_q], dim=-1)
    coarse_r = torch.cat([r.gather(-1, top), (rest_p / rest_q).log()], dim=-1)
    value, of_classes = DIVERGENCES[name](coarse_p, coarse_q, coarse_r)
    # Inside the one class of all others, the gradient falls to each as its share of the class.
    gradient = p * (of_classes[..., -1:] / rest_p)
    return value, gradient.scatter_(-1, top, of_classes[..., :-1])


def _rest(p: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return what all tokens but the top ones have, `[rows, 1]`: a sum, for 1 - the others would lose its digits."""
    return p.scatter(-1, top, 0.0).sum(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny)
