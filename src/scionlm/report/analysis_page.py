"""The page of an analysis: what was found, and every number behind it as a picture.

Drawn from `analysis.json` and `maps.json` alone, which `scion analyze` writes; no model is read for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scionlm.core.files import write_text_atomic
from scionlm.core.records import read_json
from scionlm.report.analysis_attention import attention_section
from scionlm.report.analysis_beside import beside_section
from scionlm.report.analysis_keep import agreement_section, keep_section
from scionlm.report.analysis_layers import worth_section
from scionlm.report.analysis_lead import headline, tiles
from scionlm.report.analysis_method import method_section
from scionlm.report.analysis_read import Look
from scionlm.report.html import Markup, clip, join, name_of, page, tag
from scionlm.report.values import mapping


def write_analysis_page(folder: Path) -> Path:
    """Write `report.html` into the folder of an analysis, and return where it is.

    Raises:
        DataError: `analysis.json` is missing; or it, or `maps.json`, is broken or of a newer format.
        StorageError: The page cannot be written.
    """
    out = folder / "report.html"
    record = read_json(folder / "analysis.json")
    stored = folder / "maps.json"
    maps = read_json(stored) if stored.is_file() else {}
    write_text_atomic(out, analysis_page(record, maps, folder.resolve().name))
    return out


def analysis_page(record: Mapping[str, Any], maps: Mapping[str, Any], name: str) -> str:
    """Return the page of an analysis in a folder called `name` as one HTML document.

    Args:
        record: What `analysis.json` holds.
        maps: What `maps.json` holds; empty where there are no maps.
        name: Of the folder.
    """
    look = Look(record)
    against = mapping(record.get("against"))
    other = Look(against) if against else None
    main = join(
        tiles(look),
        attention_section(look, maps),
        worth_section(look),
        agreement_section(look),
        keep_section(look),
        beside_section(look, other),
        method_section(look),
    )
    header = join(
        tag("div", _lens(), tag("span", "Scion analysis"), class_="eyebrow"),
        tag("h1", name_of(look.name)),
        headline(look, other),
    )
    footer = tag("p", f"Drawn from analysis.json and maps.json in the folder {clip(name, 80)}.")
    return str(page(f"{clip(look.name, 80)} \u2013 Scion analysis", header, main, footer))


def _lens() -> Markup:
    """The mark of an analysis: a magnifying glass over a leaf's vein."""
    outline = "M10 3A7 7 0 1 0 10 17A7 7 0 1 0 10 3M15 15L21 21M10 6.5V13.5M10 10L13 8M10 12L7 10"
    return tag("svg", tag("path", d=outline), viewBox="0 0 24 24", class_="sprout", aria_hidden="true")
