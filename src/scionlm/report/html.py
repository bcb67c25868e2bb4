"""Safe HTML and SVG: one escaping helper, elements that escape whatever they are given, tables, the page shell.

Everything that a run folder contains is hostile until shown otherwise: tokens of models and names of domains come from
anywhere. So text becomes part of a page only through `tag` and `join`, which escape all that is not already `Markup`;
forgetting to escape is not possible, only writing `Markup(...)` by hand is, and that stays in this file.
By custom, values of a run go into text and never into attributes.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scionlm.report.style import CSS

# No script at all, so none is allowed; `data:` is for the empty icon that keeps browsers from asking for one.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_VOID = frozenset({"br", "link", "meta"})

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}

# Characters that act on their surroundings or cannot be seen: controls (ANSI escapes begin with one), bidirectional
# overrides, invisible format characters, lone surrogates, characters XML forbids, tag characters. The joiners U+200C
# and U+200D stay: ordinary Persian, Hindi and emoji need them.
_SPECIAL = re.compile(
    "[&<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


class Markup(str):
    """Text that is already safe to stand in a page."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]


@dataclass(frozen=True)
class RowGroup:
    """Rows of a table that belong together: a heading over them (or none), and the rows, each begun by its header."""

    heading: Content
    rows: Sequence[Sequence[Content]]


def escape(value: object) -> Markup:
    r"""Return `value` as text that is safe between tags and inside quoted attributes, with nothing invisible in it.

    Example:
        >>> print(escape("<b> \u202e \x1b"))
        &lt;b&gt; \u202e \x1b
    """
    return Markup(_SPECIAL.sub(_replace, str(value).replace("\r\n", "\n")))


def _replace(match: re.Match[str]) -> str:
    character = match.group()
    code = ord(character)
    if character in _ENTITIES:
        return _ENTITIES[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def join(*parts: Content) -> Markup:
    """Return `parts` one after another, escaped where they are not markup; None is nothing, sequences are flattened."""
    return Markup("".join(_pieces(parts)))


def _pieces(parts: Iterable[Content]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, Markup):
            yield part
        elif isinstance(part, str | int | float):
            yield escape(part)
        elif part is not None:
            yield from _pieces(part)


def tag(name: str, /, *children: Content, **attributes: str | float | None) -> Markup:
    """Return the element `name`; in attribute names `_` stands for `-`, one at the end is dropped, None leaves one out.

    Example:
        >>> print(tag("th", "a < b", class_="name", aria_hidden="true"))
        <th class="name" aria-hidden="true">a &lt; b</th>
    """
    opening = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_compact(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{opening}>" if name in _VOID else f"<{opening}>{join(*children)}</{name}>")


def _compact(value: str | float) -> str:
    """Coordinates need a tenth of a pixel, not sixteen digits."""
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def name_of(value: object, limit: int = 80) -> Markup:
    """Return a name from a run, cut to `limit` characters, kept apart from the direction of the text around it."""
    return tag("bdi", clip(str(value), limit))


def clip(text: str, limit: int) -> str:
    """Return `text` on at most `limit` characters; what was cut is marked by an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def table(ident: str, caption: Content, header: Sequence[Content], groups: Sequence[RowGroup]) -> Markup:
    """Return a table in a box of its own that scrolls sideways where the page is too narrow for it."""
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in header]))
    bodies = [_table_body(group, len(header)) for group in groups]
    whole = tag("table", tag("caption", caption, id=ident), head, bodies)
    # Focusable, so that the keyboard can scroll it too.
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_labelledby=ident)


def _table_body(group: RowGroup, width: int) -> Markup:
    heading = group.heading
    title = tag("tr", tag("th", heading, scope="rowgroup", colspan=str(width))) if heading is not None else None
    rows = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in group.rows]
    return tag("tbody", title, rows)


def facts(pairs: Iterable[tuple[Content, Content]]) -> Markup:
    """Return names and values as a description list; pairs without a value are left out."""
    return tag(
        "dl",
        [tag("div", tag("dt", key), tag("dd", value)) for key, value in pairs if value is not None],
        class_="facts",
    )


def card(picture: Content, note: Content = None, title: Content = None) -> Markup:
    """Return a figure in a frame of its own, with a heading above it and a note below where there are some."""
    return tag(
        "figure",
        None if title is None else tag("h3", title),
        picture,
        None if note is None else tag("figcaption", note, class_="note"),
        class_="card",
    )


def section(ident: str, title: str, *body: Content) -> Markup:
    """Return a part of the page under a heading, which others find by `ident`."""
    return tag("section", tag("h2", title, id=ident), *body, aria_labelledby=ident)


def page(title: str, header: Content, main: Content, footer: Content) -> Markup:
    """Return the whole document: language, policy, style, and the three landmarks."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        Markup(f"<style>{CSS}</style>"),
    )
    body = tag("body", tag("header", header), tag("main", main), tag("footer", footer))
    return Markup(f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n')
