"""Pictures of attention: of each layer, the head with the largest rank and the one with the smallest."""

from collections.abc import Mapping
from typing import Any

from scionlm.report.analysis_read import Look, finite, known, matrix, of, rows
from scionlm.report.heatmap import masked
from scionlm.report.html import Content, Markup, tag
from scionlm.report.svg import MAX_LAYERS, Caption, drawing
from scionlm.report.values import integer
from scionlm.report.wording import quantity

_OPEN, _TOKENS = 8, 64
_SIDE = 160

Pixels = list[list[float]]


def maps_gallery(maps: Mapping[str, Any], look: Look) -> Content:
    """Return the pictures of all layers, the first ones open; None where there are none."""
    by_layer: dict[int, list[tuple[Mapping[str, Any], Pixels]]] = {}
    for one in rows(maps, "maps", 2 * MAX_LAYERS):
        layer, pixels = integer(one, "layer"), _pixels(one)
        if layer is not None and 0 <= layer < MAX_LAYERS and pixels is not None:
            by_layer.setdefault(layer, []).append((one, pixels))
    if not by_layer:
        return None
    cards = [_card(layer, found[:2], look) for layer, found in sorted(by_layer.items())]
    tokens = max(len(pixels) for found in by_layer.values() for _, pixels in found)
    n = integer(maps, "num_sequences")
    mean = f", mean over {of(n, 'sequence')}" if n else ""
    note = (
        f"Attention among the first {of(tokens, 'token')}{mean}: a row is a token that looks, a column one that is "
        "looked at, the tone the square root of the share it gets. Of each layer, the head of the largest rank and the "
        "one of the smallest; a full first column is a sink. Ranks are of whole sequences, each taken before the mean."
    )
    folded = cards[_OPEN:]
    more = f"{of(len(folded), 'more layer')}"
    return [
        tag("h3", "What attention looks like", class_="sub"),
        tag("p", note, class_="note"),
        tag("div", cards[:_OPEN], class_="multiples maps"),
        tag("details", tag("summary", more), tag("div", folded, class_="multiples maps")) if folded else None,
    ]


def _pixels(one: Mapping[str, Any]) -> Pixels | None:
    """Return opacities, square; None where it is no map."""
    found = [row[:_TOKENS] for row in matrix(one.get("attention"), _TOKENS)]
    if not found or any(len(row) != len(found) or len(known(row)) != len(row) for row in found):
        return None
    return [[max(value, 0.0) ** 0.5 for value in known(row)] for row in found]


def _card(layer: int, found: list[tuple[Mapping[str, Any], Pixels]], look: Look) -> Markup:
    lazy = tag("span", ", lazy", class_="soft") if layer in look.lazy else None
    parts = [_map(f"map-{layer}-{k}", layer, *one) for k, one in enumerate(found)]
    return tag("div", tag("h3", f"Layer {layer}", lazy), tag("div", parts, class_="pair"), class_="card")


def _map(ident: str, layer: int, one: Mapping[str, Any], pixels: Pixels) -> Markup:
    head, rank = integer(one, "head"), finite(one, "rank")
    name = f"head {head}" if head is not None else "a head"
    caption = Caption(ident, f"Attention of layer {layer}, {name}", f"Mean rank {quantity(rank)}.")
    picture = drawing(
        caption,
        _SIDE,
        _SIDE,
        tag("rect", x=0, y=0, width=_SIDE, height=_SIDE, class_="ground"),
        masked(f"{ident}-mask", pixels, (0, 0, _SIDE, _SIDE)),
    )
    return tag("figure", picture, tag("figcaption", name, tag("br"), f"rank {quantity(rank)}"))
