"""CORPORA.yaml: which files make up which domain, and how they are read, split and tokenized."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from scionlm.core.config import Section, load_yaml, validate
from scionlm.core.files import is_safe_name
from scionlm.core.quantities import Count

_RESERVED = ("tokenizer", "index.json", "prepare.json", "statistics.json", "report.html")

Problem = Literal["empty", "encoding", "length", "json", "field", "broken"]
Action = Literal["stop", "skip"]
_DEFAULT_ACTIONS: dict[Problem, Action] = {
    "empty": "skip",  # an empty __init__.py is nobody's mistake
    "encoding": "stop",
    "length": "stop",
    "json": "stop",
    "field": "stop",
    "broken": "stop",
}


def _every_problem(value: Any) -> Any:
    return dict.fromkeys(_DEFAULT_ACTIONS, value) if isinstance(value, str) else value


def _with_defaults(value: Any) -> Any:
    return _DEFAULT_ACTIONS | value if isinstance(value, dict) else _every_problem(value)


Actions = dict[Problem, Action]


class DomainConfig(Section):
    """One domain: its files."""

    paths: list[str] = Field(min_length=1)
    """Files, folders or patterns (`**` crosses folders), relative to CORPORA.yaml, or
    `hf://datasets/ORG/NAME[@REVISION]/PATTERN` for files of a data set on the hub. A line of a `.jsonl` or a row of a
    `.parquet` is a document; any other file is one document, but for `.json`, which is refused. `.gz` and `.zst` are
    unpacked on the way."""
    text_key: str = "text"
    """Field of a `.jsonl` line, or column of a `.parquet`, that holds the text."""
    max_documents: Count | None = None
    """Read no more than so many documents, in the order of the files; null reads all."""
    max_tokens: Count | None = None
    """Train on no more than so many tokens, the first documents of the files; null trains on all."""
    on_error: Annotated[Actions | None, BeforeValidator(_every_problem)] = None
    """What to do about a document that cannot be used; problems that are not named, and null, as for all domains."""


class HeldOut(Section):
    """The part of each domain that is never trained on, chosen by document."""

    fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share of the documents."""
    min_documents: int = Field(default=20, ge=1)
    """At least so many, but never more than half of a domain."""


class Dedupe(Section):
    """Which documents are left out because an earlier one is the same, or nearly."""

    method: Literal["exact", "near"] = "exact"
    """`exact`: the same text. `near`: also what shares most of its phrases with an earlier document."""
    across: bool = True
    """Also between domains; the first in the order of CORPORA.yaml stays."""
    threshold: float = Field(default=0.8, gt=0.3, lt=1)
    """`near`: estimated share of common phrases (Jaccard) from which on two documents are nearly the same."""


def _method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class Corpora(Section):
    """The whole of CORPORA.yaml."""

    tokenizer: str | None = None
    """A MODEL whose tokenizer is used, or a folder of one: beside CORPORA.yaml, else in the working directory. Only
    `train-tokenizer` can do without."""
    domains: dict[str, DomainConfig] = Field(min_length=1)
    """Name of each domain to its files."""
    held_out: HeldOut = HeldOut()
    """How the held-out split is chosen."""
    dedupe: Annotated[Dedupe | None, BeforeValidator(_method)] = None
    """`exact`, `near`, or a section of its own; null keeps every document."""
    separator: str | None = None
    """Token after every document; null takes the tokenizer's own end of text."""
    bos: str | None = None
    """Token before every document; null puts none."""
    on_error: Annotated[Actions, BeforeValidator(_with_defaults)] = Field(
        default_factory=lambda: dict(_DEFAULT_ACTIONS)
    )
    """What to do about a document that cannot be used: `stop` or `skip` (and count), for all or by problem: `empty`,
    `encoding` (not UTF-8), `length`, `json`, `field` (no text where it should be), `broken` (a packed file)."""
    max_document_bytes: Count = 2**28
    """A longer line or file is no document but a mistake."""

    @field_validator("domains")
    @classmethod
    def _names_are_folder_names(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name in domains:
            if name in _RESERVED:
                raise ValueError(f"domain name {name!r} is one that the data folder uses itself; choose another")
            if not is_safe_name(name):
                raise ValueError(f"domain name {name!r} must be letters, digits, '.', '_', '-' (it names a folder)")
        return domains

    def actions(self, domain: str) -> dict[Problem, Action]:
        """Return what to do about each problem in a domain."""
        return self.on_error | (self.domains[domain].on_error or {})


def load_corpora(path: Path) -> Corpora:
    """Read and check CORPORA.yaml.

    Raises:
        UsageError: It is absent, not YAML, or a key or value is wrong.
    """
    return validate(Corpora, load_yaml(path), str(path))
