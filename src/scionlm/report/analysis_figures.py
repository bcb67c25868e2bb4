"""Figures of an analysis for a paper: each one as SVG, whose text stays text, and as PNG."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import write_bytes_atomic
from scionlm.core.records import read_json
from scionlm.report import analysis_pictures as pictures
from scionlm.report import analysis_plots as plots
from scionlm.report.analysis_plots import Facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FOLDER, _DPI = "figures", 300

# Beside matplotlib's own defaults; what the user's matplotlibrc says has no part in it.
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 2.8,
    "text.parse_math": False,  # a dollar in a model's name is a dollar
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "scion",
}


PLOTS: "dict[str, Callable[[Facts], Figure]]" = {
    "max_rank": plots.max_rank,
    "mean_mass": plots.mean_mass,
    "rank_heads": pictures.rank_heads,
    "removal": plots.removal,
    "criteria": plots.criteria,
    "correlation": pictures.correlation,
    "similarity": pictures.similarity,
    "rank_by_length": plots.rank_by_length,
    "rank_by_tau": plots.rank_by_tau,
    "lens": plots.lens,
    "greedy": plots.greedy,
    "maps": pictures.maps,
}
"""Every figure by the name of its files."""


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("figures need matplotlib; install it with: pip install 'scionlm[plots]'") from error


def write_figures(folder: Path) -> list[Path]:
    """Write what `folder/analysis.json` and `maps.json` hold as figures into `folder/figures`; return the files.

    A figure whose numbers are not there is left out, and taken away if it stands there from an earlier analysis.

    Args:
        folder: Folder of an analysis.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: There is no analysis, or it is broken.
        StorageError: The figures cannot be written.
    """
    require_matplotlib()
    facts = Facts(read_json(folder / "analysis.json"), _maps(folder / "maps.json"))
    written: list[Path] = []
    for name in PLOTS:
        paths = [folder / _FOLDER / f"{name}.{kind}" for kind in ("svg", "png")]
        drawn = draw(name, facts)
        for path, data in zip(paths, drawn or (None, None), strict=True):
            if data is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes_atomic(path, data)
                written.append(path)
    return written


def _maps(path: Path) -> Any:
    try:
        return read_json(path).get("maps")
    except DataError:
        return None


def draw(name: str, facts: Facts) -> tuple[bytes, bytes] | None:
    """Return one of `PLOTS` as SVG and PNG, or None where the numbers for it are missing or cannot be drawn.

    Args:
        name: Which.
        facts: The analysis.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast("Any", _STYLE))
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes in the PNG; in the SVG they are text
        try:
            figure = PLOTS[name](facts)
            svg = _saved(figure, "svg", {"Date": None, "Creator": None})
            figure.set_layout_engine("none")  # all has found its place
            return svg, _saved(figure, "png", {"Software": None})
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError):
            return None


def _saved(figure: "Figure", kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()
