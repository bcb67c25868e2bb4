"""`scion fit-reference`: a table of losses by size in, reference losses for other sizes out."""

from pathlib import Path
from typing import Any

from scionlm.cli.tables import add_row, new_table, print_json, show_table
from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import is_safe_name
from scionlm.core.log import format_count, warn
from scionlm.core.records import read_json, write_json
from scionlm.data.mixing.loss_tables import load_table, parse_size
from scionlm.data.mixing.references import reference_document

_BOUNDS = {"positive": True, "none": False}


def fit_reference_command(table: Path, out: Path, parameters: list[str] | None, bounds: str, json: bool) -> None:
    """Fit the curves of TABLE and write what they say about the wanted sizes.

    Args:
        table: The losses, as `load_table` reads them.
        out: A .json file; only an earlier one of these may be there.
        parameters: More targets, `1.3B` or `NAME=1345423360`; a name that the table has takes the place of its own.
        bounds: `positive` or `none`, for E.
        json: Print the document itself.

    Raises:
        UsageError: A flag is wrong, OUT is in the way, there is no table, or nobody says which sizes are wanted.
        DataError: The table is broken or has no curve.
    """
    if bounds not in _BOUNDS:
        raise UsageError(f"bounds {bounds!r} is not one of {', '.join(_BOUNDS)}{nearest(bounds, list(_BOUNDS))}")
    given = dict(_target(text) for text in parameters or [])
    losses = load_table(table)
    targets = losses.targets | given
    if not targets:
        raise UsageError(
            f"no size is wanted; give --parameters 1.3B (or NAME=1345423360), or the key 'targets' in {table}"
        )
    _check_out(out, table)
    document = reference_document(losses, _BOUNDS[bounds], targets)
    write_json(out, document)
    for text, domains in _warnings(document).items():
        warn(f"{', '.join(domains) if len(domains) < len(document['fits']) else 'all domains'}: {text}")
    if json:
        print_json(document)
    else:
        _print_references(document, out)


def _target(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    name = name.strip()
    try:
        if not is_safe_name(name):
            raise ValueError(f"{name!r} is no name")
        return name, parse_size((size if equals else text).strip())
    except ValueError as error:
        raise UsageError(
            f"parameters {text!r} must be a size such as 1.3B, or NAME=1345423360 with a name of letters and digits"
        ) from error


def _check_out(out: Path, table: Path) -> None:
    if out.suffix.lower() != ".json":
        raise UsageError(f"out {out} must be a .json file")
    if not out.exists():
        return
    try:
        earlier = out.resolve() != table.resolve() and "references" in read_json(out)
    except DataError:
        earlier = False
    if not earlier:
        raise UsageError(f"out {out} is there and holds no reference losses; choose another file or remove it first")


def _warnings(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return each warning with the domains that it is about."""
    found: dict[str, list[str]] = {}
    for domain, curve in document["fits"].items():
        for text in curve["warnings"]:
            found.setdefault(text, []).append(domain)
    return found


def _print_references(document: dict[str, Any], out: Path) -> None:
    low, high = (f"{100 * share:.0f}" for share in document["interval"])
    bounded = "E >= 0" if document["bounds"] == "positive" else "E free"
    title = f"{out}: {document['equation']}, {bounded}; nats, {low} to {high} % for a standard error of "
    title += f"{document['standard_error']:.4g}"
    sizes = document["targets"].items()
    columns = [name if name == format_count(size) else f"{name} ({format_count(size)})" for name, size in sizes]
    table = new_table(title, "domain", "alpha", "E", *columns)
    for domain, curve in document["fits"].items():
        found = [values[domain] for values in document["references"].values()]
        cells = (f"{value['nll']:.4f} {value['low']:.3f}-{value['high']:.3f}" for value in found)
        add_row(table, domain, f"{curve['alpha']:.4f}", f"{curve['E']:.4f}", *cells)
    show_table(table)
