"""Reference losses: what a model of some size would reach on each domain, read off the losses of larger ones.

A table of losses by size comes in, one curve is fitted to each domain alone, and its value at the wanted sizes comes
out with an interval. Rules that reweight domains steer towards these values.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.data.mixing.loss_tables import LEAST_SIZES, LossTable

EQUATION = "loss(N) = A / N**alpha + E"

INTERVAL = (0.05, 0.95)
"""Between which quantiles of the perturbed fits an interval reaches."""

_FAR = 10.0  # times beyond the sizes measured
_ROUNDING = 1e-12  # of a loss: no fall at all

_DRAWS = 1000
_SEED = 0
_ALPHAS = np.linspace(math.log(1e-4), math.log(10.0), 120)
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 72  # of golden section: after them the bracket is narrower than one rounding

Array = NDArray[np.float64]
Solution = tuple[Array, Array, Array, Array]
"""A at the smallest size, alpha, E and the squared error, one of each for each row of losses."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted curve `A / N**alpha + E`, in nats over parameters."""

    A: float
    alpha: float
    E: float
    bound_active: bool
    """Whether E is 0 because it would have been negative."""
    rms: float
    """Root of the mean square of what the curve misses, in nats."""
    warnings: tuple[str, ...] = ()

    def predict(self, parameters: float) -> float:
        """Return the loss in nats of a model with this many parameters."""
        return math.exp(math.log(self.A) - self.alpha * math.log(parameters)) + self.E


def fit(sizes: Sequence[int], losses: Sequence[float], bounded: bool = True) -> ScalingFit:
    """Fit `A / N**alpha + E` to losses by least squares, with A and alpha above 0.

    For a given alpha, A and E are linear; so what is searched is one number, over a grid that no second minimum hides
    behind, and then by golden section.

    Source: Hoffmann et al. 2022 (2203.15556), section 3.3; Xia et al. 2024 (2310.06694), section 2.2, where the term
    in the number of tokens becomes a part of E, as all sizes saw the same.
    Differs: with `bounded` E is at least 0, which no loss can fall below; the paper leaves it free (`bounded=False`).

    Args:
        sizes: Numbers of parameters, at least three and distinct.
        losses: Nats, one for each size.
        bounded: Keep E at 0 where it would be negative.

    Raises:
        DataError: The losses do not fall with the size, so that no such curve is theirs.
    """
    assert len(losses) == len(set(sizes)) >= LEAST_SIZES, sizes
    found, below = _least_squares(_log_sizes(sizes, sizes), np.asarray([losses], dtype=np.float64), bounded)
    scale, alpha, floor, error = (float(value[0]) for value in found)
    if scale <= _ROUNDING * max(losses):
        raise DataError("the losses do not fall as the sizes grow; check which loss belongs to which size")
    active = bounded and bool(below[0])
    rms = math.sqrt(error / len(sizes))
    doubts = _doubts(alpha, bool(below[0]), active, len(sizes))
    return ScalingFit(scale * min(sizes) ** alpha, alpha, floor, active, rms, tuple(doubts))


def _doubts(alpha: float, negative: bool, active: bool, num_sizes: int) -> list[str]:
    """Return in words what keeps a fit from being trusted, wherever it is read."""
    doubts: list[str] = []
    if active:
        doubts.append("degenerate: E would be negative and is held at 0, which leaves a pure power law")
    elif negative:
        doubts.append("degenerate: E is negative, which no loss can reach; the curve holds near the sizes alone")
    if math.log(alpha) < _ALPHAS[1]:
        doubts.append("degenerate: alpha is at the lower end of its range; the losses do not bend towards any floor")
    if math.log(alpha) > _ALPHAS[-2]:
        doubts.append("degenerate: alpha is at the upper end of its range; past the smallest size the losses are flat")
    if num_sizes <= LEAST_SIZES - active:
        doubts.append("exactly determined: as many sizes as parameters of the curve, so no residual to judge it by")
    return doubts


def intervals(
    sizes: Sequence[int], losses: Sequence[float], targets: Sequence[int], standard_error: float, bounded: bool = True
) -> Array:
    """Return the interval of each prediction, `[targets, 2]` in nats: quantiles over fits to perturbed losses.

    Each loss is perturbed by itself, normally with `standard_error`; the draws are the same at every call.
    """
    noise = np.random.default_rng(_SEED).standard_normal((_DRAWS, len(sizes)))
    perturbed = np.asarray(losses) + standard_error * noise
    (scale, alpha, floor, _), _ = _least_squares(_log_sizes(sizes, sizes), perturbed, bounded)
    values = scale * np.exp(-alpha * _log_sizes(targets, sizes)[:, None]) + floor
    return np.quantile(values, INTERVAL, axis=1).T


