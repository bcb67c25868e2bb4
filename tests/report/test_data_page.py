"""What the page of a data folder promises: its numbers are those of statistics.json, and no text in it can act."""

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import HOSTILE, Page, check_inert, check_page, words

from scionlm.core.errors import DataError
from scionlm.report import html as report_html
from scionlm.report.barchart import Histogram, histogram, shared_span
from scionlm.report.data_page import data_page, write_data_page
from scionlm.report.svg import Caption

POEM = "The rain came down\n  on the tin roof\n\tand on the hens"


def split(num_tokens: int, num_documents: int, num_bytes: int) -> dict[str, int]:
    return {"num_tokens": num_tokens, "num_documents": num_documents, "num_bytes": num_bytes}


def domain(scale: int, **changes: Any) -> dict[str, Any]:
    """Return the record of a domain whose every number tells `scale` and its place apart."""
    record = {
        "num_files": 3 + scale,
        "documents_read": 1_313 * scale,
        "skipped": {"empty": 7 * scale, "encoding": 2 * scale},
        "duplicates": {"exact": 31 * scale, "near": 17 * scale},
        "limit": None,
        "train": split(410_011 * scale, 1_201 * scale, 1_700_123 * scale),
        "held_out": split(20_017 * scale, 55 * scale, 81_019 * scale),
        "bytes_per_token": 4.0 + scale / 100,
        "gzip_ratio": 2.0 + scale / 100,
        "token_lengths": {
            "edges": [16, 32, 64, 128, 256, 512, 1024],
            "counts": [40 * scale, 160 * scale, 500 * scale, 400 * scale, 0, 156 * scale],
        },
        "length_percentiles": {"5": 21, "25": 60, "50": 118, "75": 201, "95": 590, "100": 900 + scale},
        "samples": [
            {"split": "train", "num_tokens": 14, "num_bytes": len(POEM), "text": POEM},
            {"split": "held_out", "num_tokens": 4_321, "num_bytes": 19_876, "text": "A long one, " * 90},
        ],
    }
    return record | changes


