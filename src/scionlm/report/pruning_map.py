"""Which parts of the source stay: a map of its layers and heads, and a table of what each layer keeps."""

from collections.abc import Sequence

from scionlm.report.axes import text_width
from scionlm.report.collect import Pruning, Run
from scionlm.report.heatmap import stride
from scionlm.report.html import Content, Markup, RowGroup, card, clip, join, table, tag
from scionlm.report.pruning_read import Layer, layers_of, source_sizes
from scionlm.report.svg import SMALL, Caption, drawing, label, responsive
from scionlm.report.values import integer, mapping, text
from scionlm.report.wording import NONE, exact, index_ranges, listing

_MOST_CELLS, _MAX_WORDS = 6_000, 4_000
_GAP = 2.0  # between cells; twice as much between groups


def _sizes(run: Run, pruning: Pruning) -> tuple[int, int, int] | None:
    """Return layers, query heads and key/value heads of the source; None where they are unknown or too many."""
    known, layers = source_sizes(run, pruning), layers_of(pruning.record)
    total, heads, groups = (
        integer(known, key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if heads is None:  # at least as many as the plan names
        heads = max((max(layer.heads) + 1 for layer in layers if layer.heads), default=0)
    if not layers or not total or total < 0 or not 0 < heads <= _MOST_CELLS // total:
        return None
    groups = groups if groups and 0 < groups <= heads and heads % groups == 0 else heads
    return total, heads, groups


def kept_figure(run: Run, pruning: Pruning) -> Markup | None:
    """Return the layers of the source as columns and their query heads as cells: filled ones stay."""
    sizes = _sizes(run, pruning)
    if sizes is None:
        return None
    total, heads, groups = sizes
    kept = {layer.index: layer for layer in layers_of(pruning.record) if layer.index < total}
    words = "; ".join(f"layer {k}: {_heads(kept[k])}" if k in kept else f"layer {k}: gone" for k in range(total))
    caption = Caption("kept-map", "Layers and heads of the source that stay", clip(words, _MAX_WORDS))
    picture = responsive(caption, lambda named, width: _draw(named, width, kept, total, heads, groups))
    note = "A column is a layer of the source, a cell one of its query heads. Filled: it stays. Grey: it goes, though "
    note += "its layer stays. Outlined: the whole layer goes."
    if groups < heads:
        note += f" Query heads that share a key/value head stand together, {heads // groups} each."
    return card(picture, note)


def _heads(layer: Layer) -> str:
    return "all heads" if layer.heads is None else f"heads {index_ranges(sorted(layer.heads))}"


def _draw(caption: Caption, width: int, kept: dict[int, Layer], total: int, heads: int, groups: int) -> Markup:
    inside = heads // groups
    left = text_width(f"head {heads - 1}", SMALL) + 8
    pitch = min((width - left) / total, 44.0)
    height = min(max(pitch - _GAP, 4.0), 16.0)
    tops = [24 + head * (height + _GAP) + (head // inside if inside > 1 else 0) * _GAP for head in range(heads)]
    paths: dict[str, list[str]] = {"cell kept": [], "cell": [], "ground": []}
    for layer in range(total):
        one = kept.get(layer)
        for head in range(heads):
            stays = one is not None and (one.heads is None or head in one.heads)
            style = "ground" if one is None else "cell kept" if stays else "cell"
            x, size = left + layer * pitch, max(pitch - _GAP, 1.0)
            paths[style].append(f"M{x:.1f} {tops[head]:.1f}h{size:.1f}v{height:.1f}h-{size:.1f}z")
    across = stride(text_width(str(total - 1), SMALL) + 4, pitch)
    down = stride(14, height + _GAP)
    names: list[Content] = [label(0, 12, "layer", "small")]
    names += [
        label(left + (k + 0.5) * pitch - _GAP / 2, 12, k, "small", "middle") for k in range(total) if k % across == 0
    ]
    names += [
        label(left - 8, tops[k] + height / 2 + 4, f"head {k}" if k == 0 else k, "small", "end")
        for k in range(heads)
        if k % down == 0
    ]
    cells = [tag("path", d="".join(path), class_=style) for style, path in paths.items() if path]
    return drawing(caption, width, tops[-1] + height + 6, names, cells)


def kept_table(run: Run, pruning: Pruning) -> Markup | None:
    """Return what each layer that stays keeps, and which hidden channels stay, folded away."""
    layers = layers_of(pruning.record)
    if not layers:
        return None
    sizes = source_sizes(run, pruning)
    rows = [list(_row(place, layer)) for place, layer in enumerate(layers)]
    header = ("layer of the child", "of the source", "query heads", "key/value heads", "MLP channels")
    of = [
        f"{exact(sizes[key])} {words}"
        for key, words in (("num_attention_heads", "query heads"), ("intermediate_size", "MLP channels"))
        if key in sizes
    ]
    caption = f"What each layer keeps; the source has {listing(of)}" if of else "What each layer keeps"
    hidden = text(mapping(pruning.record.get("plan")), "hidden")
    channels = tag("p", f"Hidden channels that stay: {_spaced(clip(hidden, 1200))}.", class_="note") if hidden else None
    where = tag("p", "Every index is in prune/result.json, under plan.", class_="note")
    made = join(table("kept-table", caption, header, [RowGroup(None, rows)]), channels, where)
    return tag("details", tag("summary", "Layer by layer"), made)


def _row(place: int, layer: Layer) -> Sequence[Content]:
    return (
        str(place),
        str(layer.index),
        "all" if layer.heads is None else clip(index_ranges(sorted(layer.heads)), 80) or NONE,
        "all" if layer.groups is None else clip(index_ranges(sorted(layer.groups)), 80) or NONE,
        "all" if layer.channels is None else exact(layer.channels),
    )


def _spaced(listed: str) -> str:
    return listed.replace(",", ", ").replace("-", "\u2013")
