"""Whether attention has collapsed: rank, column mass, sinks and entropy of every head of a layer.

Source: Sanyal et al. 2024 (Inheritune), section 2, arXiv:2404.08634.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from scionlm.analysis.attention import Attention
from scionlm.analysis.rank import check_thresholds, ranks_and_masses
from scionlm.core.errors import UsageError

Array = NDArray[np.generic]

# Attention matrices in memory at a time, in elements: those of one head on one sequence at least.
_ELEMENTS = 2**24
# Pictures of attention are of so many tokens, as in the paper; longer ones are not looked at.
MAP_TOKENS = 40


@dataclass(frozen=True)
class CollapseSettings:
    """What is counted.

    Attributes:
        seq_len: Tokens of each sequence.
        tau: Share of the energy that defines the rank.
        eta: Share of the mass that defines the minimal column mass.
        taus: Further shares for the rank.
        etas: Further shares for the mass.
        lengths: Lengths of the first part of each sequence to count for too; attention is causal, so these are what
            the model computes on the shorter text.
        exact: Take singular values in float64.
    """

    seq_len: int
    tau: float = 0.90
    eta: float = 0.90
    taus: tuple[float, ...] = (0.80, 0.85, 0.90, 0.95)
    etas: tuple[float, ...] = (0.80, 0.85, 0.90, 0.95)
    lengths: tuple[int, ...] = field(default=())
    exact: bool = False

    def __post_init__(self) -> None:
        check_thresholds((self.tau, *self.taus), "tau")
        check_thresholds((self.eta, *self.etas), "eta")
        wrong = [length for length in self.lengths if not 2 <= length <= self.seq_len]
        if wrong:
            raise UsageError(f"lengths: {wrong[0]} is not between 2 and seq_len {self.seq_len}")

    @property
    def all_taus(self) -> tuple[float, ...]:
        """Every tau, ascending."""
        return tuple(sorted({self.tau, *self.taus}))

    @property
    def all_etas(self) -> tuple[float, ...]:
        """Every eta, ascending."""
        return tuple(sorted({self.eta, *self.etas}))

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """Every length, ascending; the whole sequence last."""
        return tuple(sorted({self.seq_len, *self.lengths}))


@dataclass
class HeadCounts:
    """What was found of the heads of one layer, or of all layers with one axis more in front.

    Attributes:
        ranks: k*, `[lengths, taus, heads, sequences]`.
        masses: m*, `[lengths, etas, heads, sequences]`.
        rank_ties: At how many of these a cumulative share was within rounding of tau, `[lengths, taus]`.
        mass_ties: The same of eta, `[lengths, etas]`.
        entropy: Of a row, in nats, mean over rows, `[heads, sequences]`.
        sink: Column of the largest mass, `[heads, sequences]`.
        sink_mass: That column's share of the mass, `[heads, sequences]`.
        sink_attention: What the rows from that column on pay to it, mean, `[heads, sequences]`.
        maps: Attention among the first tokens, mean over sequences, `[heads, tokens, tokens]`.
    """

    ranks: NDArray[np.int32]
    masses: NDArray[np.int32]
    rank_ties: NDArray[np.int32]
    mass_ties: NDArray[np.int32]
    entropy: NDArray[np.float32]
    sink: NDArray[np.int32]
    sink_mass: NDArray[np.float32]
    sink_attention: NDArray[np.float32]
    maps: NDArray[np.float32]

    @classmethod
    def empty(cls, settings: CollapseSettings, heads: int, sequences: int) -> "HeadCounts":
        """Return one of zeros."""
        lengths, tokens = len(settings.all_lengths), min(MAP_TOKENS, settings.seq_len)
        taus, etas = len(settings.all_taus), len(settings.all_etas)
        each = (heads, sequences)
        return cls(
            ranks=np.zeros((lengths, taus, *each), np.int32),
            masses=np.zeros((lengths, etas, *each), np.int32),
            rank_ties=np.zeros((lengths, taus), np.int32),
            mass_ties=np.zeros((lengths, etas), np.int32),
            entropy=np.zeros(each, np.float32),
            sink=np.zeros(each, np.int32),
            sink_mass=np.zeros(each, np.float32),
            sink_attention=np.zeros(each, np.float32),
            maps=np.zeros((heads, tokens, tokens), np.float32),
        )

    @classmethod
    def stacked(cls, layers: Sequence["HeadCounts"]) -> "HeadCounts":
        """Return those of several layers as one."""
        return cls(**{name: np.stack([getattr(layer, name) for layer in layers]) for name in cls.names()})

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the arrays."""
        return [each.name for each in fields(cls)]


