"""From arrays to the numbers that are looked at: per layer, per head, per group, by threshold, length and domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.analysis.collapse import CollapseSettings, HeadCounts
from scionlm.analysis.ranking import is_lazy_group, layers_before_lazy_group, lazy_layers
from scionlm.core.records import Record

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Collapse:
    """Ranks and masses of all heads, and the questions that are asked of them.

    Attributes:
        counts: Arrays with the layers in front.
        settings: What was counted.
        tolerance: A layer is lazy below a MaxRank of 1 and this.
    """

    counts: HeadCounts
    settings: CollapseSettings
    tolerance: float

    def ranks(self, tau: float | None = None, seq_len: int | None = None) -> NDArray[np.int32]:
        """Return k*, `[layers, heads, sequences]`."""
        settings = self.settings
        length = settings.all_lengths.index(seq_len or settings.seq_len)
        return self.counts.ranks[:, length, settings.all_taus.index(settings.tau if tau is None else tau)]

    def masses(self, eta: float | None = None, seq_len: int | None = None) -> NDArray[np.int32]:
        """Return m*, `[layers, heads, sequences]`."""
        settings = self.settings
        length = settings.all_lengths.index(seq_len or settings.seq_len)
        return self.counts.masses[:, length, settings.all_etas.index(settings.eta if eta is None else eta)]

    def layers(self) -> list[Record]:
        """Return what is said of each layer; standard deviations are over sequences."""
        ranks, masses = self.ranks(), self.masses()
        rank, lazy = max_rank(ranks), set(lazy_layers(max_rank(ranks), self.tolerance))
        highest = ranks.mean(-1).argmax(-1)
        return [
            {
                "index": index,
                "max_rank": float(rank[index]),
                "max_rank_head": int(head),
                "max_rank_std": float(ranks[index, head].std()),
                "mean_rank": float(ranks[index].mean()),
                "mean_mass": float(masses[index].mean()),
                "mean_mass_std": float(masses[index].mean(0).std()),
                "lazy": index in lazy,
                "rank1_head_ratio": float((ranks[index].mean(-1) < 1.0 + self.tolerance).mean()),
                "sink_mass": float(self.counts.sink_mass[index].mean()),
                "sink_attention": float(self.counts.sink_attention[index].mean()),
                "sink_at_first_token": float((self.counts.sink[index] == 0).mean()),
                "entropy": float(self.counts.entropy[index].mean()),
            }
            for index, head in enumerate(highest)
        ]

    def heads(self) -> list[Record]:
        """Return what is said of each head of each layer."""
        ranks, masses, counts = self.ranks(), self.masses(), self.counts
        return [
            {
                "layer": layer,
                "head": head,
                "rank": float(ranks[layer, head].mean()),
                "rank_std": float(ranks[layer, head].std()),
                "mass": float(masses[layer, head].mean()),
                "sink_position": int(np.bincount(counts.sink[layer, head]).argmax()),
                "sink_mass": float(counts.sink_mass[layer, head].mean()),
                "sink_attention": float(counts.sink_attention[layer, head].mean()),
                "entropy": float(counts.entropy[layer, head].mean()),
            }
            for layer in range(ranks.shape[0])
            for head in range(ranks.shape[1])
        ]

    def groups(self) -> list[Record]:
        """Return AvgRank, the mean of MaxRank, and AvgMass of each half of the layers."""
        ranks, masses = max_rank(self.ranks()), self.masses().mean((1, 2))
        half = len(ranks) // 2
        parts = {"first half": slice(0, half), "second half": slice(half, len(ranks))} if half else {}
        return [
            {
                "name": name,
                "first": part.start,
                "last": part.stop - 1,
                "avg_rank": float(ranks[part].mean()),
                "avg_mass": float(masses[part].mean()),
                "lazy": is_lazy_group(ranks[part]),
            }
            for name, part in parts.items()
        ]

    def sweeps(self) -> Record:
        """Return ranks and masses by threshold, and both by sequence length."""
        taus = [
            {"tau": tau, "max_rank": max_rank(self.ranks(tau)).tolist(), **self._lazy(self.ranks(tau))}
            for tau in self.settings.all_taus
        ]
        etas = [{"eta": eta, "mean_mass": self.masses(eta).mean((1, 2)).tolist()} for eta in self.settings.all_etas]
        lengths = [
            {"seq_len": n, **self._of(self.ranks(seq_len=n), self.masses(seq_len=n))} for n in self.settings.all_lengths
        ]
        return {"taus": taus, "etas": etas, "lengths": lengths}

    def domains(self, names: Sequence[str]) -> list[Record]:
        """Return ranks and masses by domain; `names` are those of the sequences."""
        found: list[Record] = []
        for name in dict.fromkeys(names):
            of = np.array([each == name for each in names])
            found.append(
                {
                    "name": name,
                    "num_sequences": int(of.sum()),
                    **self._of(self.ranks()[..., of], self.masses()[..., of]),
                }
            )
        return found

    def _of(self, ranks: NDArray[np.int32], masses: NDArray[np.int32]) -> Record:
        return {
            "max_rank": max_rank(ranks).tolist(),
            "mean_mass": masses.mean((1, 2)).tolist(),
            **self._lazy(ranks),
        }

    def _lazy(self, ranks: NDArray[np.int32]) -> Record:
        return {
            "lazy_layers": lazy_layers(max_rank(ranks), self.tolerance),
            "rank1_head_ratio": float((ranks.mean(-1) < 1.0 + self.tolerance).mean()),
            "mean_rank": float(ranks.mean()),
        }

    def overall(self) -> Record:
        """Return what is said of the whole model."""
        settings = self.settings
        length = settings.all_lengths.index(settings.seq_len)
        tau, eta = settings.all_taus.index(settings.tau), settings.all_etas.index(settings.eta)
        ranks = self.ranks()
        before = layers_before_lazy_group(max_rank(ranks))
        return {
            **self._lazy(ranks),
            "lazy_group_from": before if before < len(ranks) else None,
            "num_heads": int(ranks.shape[0] * ranks.shape[1]),
            "sink_at_first_token": float((self.counts.sink == 0).mean()),
            "sink_mass": float(self.counts.sink_mass.mean()),
            "num_matrices": int(ranks.size),
            "rank_ties": int(self.counts.rank_ties[:, length, tau].sum()),
            "mass_ties": int(self.counts.mass_ties[:, length, eta].sum()),
        }


def max_rank(ranks: NDArray[np.int32]) -> Vector:
    """Return MaxRank of each layer: the largest over heads of the mean over sequences of k*."""
    return ranks.mean(-1).max(-1)


def layer_scores(layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Vector]:
    """Return the criteria that were measured, a number a layer."""
    return {name: np.array([layer[name] for layer in layers]) for name in names if name in layers[0]}
