"""Draws the page of a run: one self-contained HTML file, read from the run folder alone.

Nothing here knows a model or loads torch; the page holds no script and asks no address for anything.
"""

from pathlib import Path

from scionlm.core.errors import UsageError
from scionlm.core.files import write_text_atomic
from scionlm.report.collect import read_run
from scionlm.report.compare import PAGE, comparable_setup, compared, scored_models, write_comparison
from scionlm.report.compare_page import compare_page
from scionlm.report.compare_read import is_run, is_sweep
from scionlm.report.compare_table import to_markdown
from scionlm.report.markdown import run_markdown
from scionlm.report.page import run_page

__all__ = ["comparable_setup", "is_run", "render_report", "scored_models", "write_comparison", "write_report"]

_HEAD = 200
"""Characters of a page that are the same in all of them: its policy stands there."""


def render_report(run: Path, markdown: bool = False) -> str:
    """Return the page of the folder `run` of a run, finished or not, or of a sweep, as one HTML document.

    Args:
        run: The folder.
        markdown: Return the sentences and the main table as Markdown instead.

    Raises:
        UsageError: `run` is not a run folder.
        DataError: A file in it is broken or of a newer format.
    """
    if run.is_dir() and is_sweep(run):
        comparison = compared([run])
        return to_markdown(comparison) if markdown else compare_page(comparison, run.resolve().name)
    return run_markdown(read_run(run)) if markdown else run_page(read_run(run))


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the folder `run` to `out` and return where it is.

    Args:
        run: Folder of a run or of a sweep.
        out: Where to; None is `run/report.html`, of a sweep `run/compare.html`. A name that ends with `.md` gets
            Markdown.

    Raises:
        UsageError: `run` is not a run folder, or `out` is a folder or another file.
        DataError: A file in the run folder is broken or of a newer format.
    """
    usual = run / (PAGE if run.is_dir() and is_sweep(run) else "report.html")
    out = usual if out is None else out
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the name of a file, such as {out / usual.name}")
    text = render_report(run, markdown=out.suffix == ".md")
    if out != usual and out.exists() and not out.read_bytes().startswith(_beginning(text)):
        raise UsageError(f"{out} is there already and is no such report; choose another name or remove it first")
    write_text_atomic(out, text)
    return out


def _beginning(text: str) -> bytes:
    """Return what a report has before anything in it differs: a page's head, in Markdown the line with its name."""
    head = text[:_HEAD] if text.startswith("<!") else text.partition("\n")[0]
    return head.encode("utf-8", "surrogatepass")
