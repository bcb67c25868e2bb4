"""Draws the page of a run: one self-contained HTML file, read from the run folder alone.

Nothing here knows a model or loads torch; the page holds no script and asks no address for anything.
"""

from pathlib import Path

from scionlm.core.errors import UsageError
from scionlm.core.files import write_text_atomic
from scionlm.report.collect import read_run
from scionlm.report.page import run_page

__all__ = ["render_report", "write_report"]


def render_report(run: Path) -> str:
    """Return the page of the run folder `run`, finished or not, as one HTML document.

    Raises:
        UsageError: `run` is not a run folder.
        DataError: A file in it is broken or of a newer format.
    """
    return run_page(read_run(run))


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run folder `run` to `out` (by default `run/report.html`) and return where it is.

    Raises:
        UsageError: `run` is not a run folder, or `out` is a folder.
        DataError: A file in the run folder is broken or of a newer format.
    """
    out = run / "report.html" if out is None else out
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the name of a file, such as {out / 'report.html'}")
    write_text_atomic(out, render_report(run))
    return out