def statistics(domains: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    record = {
        "format_version": 1,
        "tokenizer": {
            "name": "smollm2-135m",
            "vocab_size": 49_152,
            "separator": "<|endoftext|>",
            "bos": None,
            "dtype": "uint16",
        },
        "held_out": {"fraction": 0.005, "min_documents": 12},
        "dedupe": {"method": "near", "across": True, "threshold": 0.83},
        "domains": {"code": domain(1), "web": domain(5, limit="2,000,000 tokens"), "law": domain(2)}
        if domains is None
        else domains,
    }
    return record | changes


def folder_of(tmp_path: Path, record: dict[str, Any]) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    (folder / "statistics.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def table_rows(document: str, ident: str) -> dict[str, list[str]]:
    """Return the cells of the table with that caption by the first cell of their row."""
    whole = next(part for part in re.findall(r"<table>.*?</table>", document, re.DOTALL) if f'id="{ident}"' in part)
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", whole.partition("<tbody>")[2], re.DOTALL):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        name, *rest = [html.unescape(re.sub("<[^>]+>", "", cell.replace("<br>", "\n"))) for cell in cells]
        rows[name] = rest
    return rows


def drawings(document: str, title: str) -> list[ElementTree.Element]:
    roots = [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", document, re.DOTALL)]
    return [root for root in roots if title in (root.findtext("title") or "")]


def bar_boxes(root: ElementTree.Element) -> list[tuple[float, ...]]:
    """Return (x, y, width, height) of the bars of a histogram, from left to right."""
    found = [rect for group in root.iter("g") for rect in group.iter("rect")]
    return [tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height")) for rect in found]


def test_every_number_of_the_tables_is_that_of_the_file(tmp_path: Path) -> None:
    record = statistics()
    document = write_data_page(folder_of(tmp_path, record)).read_text("utf-8")
    check_page(document)
    kept, read = table_rows(document, "kept-table"), table_rows(document, "read-table")
    assert list(kept) == ["all domains", "web", "law", "code"]
    for name, one in record["domains"].items():
        train, held_out = one["train"], one["held_out"]
        assert kept[name] == [
            f"{train['num_documents'] + held_out['num_documents']:,}",
            f"{train['num_tokens']:,}",
            f"{held_out['num_tokens']:,}",
            f"{train['num_bytes'] + held_out['num_bytes']:,}",
            f"{one['bytes_per_token']:.2f}",
            f"{one['gzip_ratio']:.2f}",
        ]
        assert read[name] == [
            f"{one['num_files']:,}",
            f"{one['documents_read']:,}",
            f"{one['duplicates']['exact']:,}",
            f"{one['duplicates']['near']:,}",
            f"{sum(one['skipped'].values()):,}",
            f"{one['skipped']['empty']:,} empty\n{one['skipped']['encoding']:,} encoding",
            (one["limit"] or "\u2013").replace(" ", "\n"),
        ]
    assert kept["all domains"] == ["10,048", "3,280,088", "160,136", "14,249,136", "\u2013", "\u2013"]
    assert read["all domains"][:5] == ["17", "10,504", "248", "136", "72"]


def test_the_words_say_the_same_numbers(tmp_path: Path) -> None:
    text = words(check_page(write_data_page(folder_of(tmp_path, statistics())).read_text("utf-8")))
    assert "3.4M tokens" in text
    assert "from 10,048 documents in 3 domains, with the tokenizer of smollm2-135m." in text
    assert "160,136 tokens are held out" in text
    assert "62% of all tokens: 2,050,055 training tokens in 6,005 documents; 100,085 held-out tokens" in text
    assert "Cut short at 2,000,000 tokens." in text
    for said in ("5% have at most21 tokens", "half have at most118 tokens", "the longest has905 tokens"):
        assert said in text
    assert "A held-out document, 4,321 tokens, 19,876 bytes. It begins:" in text
    assert "A token is the piece of text" in text
    assert "separator token (<|endoftext|>) follows each document and counts as a token." in text
    for said in ("0.5% of the documents", "12 documents", "equal and nearly equal texts", "0.83", "across all domains"):
        assert said in text
    assert "uint16, 2 bytes a token" in text


def test_bars_of_a_histogram_are_as_high_as_their_counts(tmp_path: Path) -> None:
    document = write_data_page(folder_of(tmp_path, statistics())).read_text("utf-8")
    found = drawings(document, "Lengths of the documents of law")
    assert len(found) == 2  # for a desk and for a phone
    for root in found:
        bars = bar_boxes(root)
        heights = [height for _, _, _, height in bars]
        assert [height / heights[2] for height in heights] == pytest.approx([0.08, 0.32, 1, 0.8, 0.312], abs=0.002)
        assert all(width == pytest.approx(bars[0][2], abs=0.11) for _, _, width, _ in bars)
        feet = {round(y + height, 1) for _, y, _, height in bars}
        assert max(feet) - min(feet) < 0.21
        steps = [b[0] - a[0] for a, b in itertools.pairwise(bars)]
        assert steps == pytest.approx([steps[0]] * 3 + [2 * steps[0]], abs=0.25)  # the empty bin stays empty
        assert "128\u2013255: 800; 512\u20131,023: 312" in (root.findtext("desc") or "")


def test_bars_of_the_domains_are_as_long_as_their_tokens(tmp_path: Path) -> None:
    document = write_data_page(folder_of(tmp_path, statistics())).read_text("utf-8")
    for root in drawings(document, "Tokens by domain"):
        train, held_out = (
            [float(rect.get("width", "")) for rect in root.iter("rect") if rect.get("class") == f"fill {tone}"][1:]
            for tone in ("child", "control")
        )
        assert [width / train[0] for width in train] == pytest.approx([1, 0.4, 0.2], abs=0.005)
        # A pixel of each second part is the gap before it.
        assert held_out[0] + 1 == pytest.approx(train[0] * 20_017 / 410_011, abs=1.1)


@given(
    counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=24).filter(any),
    first=st.integers(0, 20),
    percentile=st.integers(0, 2**44),
    width=st.sampled_from([300, 430]),
)
def test_a_histogram_stays_inside_and_keeps_proportions(
    counts: list[int], first: int, percentile: int, width: int
) -> None:
    data = Histogram([2**k for k in range(first, first + len(counts) + 1)], counts, {50: percentile})
    drawn = histogram(Caption("a", "title", "desc"), width, data, shared_span([data]), ("tokens", "documents"))
    root = ElementTree.fromstring(drawn)
    bars = bar_boxes(root)
    shown = [number_of for number_of in counts if number_of]
    assert len(bars) == len(shown)
    for number_of, (x, y, bar_width, height) in zip(shown, bars, strict=True):
        assert height == pytest.approx(max(126 * number_of / max(shown), 1), abs=0.06)
        assert 0 <= x <= x + bar_width <= width
        assert y >= 0
    point = root.find("circle")
    assert point is not None
    assert 0 <= float(point.get("cx", "")) <= width


def test_newlines_of_a_sample_stay_and_long_ones_are_cut(tmp_path: Path) -> None:
    lines = "\n".join(f"line {k}" for k in range(40))
    samples = [
        {"split": "train", "num_tokens": 9, "num_bytes": len(POEM), "text": POEM},
        {"split": "train", "num_tokens": 99, "num_bytes": len(lines), "text": lines},
        {"split": "train", "num_tokens": 1, "num_bytes": 2, "text": "\n\n"},
        {"split": "held_out", "num_tokens": 5_000, "num_bytes": 20_000, "text": "x" * 5_000},
    ]
    record = statistics({"verse": domain(1, samples=samples)})
    page = check_page(write_data_page(folder_of(tmp_path, record)).read_text("utf-8"))
    assert POEM + "A training document, 99 tokens" in page.text  # whole, and nothing after it
    assert "line 10\nline 11\n\u2026" in page.text
    assert "line 12" not in page.text
    assert "(blank)" in page.text
    assert "x" * 900 + "\u2026" in page.text
    assert "x" * 901 not in page.text
    assert "2 more documents" in page.text


def hostile_record() -> dict[str, Any]:
    everything = " ".join(HOSTILE)
    sample = {"split": everything, "num_tokens": 3, "num_bytes": 9, "text": everything * 20}
    one = domain(1, limit=everything, skipped=dict.fromkeys(HOSTILE, 3), samples=[sample, everything, sample])
    return statistics(
        {**{f"{k} {bad}" * 4: one for k, bad in enumerate(HOSTILE)}, "odd": {everything: everything}},
        tokenizer=dict.fromkeys(("name", "separator", "bos", "dtype"), everything),
        dedupe={"method": everything, "across": everything, "threshold": everything},
        held_out={"fraction": everything},
    )


def test_hostile_text_is_shown_and_cannot_act(tmp_path: Path) -> None:
    document = write_data_page(folder_of(tmp_path, hostile_record())).read_text("utf-8")
    check_inert(document)
    text = Page(document).text
    assert "</script><script>alert(1)</script>" in text
    assert r"\x1b[31mred\x00" in text
    assert r"\u202egnp.exe\u2066" in text


def test_the_check_for_hostile_text_fails_without_escaping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_html, "escape", str)
    with pytest.raises(AssertionError):
        check_inert(data_page(hostile_record(), "corpus"))


@pytest.mark.parametrize(
    "domains",
    [
        {},
        {"one": domain(1, train=split(5, 1, 20), held_out=split(0, 0, 0))},
        {"none": domain(0, bytes_per_token=0.0, gzip_ratio=None, samples=[], skipped={}, length_percentiles={})},
        {"single": domain(1, token_lengths={"edges": [64, 128], "counts": [1]})},
        {"zero": domain(1, token_lengths={"edges": [0, 1, 2, 4], "counts": [2, 0, 1]})},
        {"far": domain(1, token_lengths={"edges": [2**40, 2**41], "counts": [10**14]})},
        {"a" * 64: domain(3), "b" * 64: domain(4)},
        {f"domain-{k:02d}": domain(k) for k in range(40)},
    ],
    ids=["empty", "one-document", "nothing", "one-bin", "from-zero", "far", "long-names", "forty"],
)
def test_thin_and_thick_folders_are_drawn(domains: dict[str, Any]) -> None:
    text = words(check_page(data_page(statistics(domains, dedupe=None), "corpus")))
    assert "not looked for" in text
    assert "nan" not in text
    assert len(domains) < 2 or "all domains" in text


def test_more_domains_than_a_page_holds_are_in_its_tables() -> None:
    document = data_page(statistics({f"domain-{k:03d}": domain(k + 1) for k in range(60)}), "corpus")
    text = words(check_page(document))
    assert "36 smaller domains together" in text
    assert "20 smaller domains: see the tables." in text
    assert len(table_rows(document, "kept-table")) == 61


@pytest.mark.parametrize("key", [*domain(1), "tokenizer", "held_out", "dedupe", "domains"])
def test_no_value_of_the_file_is_needed(key: str) -> None:
    for value in (None, [], -7, 1e400, "text", {"num_tokens": None}, [None, "3"], {"edges": [4, 2], "counts": [1]}):
        one = domain(1, **{key: value})
        record = statistics() | {key: value} if key in statistics() else statistics({"web": one})
        check_page(data_page(record, "corpus"))


def test_what_is_missing_or_newer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"statistics\.json is missing"):
        write_data_page(tmp_path)
    folder = folder_of(tmp_path, statistics(format_version=99))
    with pytest.raises(DataError, match="format_version 99"):
        write_data_page(folder)
    assert not (folder / "report.html").exists()


def test_the_page_stands_in_the_folder_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, statistics())
    out = write_data_page(folder)
    assert out == folder / "report.html"
    first = out.read_text("utf-8")
    assert "<title>corpus \u2013 Scion data</title>" in first
    monkeypatch.chdir(folder)
    write_data_page(Path())
    assert out.read_text("utf-8") == first
