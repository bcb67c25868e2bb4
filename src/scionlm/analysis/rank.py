"""How many singular directions, and how many columns, hold most of an attention matrix.

    k*(tau) = min{k : sum of the k largest sigma_i^2 >= tau * sum of all sigma_i^2}      approximate rank
    m*(eta) = min{m : sum of the m largest column masses >= eta}                         minimal column mass

A column's mass is its share of the squared Frobenius norm. Both are at least 1 and at most the number of columns, and
depend on the sequence length: the number is worth nothing without it.

Source: Sanyal et al. 2024 (Inheritune), section 2 and definition G.1, arXiv:2404.08634.
Differs: A sum that misses its threshold by no more than `TIE` reaches it; in float arithmetic the identity would miss.
    Columns are sorted by mass; the paper's formula adds them in order, but calls the result minimal.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from scionlm.core.errors import BrokenModelError, UsageError

TIE = 1e-6
"""A cumulative share this close to its threshold is a tie: it counts as reached, and is reported."""

# Ritz values beyond this many are rarely worth their cost: a matrix that needs more goes to the full decomposition.
_BLOCK = 16
# What is worked on at a time, in matrix elements, so that a matrix and its products stay in the cache.
_CHUNK_ELEMENTS = 2**19


@dataclass(frozen=True)
class Counts:
    """Counts for each of M matrices and each threshold.

    Attributes:
        values: `[M, thresholds]`, int64; 0 for a matrix of zeros.
        ties: `[M, thresholds]`, bool: whether a cumulative share lies within `TIE` of the threshold.
    """

    values: torch.Tensor
    ties: torch.Tensor


def check_thresholds(thresholds: Sequence[float], name: str) -> None:
    """Refuse thresholds that are no shares.

    Raises:
        UsageError: There are none, or one is not in (0, 1].
    """
    wrong = [value for value in thresholds if not 0 < value <= 1]
    if wrong or not thresholds:
        raise UsageError(f"{name} {wrong[0] if wrong else 'none'}: a share of the energy lies above 0 and is at most 1")


def ranks_and_masses(
    matrices: torch.Tensor, taus: Sequence[float], etas: Sequence[float], *, exact: bool = False
) -> tuple[Counts, Counts]:
    """Return k*(tau) and m*(eta) of each matrix, the same integers as in float64 throughout.

    Cheap bounds come first: the Ritz values of a small random subspace bound the sum of the k largest squared singular
    values from below (Ky Fan), and what they leave of the Gram matrix's norms bounds it from above (`_ritz_bounds`).
    Where these do not settle a count, the eigenvalues of the Gram matrix do, in float32 where they lie farther from
    every threshold than their rounding error, else in float64. Column masses are the Gram matrix's diagonal.

    Args:
        matrices: `[M, rows, columns]`, float32 or float64.
        taus: Thresholds of k* in (0, 1]; 1 gives the numerical rank.
        etas: Thresholds of m* in (0, 1].
        exact: Take the singular values in float64 instead, one matrix after another.

    Raises:
        UsageError: A threshold is no share.
        BrokenModelError: A matrix holds NaN or infinity.
    """
    check_thresholds(taus, "tau")
    check_thresholds(etas, "eta")
    size = max(1, _CHUNK_ELEMENTS // max(1, matrices.shape[-2] * matrices.shape[-1]))
    work = partial(_exact if exact or 1.0 in taus else _certified, taus=tuple(taus), etas=tuple(etas))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # bounds on rounding are those of float32, not of TF32 or bfloat16
    try:
        ranks, masses = zip(*_in_threads(work, matrices.split(size)), strict=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    return _together(ranks), _together(masses)


def _together(parts: Sequence[Counts]) -> Counts:
    return Counts(torch.cat([part.values for part in parts]), torch.cat([part.ties for part in parts]))


_Both = tuple[Counts, Counts]


def _in_threads(work: Callable[[torch.Tensor], _Both], chunks: Sequence[torch.Tensor]) -> list[_Both]:
    """Do the work in as many threads as torch would use: a small matrix is too little for more than one of them."""
    threads_before = torch.get_num_threads()
    threads = min(threads_before, len(chunks))
    if threads == 1 or chunks[0].device.type != "cpu":
        return [work(chunk) for chunk in chunks]

    @torch.no_grad()  # a setting of the thread
    def each(chunk: torch.Tensor) -> _Both:
        return work(chunk)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(each, chunks))
    finally:
        torch.set_num_threads(threads_before)  # what threads set is also what later threads begin with


def _exact(matrices: torch.Tensor, taus: Sequence[float], etas: Sequence[float]) -> _Both:
    matrices = matrices.double()
    masses = _count(_column_energies(matrices), etas)
    sigma = torch.linalg.svdvals(matrices)
    ranks = _count(sigma.square(), taus)
    # As torch.linalg.matrix_rank has it: what is left beyond is rounding.
    noise = sigma[:, :1] * max(matrices.shape[-2:]) * torch.finfo(sigma.dtype).eps
    for number, tau in enumerate(taus):
        if tau == 1.0:
            ranks.values[:, number] = (sigma > noise).sum(-1)
    return ranks, masses


def _certified(matrices: torch.Tensor, taus: Sequence[float], etas: Sequence[float]) -> _Both:
    # Counts are of shares: the scale is chosen so that squares of squares stay within float32.
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    matrices = matrices / torch.where(largest > 0, largest, 1.0)
    single = matrices.float()
    gram = single.mT @ single
    energies = gram.diagonal(dim1=-2, dim2=-1).clone()
    _require_finite(energies)
    error = _rounding(gram)

    shares = _shares(energies.sort(-1, descending=True).values)
    masses, rest = _settle(shares, shares, etas, error)
    if len(rest):
        _replace(masses, rest, _count(_column_energies(matrices[rest].double()), etas))

    ranks, rest = _settle(*_ritz_bounds(gram), taus, 2 * error)
    if len(rest) and (eigenvalues := _eigenvalues(gram[rest])) is not None:
        shares = _shares(eigenvalues)
        better, still = _settle(shares, shares, taus, error)
        _replace(ranks, rest, better)
        rest = rest[still]
    if len(rest):
        finest = matrices[rest].double()
        eigenvalues = _eigenvalues(finest.mT @ finest)
        eigenvalues = torch.linalg.svdvals(finest).square() if eigenvalues is None else eigenvalues
        _replace(ranks, rest, _count(eigenvalues, taus))
    return ranks, masses


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor | None:
    """Return eigenvalues, the largest first; None where LAPACK's iteration comes to no end.

    In float32 it does not for some matrices with many equal eigenvalues, which attention of a small model can have.
    """
    try:
        return torch.linalg.eigvalsh(gram).flip(-1)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None


def _column_energies(matrices: torch.Tensor) -> torch.Tensor:
    energies = matrices.square().sum(-2)
    _require_finite(energies)
    return energies.sort(-1, descending=True).values


def _require_finite(energies: torch.Tensor) -> None:
    if not bool(energies.isfinite().all()):
        raise BrokenModelError("an attention matrix holds numbers that are not finite: the model's weights are broken")


def _shares(energies: torch.Tensor) -> torch.Tensor:
    """Return cumulative shares of energies, `[M, n]`; of nothing, all are 0."""
    cumulative = energies.double().clamp_min(0).cumsum(-1)
    total = cumulative[:, -1:]
    return cumulative / torch.where(total > 0, total, 1.0)


def _thresholds(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _count(energies: torch.Tensor, thresholds: Sequence[float]) -> Counts:
    """Return how many of the energies, `[M, n]` in descending order, reach each threshold."""
    shares, wanted = _shares(energies)[:, None, :], _thresholds(thresholds, energies)
    reached = shares >= wanted - TIE
    values = (~reached).sum(-1) + 1
    ties = ((shares - wanted).abs() <= TIE).any(-1) & (wanted[:, 0] < 1)
    return Counts(torch.where(reached.any(-1), values, 0), ties)


def _replace(counts: Counts, rows: torch.Tensor, better: Counts) -> None:
    counts.values[rows], counts.ties[rows] = better.values, better.ties


def _rounding(gram: torch.Tensor) -> float:
    """Return what float32 may have cost a cumulative share of a Gram matrix's eigenvalues or diagonal.

    Rounding errors of n operations add up to the root of n units with high probability (Higham and Mary 2019); that
    eightfold is twenty times and more what real and random matrices of 100 and 1,024 columns show.
    """
    return 8 * gram.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps


def _ritz_bounds(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds on the share of the k largest eigenvalues, `[M, k]`.

    With Ritz values t_1 >= ... >= t_b of any subspace and eigenvalues l_1 >= l_2 >= ..., none negative: l_i >= t_i. So

        sum_{i<=k} l_i >= sum_{i<=k} t_i
        sum_{i<=k} l_i <= sum_{i<=k} t_i + (sum_i l_i - sum_{i<=b} t_i)
        sum_{i<=k} l_i <= sum_{i<=k} t_i + (sum_i l_i^2 - sum_{i<=b} t_i^2) / (2 t_k)

    the last because l_i^2 - t_i^2 >= 2 t_k (l_i - t_i). Trace and Frobenius norm give the sums over all eigenvalues.
    """
    size = gram.shape[-1]
    # The same subspace on every call, so that nothing depends on what ran before.
    start = torch.randn(size, min(_BLOCK, size), generator=torch.Generator().manual_seed(0)).to(gram.device)
    basis = torch.linalg.qr(gram @ (gram @ start))[0]
    ritz = _eigenvalues(basis.mT @ (gram @ basis))
    if ritz is None:
        nothing = gram.new_zeros(len(gram), 1, dtype=torch.float64)
        return nothing, nothing + 1
    ritz = ritz.double().clamp_min(0)
    tiny = torch.finfo(torch.float32).tiny
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64, keepdim=True).clamp_min(tiny)
    # Divided by a small t_k below, what rounding took from it would count for more than the margin allows.
    squares = gram.square().sum((-2, -1)).double()[:, None] * (1.0 + _rounding(gram))
    lower = ritz.cumsum(-1)
    by_trace = total - lower[:, -1:]
    by_norm = (squares - ritz.square().sum(-1, keepdim=True)).clamp_min(0) / (2 * ritz.clamp_min(tiny))
    return lower / total, (lower + torch.minimum(by_trace, by_norm)) / total


def _settle(
    lower: torch.Tensor, upper: torch.Tensor, thresholds: Sequence[float], error: float
) -> tuple[Counts, torch.Tensor]:
    """Return counts by bounds on the cumulative shares, `[M, k]`, and the rows in which these leave one open."""
    wanted = _thresholds(thresholds, lower)
    margin = error + 2 * TIE  # so far from a threshold there is no tie either
    reached = lower[:, None, :] >= wanted + margin
    below = (~reached).sum(-1)
    before = torch.nn.functional.pad(upper, (1, 0))[:, None, :].expand(-1, len(thresholds), -1)
    missed = before.gather(-1, below[..., None])[..., 0] < wanted[:, 0] - margin
    settled = (reached.any(-1) & missed).all(-1)
    return Counts(below + 1, torch.zeros_like(below, dtype=torch.bool)), (~settled).nonzero()[:, 0]
