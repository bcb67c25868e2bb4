"""How far the student's distribution is from the teacher's, and the gradient of that with respect to its logits.

For each row, p is the student's distribution, q the teacher's, and r the logarithm of p / q. With g the derivative of
a divergence with respect to p, the gradient with respect to the logits is p (g - sum p g); it is written out, since a
graph through the vocabulary would keep several copies of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

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


class Softmax(NamedTuple):
    """A distribution over tokens.

    Attributes:
        logits: `[rows, tokens]`.
        p: Their softmax.
        log_z: Logarithm of its normalizer, `[rows]`, float64: what is subtracted from it is often nearly as large.
    """

    logits: torch.Tensor
    p: torch.Tensor
    log_z: torch.Tensor


def softmax_of(logits: torch.Tensor) -> Softmax:
    """Return the distribution of logits.

    The normalizer is read off the largest of the row, where the softmax loses no digits: a second pass of exponentials
    would take as long as the first.
    """
    p = torch.softmax(logits, dim=-1)
    return Softmax(logits, p, logits.amax(-1).double() - p.amax(-1).double().log())


def divergence(name: Name, student: Softmax, teacher: Softmax, top_k: int | None = None) -> Pair:
    """Return a divergence, `[rows]`, and its gradient with respect to the student's logits, `[rows, tokens]`.

    Args:
        name: Which.
        student: p.
        teacher: q.
        top_k: Look at the teacher's most likely tokens alone, and at all others as if they were one. It is never more
            than the divergence over all. Differs: other tools compare the two within the top tokens only, which does
            not see what the student gives to the rest.
    """
    if top_k is None or top_k >= student.p.shape[-1]:
        shift = (student.log_z - teacher.log_z).to(student.p.dtype)
        return DIVERGENCES[name](student.p, teacher.p, (student.logits - teacher.logits).sub_(shift[..., None]))
    top = teacher.logits.topk(top_k, dim=-1).indices
    coarse_student, rest = _coarse(student.logits, top)
    value, of_classes = divergence(name, coarse_student, _coarse(teacher.logits, top)[0])
    # Inside the one class of all others, the gradient falls to each as its share of the class.
    return value, (rest * of_classes[..., -1:]).scatter_(-1, top, of_classes[..., :-1])


def _coarse(logits: torch.Tensor, top: torch.Tensor) -> tuple[Softmax, torch.Tensor]:
    """Return the top tokens with all others as one, `[rows, top + 1]`, and each other's share of that one."""
    rest = softmax_of(logits.scatter(-1, top, -math.inf))
    as_one = rest.log_z.to(logits.dtype)[..., None]
    return softmax_of(torch.cat([logits.gather(-1, top), as_one], dim=-1)), rest.p
