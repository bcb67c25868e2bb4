"""The page of a prepared data folder: how much is in it, of what, what was left out, and what it looks like.

Drawn from `statistics.json` alone, which `scion prepare` writes beside the shards; no token is read for it.
"""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scionlm.core.files import write_text_atomic
from scionlm.core.records import read_json
from scionlm.report.barchart import Histogram, Share, bin_name, histogram, share_bars, shared_span
from scionlm.report.html import Content, Markup, RowGroup, card, clip, facts, join, name_of, page, section, table, tag
from scionlm.report.svg import Caption, responsive
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, NOT_RECORDED, count, exact, nats, percent, size

# What a page shows at most; the whole is in statistics.json.
_MAX_BARS, _MAX_PARTS, _MAX_REASONS = 24, 40, 8
_MAX_SAMPLES, _MAX_LINES, _MAX_TEXT = 6, 12, 900

# So many domains are laid open, and so many samples of each; a reader unfolds the others.
_OPEN_DOMAINS, _OPEN_SAMPLES = 8, 2

_KEPT = ("domain", "documents", "train tokens", "held-out tokens", "bytes of text", "bytes per token", "gzip ratio")
_READ = ("domain", "files", "documents read", "equal texts removed", "near duplicates removed")
_READ += ("skipped", "why", "limit")

_SUMMED = ("num_files", "documents_read")
_SPLITS = {"train": "training", "held_out": "held-out"}
_PERCENTILES = {5: "5% have at most", 25: "25% have at most", 50: "half have at most"}
_PERCENTILES |= {75: "75% have at most", 95: "95% have at most", 100: "the longest has"}


@dataclass(frozen=True)
class _Domain:
    """A domain, or all of them as one: the record, and what is drawn of it."""

    name: str
    record: Mapping[str, Any]

    def kept(self, key: str, *splits: str) -> int:
        """Return the sum of `key` over these splits, or over both where none is named."""
        return sum(_whole(mapping(self.record.get(split)), key) or 0 for split in splits or _SPLITS)

    @property
    def tokens(self) -> int:
        return self.kept("num_tokens")

    @property
    def lengths(self) -> Histogram:
        record = mapping(self.record.get("token_lengths"))
        edges, counts = _wholes(record.get("edges")), _wholes(record.get("counts"))
        rising = all(low < high for low, high in itertools.pairwise(edges))
        if len(edges) != len(counts) + 1 or not rising:
            edges, counts = [], []
        stored = mapping(self.record.get("length_percentiles"))
        sizes = {percentile: _whole(stored, str(percentile)) for percentile in _PERCENTILES}
        return Histogram(edges, counts, {key: value for key, value in sizes.items() if value is not None})


def _together(domains: Sequence[_Domain]) -> _Domain:
    """Return all the domains as one, with what can be summed."""
    record: dict[str, Any] = {key: sum(_whole(d.record, key) or 0 for d in domains) for key in _SUMMED}
    for part in (*_SPLITS, "duplicates", "skipped"):
        found = [mapping(domain.record.get(part)) for domain in domains]
        keys = dict.fromkeys(key for one in found for key in one)
        record[part] = {key: sum(_whole(one, key) or 0 for one in found) for key in keys}
    return _Domain("all domains", record)


def _whole(record: Mapping[str, Any], key: str) -> int | None:
    """Return the count under `key`; what no count can be is taken as missing."""
    value = number(record, key)
    return int(value) if value is not None and 0 <= value < 1e15 else None


def _wholes(values: object) -> list[int]:
    items = values if isinstance(values, list) else []
    return [number_of for k in range(len(items)) if (number_of := _whole({"": items[k]}, "")) is not None]


def write_data_page(folder: Path) -> Path:
    """Write `report.html` into the data folder from its `statistics.json`, and return where it is.

    Raises:
        DataError: `statistics.json` is missing, broken, or of a newer format.
        StorageError: The page cannot be written.
    """
    out = folder / "report.html"
    record = read_json(folder / "statistics.json")
    write_text_atomic(out, data_page(record, folder.resolve().name))
    return out


def data_page(record: Mapping[str, Any], name: str) -> str:
    """Return the page of a data folder called `name` as one HTML document.

    Domains stand in the order of their size everywhere, the largest first.
    """
    domains = [_Domain(key, mapping(value)) for key, value in mapping(record.get("domains")).items()]
    domains.sort(key=lambda domain: -domain.tokens)
    whole = _together(domains)
    main = join(
        _glance(domains, whole),
        _domain_tables(record, domains, whole),
        _each_domain(domains, whole),
        _preparation(record),
    )
    footer = tag("p", f"Drawn from statistics.json in the folder {clip(name, 80)}.")
    return str(page(f"{clip(name, 80)} \u2013 Scion data", _header(record, name, len(domains), whole), main, footer))


