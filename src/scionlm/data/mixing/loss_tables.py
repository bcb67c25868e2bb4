"""Tables of losses by domain and size, as YAML, JSON or CSV: read and checked."""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scionlm.core.config import nearest
from scionlm.core.duration import parse_count
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import is_safe_name, storage_error

STANDARD_ERROR = 2.0**-8
"""Nats that a loss is taken to be uncertain by where the table does not say.

Half a step of bfloat16 between 1 and 2 nats: what a mean that was rounded so can be off by, however long the text was.
A table of losses on little text should bring its own, larger number.
"""

LEAST_SIZES = 3
"""A curve has as many parameters: A, alpha and E."""

_MAX_BYTES = 2**20
_MAX_PARAMETERS = 10**18
_MAX_NATS = 1000.0
_KEYS = ("losses", "targets", "standard_error")


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
    if len(curve) < LEAST_SIZES:
        remedy = "measure more, or take the source model's own losses as references"
        raise DataError(f"{where} has {len(curve)} sizes, a curve needs {LEAST_SIZES}; {remedy}")
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
