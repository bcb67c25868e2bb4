"""Set runs, sweeps and models side by side: one page, one table, one JSON document, read from their folders alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.core.files import write_text_atomic
from scionlm.core.records import FORMAT_VERSION, Record, write_json
from scionlm.report.compare_join import Comparison, join, to_record, usual_setup
from scionlm.report.compare_page import compare_page
from scionlm.report.compare_read import Setup, read_rows, run_folders
from scionlm.report.compare_table import to_markdown
from scionlm.report.compare_words import headline, text, verdict

PAGE, DOCUMENT, TABLE = "compare.html", "compare.json", "compare.md"


def compared(
    items: Sequence[Path], models: Sequence[Record] = (), scores: Mapping[str, Record] | None = None
) -> Comparison:
    """Return the comparison of runs, sweeps (which stand for all their runs) and models that were measured.

    Args:
        items: Folders of runs and sweeps.
        models: What was measured of models: name, model, domains, data, seq_len.
        scores: What was measured of them beside losses, by the name of their row: `tasks`, `items`, `suites`,
            `inference`. A run that has none here has those of its result.

    Raises:
        UsageError: There is nothing to compare.
        DataError: A file in a folder is broken or of a newer format.
    """
    rows = read_rows(run_folders(items), models)
    if not rows:
        raise UsageError("nothing to compare: name run folders, sweeps or models")
    given = scores or {}
    return join([replace(row, scores=_with(row.scores, given.get(row.name, {}))) for row in rows])


def _with(scores: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores with more of them: what was not asked now, a task or a whole record, stays as it is."""
    found = {**scores}
    for key in ("tasks", "items", "suites", "inference"):
        if more.get(key):
            found[key] = {**found.get(key, {}), **more[key]}
    return found


def scored_models(items: Sequence[Path], models: Sequence[tuple[str, Record]] = ()) -> dict[str, str]:
    """Return a MODEL for every row that has one, by the row's name: results of finished runs, their controls, models.

    Args:
        items: Folders of runs and sweeps.
        models: MODEL and what was measured of it, each.
    """
    rows = read_rows(run_folders(items), [record for _, record in models])
    folders = {"run": "model", "control": "control/model"}
    found = {
        row.name: str(row.folder / folders[row.kind])
        for row in rows
        if row.kind in folders and row.done and (row.folder / folders[row.kind]).is_dir()
    }
    plain = [row.name for row in rows if row.kind == "model"]
    return found | {name: model for name, (model, _) in zip(plain, models, strict=True)}


def write_comparison(
    items: Sequence[Path], out: Path, models: Sequence[Record] = (), scores: Mapping[str, Record] | None = None
) -> Record:
    """Write `compare.html`, `compare.json` and `compare.md` into the folder `out`; return what the JSON holds.

    Args:
        items: Folders of runs and sweeps.
        out: Where to write.
        models: See `compared`.
        scores: See `compared`.

    Raises:
        UsageError: There is nothing to compare.
        DataError: A file in a folder is broken or of a newer format.
        StorageError: `out` cannot be written.
    """
    comparison = compared(items, models, scores)
    summary = [text(sentence) for sentence in (headline(comparison), *verdict(comparison))]
    record = {"format_version": FORMAT_VERSION} | to_record(comparison) | {"summary": summary}
    write_text_atomic(out / PAGE, compare_page(comparison, out.resolve().name))
    write_text_atomic(out / TABLE, to_markdown(comparison))
    write_json(out / DOCUMENT, record)
    return record


def comparable_setup(items: Sequence[Path]) -> Setup:
    """Return how most of these runs were measured: what is measured in the same way compares with them."""
    return usual_setup(read_rows(run_folders(items)))