def _of(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def _header(record: Mapping[str, Any], name: str, num_domains: int, whole: _Domain) -> Markup:
    held_out = whole.kept("num_tokens", "held_out")
    tokenizer = text(mapping(record.get("tokenizer")), "name")
    lead = tag(
        "p",
        tag("strong", f"{count(whole.tokens)}\u00a0tokens", class_="child"),
        f" from {_of(whole.kept('num_documents'), 'document')} in {_of(num_domains, 'domain')}",
        [", with the tokenizer of ", name_of(tokenizer)] if tokenizer else None,
        ".",
        class_="lead",
    )
    said = (
        f"{count(held_out)} tokens are held out: no training step sees these, so that a model can be measured on them."
    )
    verdict = tag("p", said, class_="verdict") if held_out else None
    eyebrow = tag("div", _sheets(), tag("span", "Scion data report"), class_="eyebrow")
    return join(eyebrow, tag("h1", name_of(name)), lead, verdict)


def _sheets() -> Markup:
    """The mark of a data page: sheets on a pile."""
    outline = "M12 3L21 7.5L12 12L3 7.5ZM3 12L12 16.5L21 12M3 16.5L12 21L21 16.5"
    return tag("svg", tag("path", d=outline), viewBox="0 0 24 24", class_="sprout", aria_hidden="true")


def _glance(domains: Sequence[_Domain], whole: _Domain) -> Markup:
    tokens, held_out = whole.tokens, whole.kept("num_tokens", "held_out")
    pairs = (
        (count(tokens), "tokens, separators included"),
        (count(held_out), f"held-out tokens{f', {percent(held_out / tokens)}' if tokens else ''}"),
        (count(whole.kept("num_documents")), "documents"),
        (size(whole.kept("num_bytes")), "of text"),
        (f"{len(domains):,}", "domain" if len(domains) == 1 else "domains"),
    )
    tiles = tag("dl", [tag("div", tag("dt", what), tag("dd", shown)) for shown, what in pairs], class_="tiles")
    return section("glance", "At a glance", tiles, _share_figure(domains, tokens))


def _share_figure(domains: Sequence[_Domain], tokens: int) -> Markup | None:
    if not tokens:
        return None
    bars = list(domains[:_MAX_BARS])
    others = _together(domains[_MAX_BARS:])
    if others.tokens:
        bars.append(_Domain(f"{_of(len(domains) - _MAX_BARS, 'smaller domain')} together", others.record))
    shares = [_share(bar, tokens) for bar in bars]
    described = "; ".join(f"{clip(share.name, 40)} {share.shown}" for share in shares)
    caption = Caption("shares", "Tokens by domain", f"Bars: {described}.")
    note = (
        "What is in the folder. How often a domain is seen in training is another matter: "
        "the mixture in the recipe decides it."
    )
    names = ("for training", "held out")
    picture = responsive(caption, lambda named, width: share_bars(named, width, shares, names))
    return card(picture, note, "Tokens by domain")


def _share(domain: _Domain, tokens: int) -> Share:
    train, held_out = (domain.kept("num_tokens", split) for split in _SPLITS)
    return Share(domain.name, train, held_out, f"{percent(domain.tokens / tokens)} \u00b7 {count(domain.tokens)}")


def _domain_tables(record: Mapping[str, Any], domains: Sequence[_Domain], whole: _Domain) -> Markup:
    """What is kept and what was left out: two tables, as one of so many columns would not fit on the page."""
    if not domains:
        return section("domains", "Domains", tag("p", "No domain is recorded in statistics.json."))
    read_row = partial(_read_row, searched=bool(mapping(record.get("dedupe"))))
    tables = (
        ("kept", "What is in the folder, largest domain first", _KEPT, _kept_row),
        ("read", "What was read and left out", _READ, read_row),
    )
    drawn: list[Content] = []
    for name, caption, header, row in tables:
        groups = [RowGroup(None, [[tag("b", cell) for cell in row(whole)]])] if len(domains) > 1 else []
        groups.append(RowGroup(None, [row(domain) for domain in domains]))
        drawn.append(table(f"{name}-table", caption, header, groups))
    return section("domains", "Domains", drawn, _glossary(record))


def _kept_row(domain: _Domain) -> list[Content]:
    record = domain.record
    parts = (("num_documents",), ("num_tokens", "train"), ("num_tokens", "held_out"), ("num_bytes",))
    ratios = (nats(number(record, "bytes_per_token")), nats(number(record, "gzip_ratio")))
    return [_broken(domain.name), *(exact(domain.kept(*part)) for part in parts), *ratios]


def _read_row(domain: _Domain, searched: bool) -> list[Content]:
    record = domain.record
    found = mapping(record.get("duplicates"))
    skipped = mapping(record.get("skipped"))
    reasons = {reason: number_of for reason in skipped if (number_of := _whole(skipped, reason))}
    limit = text(record, "limit")
    return [
        _broken(domain.name),
        *(exact(_whole(record, key)) for key in _SUMMED),
        *(exact(_whole(found, key)) if searched else NONE for key in ("exact", "near")),
        exact(sum(reasons.values())),
        _why(reasons),
        _stack(textwrap.wrap(clip(limit, 80), 14)) if limit else NONE,
    ]


def _why(reasons: Mapping[str, int]) -> Content:
    lines: list[Content] = [[f"{number_of:,} ", name_of(reason, 24)] for reason, number_of in reasons.items()]
    if len(lines) > _MAX_REASONS:
        lines[_MAX_REASONS:] = [f"{len(lines) - _MAX_REASONS} more reasons"]
    return _stack(lines) if lines else NONE


def _broken(name: str) -> Markup:
    """A name on lines of a width that leaves room for the columns beside it, on a phone too."""
    return tag("bdi", _stack(textwrap.wrap(clip(name, 80), 20) or [name]))


def _stack(lines: Iterable[Content]) -> Markup:
    return join([[tag("br") if k else None, part] for k, part in enumerate(lines)])


def _glossary(record: Mapping[str, Any]) -> Markup:
    """The columns in a line or two each, for those who meet them for the first time."""
    tokenizer = mapping(record.get("tokenizer"))
    separator, bos = text(tokenizer, "separator"), text(tokenizer, "bos")
    mark: Content = [" (", tag("code", clip(separator, 40)), ")"] if separator else None
    opening: Content = ["; so does the one that opens each (", tag("code", clip(bos, 40)), ")"] if bos else None
    words: tuple[tuple[str, Content], ...] = (
        (
            "Train and held-out tokens",
            [
                "A token is the piece of text that a model reads and predicts at a time. A separator token",
                mark,
                " follows each document and counts as a token",
                opening,
                ". Held-out documents are kept out of training; the loss on them says how a model does on new text.",
            ],
        ),
        (
            "Bytes per token",
            "How much text one token carries: how well the tokenizer fits this text. Where it is low, a model needs "
            "more tokens for the same text. Compare like with like: many scripts take two or three bytes a letter.",
        ),
        (
            "gzip ratio",
            "The bytes of a sample of the text, divided by what gzip makes of them: how repetitive the text is. A "
            "domain far above its like often holds boilerplate or copies, and teaches less than its size says.",
        ),
        (
            "Duplicates, skipped, limit",
            "Documents that were read and are not in the folder: copies of another one, and those that were of no use, "
            "with the reason. A limit is where reading a domain was cut short.",
        ),
    )
    entries = [tag("div", tag("h3", term), tag("p", meaning, class_="note")) for term, meaning in words]
    return tag("div", entries, class_="columns card")


def _each_domain(domains: Sequence[_Domain], whole: _Domain) -> Markup | None:
    if not domains:
        return None
    span = shared_span(domain.lengths for domain in domains)
    note = (
        "How long the documents are, and how some of them begin. A bar counts the documents of a length; each step "
        "along the axis doubles it. The thin line over the bars holds the middle 90% of the documents, the thick one "
        f"the middle half, the point is the median{'. All domains are on the same axis' if len(domains) > 1 else ''}."
    )
    parts = [_domain_part(k, domain, whole.tokens, span) for k, domain in enumerate(domains[:_MAX_PARTS])]
    left_out = len(domains) - len(parts)
    more = f"{_of(left_out, 'smaller domain')}: see the tables." if left_out > 0 else None
    return section("each", "Domain by domain", tag("p", note, class_="note"), parts, more)


def _domain_part(k: int, domain: _Domain, tokens: int, span: tuple[float, float]) -> Markup:
    body: list[Content] = [_amounts(domain, tokens), _lengths(k, domain, span)]
    body.append(_samples(domain, _MAX_SAMPLES if k < _OPEN_DOMAINS else _OPEN_SAMPLES))
    if k < _OPEN_DOMAINS:
        return tag("article", tag("h3", name_of(domain.name)), body, class_="card")
    return tag("details", tag("summary", name_of(domain.name), f", {_of(domain.tokens, 'token')}"), body)


def _amounts(domain: _Domain, tokens: int) -> Markup:
    parts = [
        f"{domain.kept('num_tokens', split):,} {word} tokens in {_of(domain.kept('num_documents', split), 'document')}"
        for split, word in _SPLITS.items()
    ]
    share = f"{percent(domain.tokens / tokens)} of all tokens: " if tokens else ""
    limit = text(domain.record, "limit")
    cut: Content = [" Cut short at ", tag("bdi", clip(limit, 80)), "."] if limit else None
    text_bytes = f"; {_of(domain.kept('num_bytes'), 'byte')} of text."
    return tag("p", f"{share}{'; '.join(parts)}", text_bytes, cut, class_="note")


def _lengths(k: int, domain: _Domain, span: tuple[float, float]) -> Markup:
    data = domain.lengths
    described = "; ".join(f"{bin_name(low, high)}: {number_of:,}" for low, high, number_of in data.bins())
    title = f"Lengths of the documents of {clip(domain.name, 40)}"
    caption = Caption(f"lengths-{k}", title, f"Documents by number of tokens. {described or 'None recorded'}.")
    draw = partial(histogram, data=data, span=span, names=("tokens in a document", "documents"))
    # Beside the percentiles there is half the page, on a phone a little less than its width.
    picture = responsive(caption, lambda named, width: draw(named, 430 if width > 600 else 300))
    pairs = [
        (said, _of(data.percentiles[key], "token")) for key, said in _PERCENTILES.items() if key in data.percentiles
    ]
    return tag("div", tag("figure", picture), facts(pairs) if pairs else None, class_="columns")


def _samples(domain: _Domain, most: int) -> Content:
    stored = domain.record.get("samples")
    samples = [mapping(sample) for sample in stored[:most]] if isinstance(stored, list) else []
    blocks = [_sample(sample) for sample in samples]
    folded = blocks[_OPEN_SAMPLES:]
    more = tag("details", tag("summary", _of(len(folded), "more document")), folded) if folded else None
    return [blocks[:_OPEN_SAMPLES], more]


def _sample(sample: Mapping[str, Any]) -> Markup:
    whole = sample.get("text")
    whole = whole if isinstance(whole, str) else ""
    split = _SPLITS.get(str(sample.get("split")), "")
    num_tokens, num_bytes = _whole(sample, "num_tokens"), _whole(sample, "num_bytes")
    about = [_of(num_tokens, "token")] if num_tokens is not None else []
    about += [_of(num_bytes, "byte")] if num_bytes is not None else []
    begin = "\n".join(whole.split("\n", _MAX_LINES)[:_MAX_LINES])[:_MAX_TEXT].rstrip()
    cut = len(whole.encode("utf-8", "replace")) < (num_bytes or 0) or len(begin) < len(whole.rstrip())
    shown: Content = begin if begin.strip() else tag("span", "(blank)", class_="soft")
    # On a line of its own where the next line is what was cut off.
    rest = "\n\u2026" if whole.startswith("\n", len(begin)) else "\u2026"
    goes_on = tag("span", rest, class_="soft") if cut else None
    said = f"A {split} document".replace("  ", " ") + "".join(f", {part}" for part in about)
    return join(
        tag("p", said + (". It begins:" if cut else ":"), class_="note"),
        tag("pre", tag("code", shown, goes_on), class_="command", dir="auto"),
    )


def _preparation(record: Mapping[str, Any]) -> Markup:
    tokenizer, held_out = mapping(record.get("tokenizer")), mapping(record.get("held_out"))
    dtype = text(tokenizer, "dtype")
    width = {"uint16": ", 2 bytes a token", "uint32": ", 4 bytes a token"}.get(dtype or "", "")
    bos = text(tokenizer, "bos")
    about: list[tuple[Content, Content]] = [
        ("name", name_of(text(tokenizer, "name") or NOT_RECORDED)),
        ("vocabulary", exact(_whole(tokenizer, "vocab_size"))),
        ("after each document", tag("code", clip(text(tokenizer, "separator") or NOT_RECORDED, 40))),
        ("before each document", tag("code", clip(bos, 40)) if bos else "nothing"),
        ("stored as", [clip(dtype, 20), width] if dtype else None),
    ]
    fraction, least = number(held_out, "fraction"), _whole(held_out, "min_documents")
    rules: list[tuple[Content, Content]] = [
        ("held out of each domain", f"{fraction * 100:g}% of the documents" if fraction is not None else NOT_RECORDED),
        ("but at least", _of(least, "document") if least is not None else None),
        *_dedupe_rules(record),
    ]
    columns = [tag("div", tag("h3", title), facts(pairs)) for title, pairs in (("Tokenizer", about), ("Rules", rules))]
    return section("preparation", "How it was prepared", tag("div", columns, class_="columns"))


def _dedupe_rules(record: Mapping[str, Any]) -> list[tuple[Content, Content]]:
    dedupe = mapping(record.get("dedupe"))
    if not dedupe:
        return [("duplicates", "not looked for")]
    method, threshold = text(dedupe, "method"), number(dedupe, "threshold")
    known = {"exact": "equal texts", "near": "equal and nearly equal texts"}
    return [
        ("duplicates removed", known.get(method or "", name_of(method or NOT_RECORDED, 40))),
        ("nearly equal from a similarity of", f"{threshold:g}" if threshold is not None else None),
        ("compared", "across all domains" if dedupe.get("across") is True else "within each domain"),
    ]