def _log_sizes(of: Sequence[int], sizes: Sequence[int]) -> Array:
    """Return the logarithms of sizes over the smallest one measured: numbers that no power of which overflows."""
    return np.log(np.asarray(of, dtype=np.float64) / min(sizes))


def _least_squares(x: Array, losses: Array, bounded: bool) -> tuple[Solution, NDArray[np.bool_]]:
    """Return the best curve for each row of losses, and whether its E is negative when it is free."""
    free = _search(x, losses, with_floor=True)
    negative = free[2] < 0
    if not bounded:
        return free, negative
    scale, alpha, floor, error = (
        np.where(negative, held, own) for held, own in zip(_search(x, losses, with_floor=False), free, strict=True)
    )
    return (scale, alpha, floor, error), negative


def _search(x: Array, losses: Array, with_floor: bool) -> Solution:
    """Return the best curve for each row of `losses`, `[rows, sizes]`, with E free or 0."""

    def errors(log_alpha: Array) -> Array:
        return _linear(np.exp(log_alpha), x, losses, with_floor)[2]

    best = np.stack([errors(_ALPHAS[i : i + 1]) for i in range(len(_ALPHAS))]).argmin(axis=0)
    low, high = _ALPHAS[np.maximum(best - 1, 0)], _ALPHAS[np.minimum(best + 1, len(_ALPHAS) - 1)]
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        falls = errors(left) > errors(right)
        low, high = np.where(falls, left, low), np.where(falls, high, right)
    alpha = np.exp((low + high) / 2)
    scale, floor, error = _linear(alpha, x, losses, with_floor)
    return scale, alpha, floor, error


def _linear(alpha: Array, x: Array, losses: Array, with_floor: bool) -> tuple[Array, Array, Array]:
    """Return the A (at least 0), the E and the squared error that are best for each row at its own, or one, alpha."""
    basis = np.expm1(-alpha[:, None] * x)  # a power less 1, exact where alpha is so small that powers are all near 1
    middle, mean = -np.ones((1, 1)), np.zeros((1, 1))
    if with_floor:
        middle, mean = basis.mean(axis=1, keepdims=True), losses.mean(axis=1, keepdims=True)
    across, down = basis - middle, losses - mean
    spread = (across**2).sum(axis=1)
    # Sizes that differ by one parameter can have one logarithm.
    scale = np.maximum((across * down).sum(axis=1) / np.where(spread > 0, spread, np.inf), 0)
    floor = mean[:, 0] - scale * (middle[:, 0] + 1)
    return scale, floor, ((down - scale[:, None] * across) ** 2).sum(axis=1)


def reference_document(table: LossTable, bounded: bool, targets: dict[str, int]) -> dict[str, Any]:
    """Return the references of every domain at every target, with the fits that they come from, for a JSON file.

    Raises:
        DataError: The losses of a domain do not fall with the size.
    """
    references: dict[str, dict[str, Any]] = {name: {} for name in targets}
    fits: dict[str, Any] = {}
    for domain, curve in table.losses.items():
        sizes, losses = list(curve), list(curve.values())
        try:
            found = fit(sizes, losses, bounded)
        except DataError as error:
            raise DataError(f"{table.source}: losses.{domain}: {error}") from error
        ends = intervals(sizes, losses, list(targets.values()), table.standard_error, bounded)
        for (name, size), (low, high) in zip(targets.items(), ends.tolist(), strict=True):
            nll = found.predict(size)
            # Rounding, or a noise that the fit turns lopsided, may put the estimate outside the quantiles of the draws.
            references[name][domain] = {"nll": nll, "low": min(low, nll), "high": max(high, nll)}
        fits[domain] = asdict(found) | {"warnings": [*found.warnings, *_distances(sizes, targets)]}
    return {
        "equation": EQUATION,
        "bounds": "positive" if bounded else "none",
        "standard_error": table.standard_error,
        "interval": list(INTERVAL),
        "targets": dict(targets),
        "sizes": {domain: list(curve) for domain, curve in table.losses.items()},
        "references": references,
        "fits": fits,
    }


def _distances(sizes: Sequence[int], targets: dict[str, int]) -> list[str]:
    """Return in words which targets lie far outside the sizes."""
    far: list[str] = []
    for name, target in targets.items():
        below, above = min(sizes) / target, target / max(sizes)
        if max(below, above) > _FAR:
            where = "smaller than the smallest" if below > above else "larger than the largest"
            far.append(f"extrapolation: {name} is {max(below, above):.0f} times {where} size of the table")
    return far
