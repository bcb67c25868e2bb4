"""Reference losses: what a model of some size would reach on each domain, read off the losses of larger ones.

A table of losses by size comes in, one curve is fitted to each domain alone, and its value at the wanted sizes comes
out with an interval. Rules that reweight domains steer towards these values.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from scionlm.core.config import nearest
from scionlm.core.duration import parse_count
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import is_safe_name, storage_error

EQUATION = "loss(N) = A / N**alpha + E"

STANDARD_ERROR = 2.0**-8
"""Nats that a loss is taken to be uncertain by where the table does not say.

Half a step of bfloat16 between 1 and 2 nats: what a mean that was rounded so can be off by, however long the text was.
A table of losses on little text should bring its own, larger number.
"""

INTERVAL = (0.05, 0.95)
"""Between which quantiles of the perturbed fits an interval reaches."""

_FREE = 3  # A, alpha and E
_FAR = 10.0  # times beyond the sizes measured
_MAX_BYTES = 2**20
_MAX_PARAMETERS = 10**18
_MAX_NATS = 1000.0
_ROUNDING = 1e-12  # of a loss: no fall at all
_KEYS = ("losses", "targets", "standard_error")

_DRAWS = 1000
_SEED = 0
_ALPHAS = np.linspace(math.log(1e-4), math.log(10.0), 120)
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 72  # of golden section: after them the bracket is narrower than one rounding

Array = NDArray[np.float64]
Solution = tuple[Array, Array, Array, Array]
"""A at the smallest size, alpha, E and the squared error, one of each for each row of losses."""


@dataclass(frozen=True)
class LossTable:
    """Losses of models of several sizes, all trained on the same data."""

    source: str
    """Where it was read, for messages."""
    losses: dict[str, dict[int, float]]
    """Each domain to its curve: number of parameters, rising, to nats."""
    targets: dict[str, int]
    """Name of each wanted size to its number of parameters."""
    standard_error: float
    """Of one loss, in nats."""


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


class _Entries(list[tuple[str, Any]]):
    """A mapping as it was written: numbers still text, and keys that stand twice still there."""


def load_table(path: Path) -> LossTable:
    """Read TABLE: YAML or JSON with `losses`, `targets` and `standard_error`, or CSV with a row for each size.

    Sizes are whole numbers of parameters or written as `6.7B`. In CSV the first column is `parameters`, each other
    column is a domain, and an empty cell is a size that was not measured there.

    Raises:
        UsageError: There is no such file, or its name has none of the endings.
        DataError: It is broken, a key is unknown, a number is not one, or a domain has too few sizes for a curve.
    """
    read = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".csv": _read_csv}.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"{path}: a table of losses is a file that ends in .yaml, .json or .csv")
    table = _mapping(read(_text(path), path), str(path), "the key 'losses' to the losses")
    for key in table:
        if key not in _KEYS:
            hint = nearest(key, _KEYS) or f"; known here: {', '.join(_KEYS)}"
            raise DataError(f"{path}: unknown key {key!r}{hint}")
    losses = _named(table.get("losses"), f"{path}: losses", "domains to their losses")
    targets = _named(table.get("targets", _Entries()), f"{path}: targets", "names to numbers of parameters")
    if not losses:
        raise DataError(f"{path}: losses has no domain; give one at least")
    spread = table.get("standard_error", str(STANDARD_ERROR))
    standard_error = _number(spread)
    if not 0 <= standard_error < _MAX_NATS:
        raise DataError(f"{path}: standard_error {_shown(spread)} is not a number of nats such as {STANDARD_ERROR}")
    return LossTable(
        source=str(path),
        losses={domain: _curve(curve, f"{path}: losses.{domain}") for domain, curve in losses.items()},
        targets={name: _size(size, f"{path}: targets.{name}") for name, size in targets.items()},
        standard_error=standard_error,
    )


def parse_size(text: str) -> int:
    """Return a number of parameters written as `1345423360` or `1.3B`.

    Raises:
        ValueError: It is not one.
    """
    size = parse_count(text)
    if not 0 < size < _MAX_PARAMETERS:
        raise ValueError(f"{text!r} is not the number of parameters of a model")
    return size


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} has more than {_MAX_BYTES} bytes: not a table of losses")
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark before their CSV
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give the file with the losses") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise storage_error(error, path) from error


def _read_yaml(text: str, path: Path) -> Any:
    # The nodes and not their values: core.config takes no number as a key, and a loader forgets what stands twice.
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise yaml.YAMLError("aliases are not supported")
        return _of_node(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _of_node(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        words = ((key.value if isinstance(key, yaml.ScalarNode) else "[...]", value) for key, value in node.value)
        return _Entries((key, _of_node(value)) for key, value in words)
    if isinstance(node, yaml.SequenceNode):
        return [_of_node(item) for item in node.value]
    return node.value if node else None


def _read_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Entries, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _read_csv(text: str, path: Path) -> _Entries:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error
    header = rows[0][1] if rows else [""]
    if header[0] != "parameters":
        remedy = "it must be 'parameters', and a column for each domain follows, with commas between"
        raise DataError(f"{path}: the first column is {_shown(header[0])}; {remedy}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line} has {len(row)} cells where the header has {len(header)} columns")
    columns = [
        (domain, _Entries((row[0], row[column]) for _, row in rows[1:] if row[column]))
        for column, domain in enumerate(header[1:], start=1)
    ]
    return _Entries([("losses", _Entries(columns))])


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, _Entries):
        raise DataError(f"{where} {'is required and ' if value is None else ''}must map {what}")
    found = dict(value)
    if len(found) < len(value):
        keys = [key for key, _ in value]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{where}: key {twice!r} stands twice; keep one of them")
    return found


def _named(value: Any, where: str, what: str) -> dict[str, Any]:
    found = _mapping(value, where, what)
    for name in found:
        if not is_safe_name(name):
            raise DataError(f"{where}: name {name!r} must be letters, digits, '.', '_', '-'")
    return found


def _curve(value: Any, where: str) -> dict[int, float]:
    curve: dict[int, float] = {}
    for text, loss in _mapping(value, where, "numbers of parameters to losses in nats").items():
        size = _size(text, where)
        if size in curve:  # written in two ways
            raise DataError(f"{where}: size {text!r} ({size:,} parameters) stands twice; keep one of them")
        curve[size] = _number(loss)
        if not 0 < curve[size] < _MAX_NATS:
            raise DataError(f"{where}.{text}: {_shown(loss)} is not a loss; give nats, a finite number above 0")
    if len(curve) < _FREE:
        remedy = "measure more, or take the source model's own losses as references"
        raise DataError(f"{where} has {len(curve)} sizes, a curve needs {_FREE}; {remedy}")
    return dict(sorted(curve.items()))


def _size(text: Any, where: str) -> int:
    try:
        return parse_size(text if isinstance(text, str) else "")
    except ValueError as error:
        raise DataError(f"{where}: size {_shown(text)} is not one such as 6738415616 or 6.7B (parameters)") from error


def _number(value: Any) -> float:
    """Return the number that a text holds, NaN when it holds none."""
    try:
        return float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return math.nan


def _shown(value: Any) -> str:
    if isinstance(value, _Entries):
        return "a mapping"
    return repr(value[:40]) if isinstance(value, str) else json.dumps(value)[:40]


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
    assert len(losses) == len(set(sizes)) >= _FREE, sizes
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
    if num_sizes <= _FREE - active:
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
