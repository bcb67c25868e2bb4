"""What is to be prepared: corpora with their files found and cut into parts, and where the work in progress lies."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from scionlm.data.reading.corpora import Corpora, DomainConfig
from scionlm.data.reading.documents import Problems, Reader
from scionlm.data.reading.files import DataFile, find_files, parts_of
from scionlm.data.shards import TokenizerInfo

WORK = ".prepare"
UNIT_BYTES = 2**25  # text that a shard is made of; also what a kill can cost


@dataclass(frozen=True)
class Part:
    """Some consecutive files of a domain: what one process works on at a time.

    Attributes:
        domain: Name of the domain.
        number: Place among the domain's parts.
        files: The files.
        folder: OUT.
    """

    domain: str
    number: int
    files: list[DataFile]
    folder: Path

    @property
    def name(self) -> str:
        """A name that no other part of the job has."""
        return f"{self.domain}/{self.number:05d}"

    def path(self, kind: str) -> Path:
        """Return where something that is known of this part is kept while the work lasts."""
        return self.folder / WORK / self.domain / f"{self.number:05d}.{kind}"


@dataclass(frozen=True)
class Job:
    """One run of `scion prepare`.

    Attributes:
        corpora: What is asked for.
        out: The data folder.
        parts: The parts of each domain.
        surveyed: Documents and bytes of parts whose surveys are there, by name, as far as somebody has asked.
    """

    corpora: Corpora
    out: Path
    parts: dict[str, list[Part]] = field(default_factory=dict)
    surveyed: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, corpora: Corpora, root: Path, out: Path) -> "Job":
        """Find the files and cut them into parts.

        Raises:
            DataError: A path or pattern matches no file.
            UsageError: A pattern is not one.
        """
        parts = {
            name: [Part(name, i, files, out) for i, files in enumerate(parts_of(find_files(domain, root, name)))]
            for name, domain in corpora.domains.items()
        }
        return cls(corpora, out, parts)

    def domain(self, part: Part) -> DomainConfig:
        """Return the settings of a part's domain."""
        return self.corpora.domains[part.domain]

    def reader(self, part: Part, quiet: bool) -> Reader:
        """Return what takes documents out of a part's files."""
        problems = Problems(self.corpora.actions(part.domain), quiet)
        return Reader(self.domain(part).text_key, self.corpora.max_document_bytes, problems)

    def identity(self, info: TokenizerInfo) -> str:
        """Return a hash of all that decides the bytes of the result, but for the text itself."""
        corpora = self.corpora.model_dump(mode="json", exclude={"tokenizer": True, "domains": {"__all__": {"paths"}}})
        sizes = {name: [[file.size for file in part.files] for part in parts] for name, parts in self.parts.items()}
        facts = info.to_dict() | {"name": None}  # the same tokenizer by another path is the same
        return hashlib.sha256(json.dumps([corpora, sizes, facts, UNIT_BYTES], sort_keys=True).encode()).hexdigest()
