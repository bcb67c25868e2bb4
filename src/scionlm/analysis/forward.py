"""One pass over all layers, forward: attention, what each layer does to the residual stream, heads and channels."""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from scionlm.analysis.attention import attention_seen
from scionlm.analysis.collapse import CollapseSettings, HeadCounts, LayerCollapse
from scionlm.analysis.importance import ActivationSums, Scores, finite
from scionlm.analysis.points import hook_points, watched
from scionlm.analysis.walk import Walk

OnProgress = Callable[[float], None]

# Tokens whose hidden states are compared between layers: their Gram matrices stay in memory, one a layer.
_COMPARED = 512
# What rounding leaves of a statistic that is zero, of the squares it is made of.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ForwardFindings:
    """What the pass found. L layers; index 0 of what has L + 1 is the embedding's output, the last the last layer's.

    Attributes:
        heads: Attention, each array with the layers in front.
        activation: `heads`, `ffn` and `hidden` by the size of their activations (Minitron).
        block_influence: 1 - mean cosine of what goes in and what comes out, `[L]`.
        update_norm: Mean over tokens of the L2 norm of what a layer adds over that of what it reads, `[L]`.
        output_norm: Mean over tokens of the L2 norm of what comes out, `[L]`.
        weight_norm: L2 norm of all the layer's weights, `[L]`.
        angular: Angular distance, over pi, of each sequence's last token before and after, mean, `[L + 1, L + 1]`.
        similarity: Linear CKA of hidden states, `[L + 1, L + 1]`.
    """

    heads: HeadCounts
    activation: Scores
    block_influence: NDArray[np.float64]
    update_norm: NDArray[np.float64]
    output_norm: NDArray[np.float64]
    weight_norm: NDArray[np.float64]
    angular: NDArray[np.float64]
    similarity: NDArray[np.float64]


@torch.no_grad()
def forward_pass(
    walk: Walk, ids: torch.Tensor, settings: CollapseSettings, seed: int, on_progress: OnProgress = lambda layers: None
) -> ForwardFindings:
    """Return what one pass over the layers finds.

    Args:
        walk: The model.
        ids: `[sequences, settings.seq_len]`, without padding.
        settings: What is counted of attention.
        seed: Chooses the tokens whose hidden states are compared.
        on_progress: Told the layers done.

    Raises:
        BrokenModelError: A number is not finite.
        ScionError: The model's attention is not understood.

    Source: block influence: Men et al. 2024 (ShortGPT), arXiv:2403.03853; angular distance: Gromov et al. 2024,
        arXiv:2403.17887, equation 3; CKA: Kornblith et al. 2019, arXiv:1905.00414, with the unbiased estimator of
        Nguyen et al. 2021, arXiv:2010.15327, which does not rise with the number of channels.
    """
    points = hook_points(walk.model.config.to_dict())
    compared = _Compared(ids, seed)
    hidden = walk.embed(ids)
    compared.add(hidden)
    activations, layers = ActivationSums(walk.shape.num_attention_heads), []
    sums = np.zeros((3, walk.num_layers))
    weight_norm = np.zeros(walk.num_layers)
    with watched(walk.model, points, activations.see):
        for index in range(walk.num_layers):
            collapse = LayerCollapse(settings, walk.shape.num_attention_heads, len(ids))
            after = torch.empty_like(hidden)
            with walk.at(index), attention_seen(walk.model, collapse.see):
                for rows in walk.batches(ids):
                    collapse.first = rows.start
                    activations.num_sequences = rows.stop - rows.start
                    after[rows] = walk.layer(index, ids[rows], hidden[rows])
                    sums[:, index] += _change(hidden[rows], after[rows])
                parameters = walk.module(index).parameters()
                weight_norm[index] = sum(float(p.double().square().sum()) for p in parameters) ** 0.5
            hidden = after
            compared.add(hidden)
            layers.append(collapse.counts)
            on_progress(index + 1)
    cosine, update, output = sums / ids.numel()
    numbers = {
        "block_influence": 1.0 - cosine,
        "update_norm": update,
        "output_norm": output,
        "weight_norm": weight_norm,
        "angular": compared.angular(),
        "similarity": compared.similarity(),
    }
    return ForwardFindings(heads=HeadCounts.stacked(layers), activation=activations.scores(points), **finite(numbers))


def _change(before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
    """Return, summed over tokens: cosine of both, norm of their difference over that of the first, norm of the last."""
    before, after = before.float(), after.float()
    size = torch.linalg.vector_norm(before, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    parts = (
        functional.cosine_similarity(before, after, dim=-1),
        torch.linalg.vector_norm(after - before, dim=-1) / size,
        torch.linalg.vector_norm(after, dim=-1),
    )
    return np.array([float(part.double().sum()) for part in parts])


class _Compared:
    """Hidden states of a few tokens behind each layer, as far as comparing them needs."""

    def __init__(self, ids: torch.Tensor, seed: int) -> None:
        count = min(_COMPARED, ids.numel())
        chosen = np.random.default_rng(seed).permutation(ids.numel())[:count]
        self._chosen = torch.from_numpy(np.sort(chosen))
        self._last: list[torch.Tensor] = []
        self._grams: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor) -> None:
        self._last.append(functional.normalize(hidden[:, -1].double().cpu(), dim=-1))
        few = hidden.flatten(0, 1)[self._chosen.to(hidden.device)].double().cpu()
        gram = few @ few.T
        self._grams.append(gram.fill_diagonal_(0.0))

    def angular(self) -> NDArray[np.float64]:
        vectors = torch.stack(self._last)  # [L + 1, sequences, hidden]
        cosines = torch.einsum("isc,jsc->ijs", vectors, vectors).clamp(-1.0, 1.0)
        return (torch.arccos(cosines).mean(-1) / pi).fill_diagonal_(0.0).numpy()

    def similarity(self) -> NDArray[np.float64]:
        """Return CKA with the unbiased estimator of HSIC (Song et al. 2012); grams have a diagonal of zeros."""
        n = len(self._chosen)
        if n < 4:
            return np.eye(len(self._grams))
        grams = torch.stack(self._grams)
        rows = grams.sum(-1)
        total = rows.sum(-1)
        products = torch.stack([(grams * gram).sum((-2, -1)) for gram in self._grams])
        hsic = products + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
        # Hidden states that are all alike have none, but for rounding: they are like nothing but themselves.
        own = hsic.diagonal()
        varied = own > _ROUNDING * grams.square().sum((-2, -1))
        scale = torch.where(varied, own, torch.inf).sqrt()
        return (hsic / (scale[:, None] * scale)).clamp(-1.0, 1.0).fill_diagonal_(1.0).numpy()
