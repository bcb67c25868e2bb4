"""How far the student's distribution is from the teacher's, and the gradient of that with respect to its logits.

Written for one row of logits after another: p is the student's distribution, q the teacher's, each given as logarithms
that sum to one over the vocabulary. With g the derivative of a divergence with respect to p, the gradient with respect
to the logits is p (g - sum p g); it is written out, since a graph through the vocabulary would keep several copies.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch

Name = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Pair = tuple[torch.Tensor, torch.Tensor]


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Pair:
    """Return KL(q || p), `[rows]`, in nats, and its gradient p - q, `[rows, vocab]`: cover all the teacher does.

    Source: Hinton, Vinyals and Dean, arXiv:1503.02531.
    """
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp() - q


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Pair:
    """Return KL(p || q) and its gradient p (log p - log q - KL): do nothing that the teacher would not.

    Source: Gu et al. (MiniLLM), arXiv:2306.08543. Differs: of the next token alone, on given text.
    """
    p, log_ratio = log_p.exp(), log_p - log_q
    value = (p * log_ratio).sum(-1)
    return value, p * (log_ratio - value[..., None])


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> Pair:
    """Return the mean of KL(p || m) and KL(q || m), m = (p + q) / 2, and its gradient with g = log(p / m) / 2.

    Source: Lin 1991; Agarwal et al. (GKD), arXiv:2306.13649, with beta one half.
    """
    p, log_m = log_p.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = p * (log_p - log_m)
    value = (from_p + log_q.exp() * (log_q - log_m)).sum(-1) / 2
    return value, (from_p - p * from_p.sum(-1, keepdim=True)) / 2


DIVERGENCES: Mapping[Name, Callable[[torch.Tensor, torch.Tensor], Pair]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def divergence(name: Name, log_p: torch.Tensor, log_q: torch.Tensor, top_k: int | None = None) -> Pair:
    """Return a divergence and its gradient with respect to the student's logits.

    Args:
        name: Which.
        log_p: Student, `[rows, vocab]`.
        log_q: Teacher, likewise.
        top_k: Look at the teacher's most likely tokens alone, and at all others as if they were one. It is never more
            than the divergence over all. Differs: other tools compare the two within the top tokens only, which does
            not see what the student gives to the rest.
    """
    if top_k is None or top_k >= log_p.shape[-1]:
        return DIVERGENCES[name](log_p, log_q)
    top = log_q.topk(top_k, dim=-1).indices
    coarse_p = _coarse(log_p, top)
    value, of_classes = DIVERGENCES[name](coarse_p, _coarse(log_q, top))
    # Inside the one class of all others, the gradient falls to each as its share of the class.
    gradient = (log_p - coarse_p[..., -1:]).exp_() * of_classes[..., -1:]
    return value, gradient.scatter(-1, top, of_classes[..., :-1])


def _coarse(log_p: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return `[rows, top + 1]`: the top tokens, and all others as one."""
    rest = log_p.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, top), rest], dim=-1)
