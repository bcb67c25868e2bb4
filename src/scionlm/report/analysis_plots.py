"""The figures of an analysis that are lines and bars, drawn with matplotlib.

Whatever is missing or no number raises one of Python's own errors (`analysis_figures.draw` leaves that figure out).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = NDArray[np.float64]

# Inches: one column of a paper, and both.
COLUMN, PAGE = 3.4, 7.0
_COLORS, _DASHES = ("#0a6b57", "#ad4708"), ("-", (0, (4, 2)))
_SOFT = "#59625c"
SEQUENTIAL = "viridis"
MINUS = "\u2212"
_MAX_LAYERS, _MAX_SWEEP, MAX_CRITERIA = 1000, 8, 24

_UNITS = {
    "removal": "nats",
    "taylor": "nats",
    "block_influence": "1 - cosine",
    "angular_distance": "angle / π",
    "update_norm": "ratio of norms",
    "cka_distance": "1 - CKA",
    "lens": "nats",
    "weight_norm": "L2 norm",
    "max_rank": "rank",
    "mean_mass": "columns",
}


@dataclass(frozen=True)
class Facts:
    """What figures are drawn from.

    Attributes:
        record: What `analysis.json` holds.
        maps: The list in `maps.json`, if there is one.
    """

    record: dict[str, Any]
    maps: Any = None

    @property
    def models(self) -> list[dict[str, Any]]:
        """The model, and the one beside it."""
        return [each for each in (self.record, self.record.get("against")) if each]

    @property
    def title(self) -> str:
        """The model and how long the sequences were, without which no rank means anything."""
        return f"{name_of(self.record)}, sequences of {int(self.record['seq_len'])} tokens"


def text_of(value: object, length: int) -> str:
    """Return a name that can stand in XML, its end where it is long: of a path the end tells more."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))
    return clean if len(clean) <= length else f"…{clean[1 - length :]}"


def name_of(model: dict[str, Any]) -> str:
    """Return a model's name, as far as it is shown."""
    name = text_of(model["model"]["name"], 32)
    return f" {name}" if name.startswith("_") else name  # legends leave out what begins so


def numbers(value: Any, axes: int = 1) -> Numbers:
    """Return numbers that can be drawn.

    Raises:
        ValueError: They are none, not finite, too many, or not of so many axes.
    """
    found = np.asarray(value, dtype=np.float64)
    if found.ndim != axes or not found.size or max(found.shape) > _MAX_LAYERS + 1 or not np.abs(found).max() < 1e30:
        raise ValueError("not numbers that can be drawn")
    return found


def column(records: Sequence[dict[str, Any]], key: str) -> Numbers:
    """Return what each of the records holds under `key`."""
    return numbers([each[key] for each in records])


