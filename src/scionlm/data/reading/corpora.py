"""CORPORA.yaml: which files make up which domain, and how they are tokenized and split."""

from pathlib import Path

from pydantic import Field, field_validator

from scionlm.core.config import Section, load_yaml, validate
from scionlm.core.files import is_safe_name

_RESERVED = ("tokenizer", "index.json", "prepare.json")


class DomainConfig(Section):
    """One domain: its files."""

    paths: list[str] = Field(min_length=1)
    """Files, folders or patterns (`**` crosses folders), relative to CORPORA.yaml. A `.jsonl` line is a document; any
    other file is one document. `.gz` and `.zst` are unpacked on the way."""
    text_key: str = "text"
    """Field of a `.jsonl` line that holds the text."""


class HeldOut(Section):
    """The part of each domain that is never trained on, chosen by document."""

    fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share of the documents."""
    min_documents: int = Field(default=20, ge=1)
    """At least so many, but never more than half of a domain."""


class Corpora(Section):
    """The whole of CORPORA.yaml."""

    tokenizer: str
    """A MODEL whose tokenizer is used."""
    domains: dict[str, DomainConfig] = Field(min_length=1)
    """Name of each domain to its files."""
    held_out: HeldOut = HeldOut()
    """How the held-out split is chosen."""
    separator: str | None = None
    """Token after every document; null takes the tokenizer's own end of text."""

    @field_validator("domains")
    @classmethod
    def _names_are_folder_names(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name in domains:
            if name in _RESERVED:
                raise ValueError(f"domain name {name!r} is one that the data folder uses itself; choose another")
            if not is_safe_name(name):
                raise ValueError(f"domain name {name!r} must be letters, digits, '.', '_', '-' (it names a folder)")
        return domains


def load_corpora(path: Path) -> Corpora:
    """Read and check CORPORA.yaml.

    Raises:
        UsageError: It is absent, not YAML, or a key or value is wrong.
    """
    return validate(Corpora, load_yaml(path), str(path))
