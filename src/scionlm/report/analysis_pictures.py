"""The figures of an analysis that are matrices: heat maps and attention itself. See `analysis_plots`."""

from typing import TYPE_CHECKING, Any

import numpy as np

from scionlm.report.analysis_plots import (
    COLUMN,
    MAX_CRITERIA,
    MINUS,
    PAGE,
    SEQUENTIAL,
    Facts,
    by_layer,
    column,
    figure_of,
    numbers,
    text_of,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_DIVERGING, _DARK = "RdBu_r", "magma"
_MAX_MAPS = 12


def rank_heads(facts: Facts) -> "Figure":
    """Draw the rank of each head of each layer, with a dot where it has collapsed."""
    heads = facts.record["heads"]
    layers, heads_each = (1 + max(int(head[key]) for head in heads) for key in ("layer", "head"))
    if layers * heads_each != len(heads):
        raise ValueError("heads are missing")
    ranks = np.zeros((heads_each, layers))
    ranks[column(heads, "head").astype(int), column(heads, "layer").astype(int)] = column(heads, "rank")
    lazy = 1.0 + float(facts.record["lazy_tolerance"])
    figure, (axes,) = figure_of(COLUMN, float(np.clip(1.1 + 0.12 * heads_each, 1.7, 5.0)))
    image = axes.imshow(numbers(ranks, 2), SEQUENTIAL, aspect="auto", vmin=1, origin="lower", interpolation="none")
    of, at = np.nonzero(ranks < lazy)
    axes.scatter(at, of, s=2.5, color="white", linewidths=0)
    by_layer(axes, facts.title, "head", f"layer (dot: rank below {lazy:g})" if len(at) else "layer")
    whole_ticks(axes, "y")
    _colorbar(figure, image, [axes], f"rank (τ = {facts.record['tau']:g})")
    return figure


def correlation(facts: Facts) -> "Figure":
    """Draw how far each two criteria agree on the order of layers, with the numbers."""
    names = [text_of(str(each["name"]).replace("_", " "), 22) for each in facts.record["criteria"]]
    values = numbers(facts.record["correlation"], 2)
    if values.shape != (len(names), len(names)) or len(names) > MAX_CRITERIA:
        raise ValueError("not a correlation of the criteria")
    side = float(np.clip(1.2 + 0.34 * len(names), COLUMN - 0.6, PAGE))
    figure, (axes,) = figure_of(side, side)
    axes.imshow(values, _DIVERGING, vmin=-1, vmax=1, interpolation="none")
    for (row, at), value in np.ndenumerate(values):
        color = "white" if abs(value) > 0.65 else "black"
        shown = f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS).replace("0.", ".")
        axes.text(at, row, shown, ha="center", va="center", color=color, fontsize=5.5)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_xlabel("rank correlation of layers (Spearman)")
    figure.suptitle(facts.title, fontsize=8)
    return figure


def similarity(facts: Facts) -> "Figure":
    """Draw how alike hidden states are behind each two layers."""
    figure, (axes,) = figure_of(COLUMN, 2.9)
    values = numbers(facts.record["similarity"], 2)
    image = axes.imshow(values, SEQUENTIAL, vmin=0, vmax=1, origin="lower", interpolation="none")
    by_layer(axes, facts.title, "layers passed", "layers passed (0: embedding)")
    whole_ticks(axes, "y")
    _colorbar(figure, image, [axes], "CKA of hidden states")
    return figure


def maps(facts: Facts) -> "Figure":
    """Draw attention itself: of a dozen layers at most, the heads of the largest and of the smallest rank."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    heads: dict[int, list[dict[str, Any]]] = {}
    for each in facts.maps:
        heads.setdefault(int(each["layer"]), []).append(each)
    layers = sorted(heads)
    layers = [layers[at] for at in np.unique(np.linspace(0, len(layers) - 1, _MAX_MAPS).round().astype(int))]
    deep = max(len(heads[layer][:2]) for layer in layers)
    columns = min(6, len(layers))
    bands = -(-len(layers) // columns)
    figure, grid = figure_of(PAGE, 0.5 + 1.42 * deep * bands, deep * bands, columns)
    for axes in grid:
        axes.set_axis_off()
    norm = PowerNorm(0.5, 0, 1)
    for number, layer in enumerate(layers):
        for row, each in enumerate(heads[layer][:2]):
            axes = grid[(number // columns * deep + row) * columns + number % columns]
            axes.imshow(numbers(each["attention"], 2), _DARK, norm=norm, interpolation="none")
            axes.set_title(f"layer {layer}, head {int(each['head'])}\nrank {float(each['rank']):.1f}", fontsize=6.5)
    tokens = len(heads[layers[0]][0]["attention"])
    figure.suptitle(f"{facts.title}, their first {tokens}: heads of the largest and of the smallest rank", fontsize=8)
    _colorbar(figure, ScalarMappable(norm, _DARK), grid, "attention, mean over sequences")
    return figure


def _colorbar(figure: "Figure", image: "ScalarMappable", axes: "list[Axes]", label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, aspect=25, pad=0.02, shrink=0.9)
    bar.outline.set_linewidth(0)  # pyright: ignore[reportCallIssue]