def figure_of(width: float, height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return a figure of so many inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def whole_ticks(axes: "Axes", sides: str = "x", most: int = 8) -> None:
    """Let the ticks of an axis be whole numbers, `most` of them at most."""
    from matplotlib.ticker import MaxNLocator

    for side in sides:
        getattr(axes, f"{side}axis").set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def by_layer(axes: "Axes", title: str, unit: str, label: str = "layer") -> None:
    """Say what an axes shows, by layer."""
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    whole_ticks(axes)


def _spread_scale(axes: "Axes", values: Numbers) -> bool:
    """Make the scale logarithmic beyond the usual size if a few values would hide all others; say whether."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    size = np.abs(values)
    usual = float(np.median(size))
    if not 0 < 12 * usual < size.max():
        return False
    linear = 10.0 ** np.floor(np.log10(usual))
    axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}".replace("-", MINUS)))
    axes.minorticks_off()
    return True


def _lines(facts: Facts, key: str, deviation: str, unit: str) -> "Figure":
    figure, (axes,) = figure_of(COLUMN, 2.4)
    for model, color, dash in zip(facts.models, _COLORS, _DASHES, strict=False):
        values, spread = column(model["layers"], key), column(model["layers"], deviation)
        at = np.arange(len(values))
        axes.fill_between(at, values - spread, values + spread, color=color, alpha=0.16, linewidth=0)
        axes.plot(at, values, color=color, linestyle=dash, marker="o", label=name_of(model))
    by_layer(axes, facts.title, unit)
    axes.set_ylim(bottom=0)
    if len(facts.models) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def max_rank(facts: Facts) -> "Figure":
    """Draw the largest rank of each layer."""
    return _lines(facts, "max_rank", "max_rank_std", f"MaxRank (τ = {facts.record['tau']:g})")


def mean_mass(facts: Facts) -> "Figure":
    """Draw how many columns hold most of each layer's attention."""
    return _lines(facts, "mean_mass", "mean_mass_std", f"mean mass, columns (η = {facts.record['eta']:g})")


def removal(facts: Facts) -> "Figure":
    """Draw what the loss is without each layer."""
    layers = facts.record["layers"]
    values, errors = column(layers, "removal"), column(layers, "removal_error")
    figure, (axes,) = figure_of(COLUMN, 2.4)
    axes.axhline(0, color=_SOFT, linewidth=0.6)
    axes.bar(np.arange(len(values)), values, 0.75, color=_COLORS[0], yerr=errors, error_kw={"elinewidth": 0.7})
    spread = _spread_scale(axes, values)
    by_layer(axes, facts.title, f"rise in loss without it (nats{', symlog' if spread else ''})")
    return figure


def criteria(facts: Facts) -> "Figure":
    """Draw what layers are worth by each criterion."""
    criteria = [(str(each["name"]), numbers(each["scores"])) for each in facts.record["criteria"][:MAX_CRITERIA]]
    columns = min(5, len(criteria))
    rows = -(-len(criteria) // columns)
    figure, grid = figure_of(PAGE, 0.45 + 1.35 * rows, rows, columns)
    for axes, (name, scores) in zip(grid, criteria, strict=False):
        axes.plot(np.arange(len(scores)), scores, color=_COLORS[0], linewidth=1.1)
        spread = _spread_scale(axes, scores)
        unit = _UNITS.get(name, "")
        by_layer(axes, text_of(name.replace("_", " "), 22), f"{unit}, symlog".lstrip(", ") if spread else unit)
        whole_ticks(axes, most=4)
        if axes.get_subplotspec().rowspan.stop < rows:  # pyright: ignore[reportOptionalMemberAccess]
            axes.set_xlabel("")
    for axes in grid[len(criteria) :]:
        axes.set_axis_off()
    figure.suptitle(facts.title, fontsize=8)
    return figure


def _sweep(facts: Facts, key: str, labels: Callable[[dict[str, Any]], str], title: str, unit: str) -> "Figure":
    from matplotlib import colormaps

    sweep = facts.record[key][:_MAX_SWEEP]
    if not sweep:
        raise ValueError("nothing to draw")
    figure, (axes,) = figure_of(COLUMN, 2.4)
    for number, each in enumerate(sweep):
        values = numbers(each["max_rank"])
        color = colormaps[SEQUENTIAL](0.85 * number / max(1, len(sweep) - 1))
        axes.plot(np.arange(len(values)), values, color=color, marker="o", label=labels(each))
    by_layer(axes, title, unit)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def rank_by_length(facts: Facts) -> "Figure":
    """Draw the largest rank of each layer for each length."""
    lengths = ", ".join(str(int(each["seq_len"])) for each in facts.record["lengths"])
    title = f"{name_of(facts.record)}, sequences of {text_of(lengths, 24)} tokens"
    unit = f"MaxRank (τ = {facts.record['tau']:g})"
    return _sweep(facts, "lengths", lambda each: f"{int(each['seq_len'])} tokens", title, unit)


def rank_by_tau(facts: Facts) -> "Figure":
    """Draw the largest rank of each layer for each threshold."""
    return _sweep(facts, "taus", lambda each: f"τ = {float(each['tau']):g}", facts.title, "MaxRank")


def lens(facts: Facts) -> "Figure":
    """Draw the loss if the model ended after each layer."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, (axes,) = figure_of(COLUMN, 2.4)
    lowest, highest = np.inf, -np.inf
    for model, color, dash in zip(facts.models, _COLORS, _DASHES, strict=False):
        values, errors = column(model["lens"], "nll"), column(model["lens"], "error")
        at = np.arange(len(values))
        axes.errorbar(at, values, errors, color=color, linestyle=dash, marker="o", elinewidth=0.7, label=name_of(model))
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
    spread = 0 < 10 * lowest < highest
    if spread:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes.minorticks_off()
    by_layer(axes, facts.title, f"loss (nats{', log' if spread else ''})", "layers passed (0: embedding)")
    if len(facts.models) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def greedy(facts: Facts) -> "Figure":
    """Draw the loss as layers are taken out, the cheapest first."""
    greedy = facts.record["greedy"]
    losses = numbers([facts.record["overall"]["nll"], *greedy["nll"]])
    figure, (axes,) = figure_of(COLUMN, 2.4)
    axes.plot(np.arange(len(losses)), losses, color=_COLORS[0], marker="o")
    for number, (layer, loss) in enumerate(zip(greedy["order"], losses[1:], strict=True), start=1):
        axes.annotate(
            str(int(layer)), (number, float(loss)), (0, 4), textcoords="offset points", ha="center", fontsize=6,
            color=_SOFT,
        )  # fmt: skip
    by_layer(axes, facts.title, "loss (nats)", "layers taken out (number: which one)")
    axes.margins(y=0.12)
    return figure