class LayerCollapse:
    """Collects what is found of one layer, batch by batch.

    Args:
        settings: What is counted.
        num_heads: Query heads of the layer.
        num_sequences: Sequences in all.
    """

    def __init__(self, settings: CollapseSettings, num_heads: int, num_sequences: int) -> None:
        self.settings = settings
        self.first = 0
        """Number of the first sequence of the batch that is shown next."""
        self.counts = HeadCounts.empty(settings, num_heads, num_sequences)
        self._num_sequences = num_sequences

    def see(self, attention: Attention) -> None:
        """Take in the attention on one batch."""
        for sequence, heads, matrices in _pieces(attention):
            self._add(matrices, sequence, heads)

    def _add(self, matrices: torch.Tensor, sequences: slice, heads: slice) -> None:
        """Take in the attention of some heads on some sequences, `[sequences, heads, T, T]`."""
        at = np.s_[heads, self.first + sequences.start : self.first + sequences.stop]
        counts, settings = self.counts, self.settings

        def place(values: torch.Tensor) -> Array:
            return values.transpose(0, 1).cpu().numpy()

        for number, length in enumerate(settings.all_lengths):
            part = matrices[..., :length, :length].flatten(0, 1)
            found = ranks_and_masses(part, settings.all_taus, settings.all_etas, exact=settings.exact)
            for count, values, ties in zip(
                found, (counts.ranks, counts.masses), (counts.rank_ties, counts.mass_ties), strict=True
            ):
                for threshold in range(count.values.shape[1]):
                    values[(number, threshold, *at)] = place(count.values[:, threshold].view(matrices.shape[:2]))
                ties[number] += count.ties.sum(0).cpu().numpy().astype(np.int32)
        energies = matrices.square().sum(-2)
        largest = energies.max(-1)
        column = torch.take_along_dim(matrices, largest.indices[..., None, None], -1)[..., 0]
        rows = matrices.shape[-1] - largest.indices  # in a causal model none before the column sees it
        counts.sink[at] = place(largest.indices)
        counts.sink_mass[at] = place(largest.values / energies.sum(-1))
        counts.sink_attention[at] = place(column.sum(-1) / rows)
        counts.entropy[at] = place(torch.special.entr(matrices).sum(-1).mean(-1))
        tokens = counts.maps.shape[-1]
        shown = matrices[..., :tokens, :tokens].sum(0, dtype=torch.float64).cpu().numpy()
        counts.maps[heads] += (shown / self._num_sequences).astype(np.float32)


def _pieces(attention: Attention) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield (sequences, heads, `[sequences, heads, T, T]`), as much at a time as fits."""
    batch, heads, length = attention.query.shape[:3]
    at_once = max(1, _ELEMENTS // length**2)
    if at_once >= heads:
        size = at_once // heads
        for start in range(0, batch, size):
            rows = range(start, min(start + size, batch))
            found = torch.stack([attention.matrices(row, slice(0, heads)) for row in rows])
            yield slice(rows.start, rows.stop), slice(0, heads), found
    else:
        for row in range(batch):
            for start in range(0, heads, at_once):
                part = slice(start, min(start + at_once, heads))
                yield slice(row, row + 1), part, attention.matrices(row, part)[None]
