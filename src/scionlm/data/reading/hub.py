"""Files of data sets on the Hugging Face hub: listed at one revision, fetched one by one when they are read."""

import re
from dataclasses import dataclass
from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.sources.hub import hub_errors

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", re.ASCII)
_TEXT = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.txt", "*.txt.gz", "*.txt.zst")


@dataclass(frozen=True)
class HubFile:
    """One file of a data set at a revision."""

    repo: str
    revision: str
    name: str
    size: int

    @property
    def address(self) -> str:
        """The file's address, with the commit it was listed at."""
        return f"hf://datasets/{self.repo}@{self.revision}/{self.name}"

    def fetch(self) -> Path:
        """Return the file in the hub's cache, fetching it once.

        Raises:
            StorageError: The hub cannot be reached.
        """
        from huggingface_hub import hf_hub_download

        with hub_errors(f"data set file {self.address}", "fetch it beforehand"):
            path = hf_hub_download(self.repo, self.name, repo_type="dataset", revision=self.revision, etag_timeout=4)
        return Path(path)


def hub_dataset(path: str) -> str | None:
    """Return the data set, as ORG/NAME, that a path of `hf://datasets/` names; None for any other."""
    match = _ADDRESS.fullmatch(path)
    return match[1] if match else None


def hub_files(address: str, domain: str) -> list[HubFile]:
    """Return the files that `hf://datasets/ORG/NAME[@REVISION]/PATTERN` stands for.

    `*` also crosses folders. Without a pattern, or with a folder, every file of text in it.

    Raises:
        UsageError: The address is not one.
        DataError: There is no such data set, or no file matches.
        StorageError: The hub cannot be reached.
    """
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise UsageError(f"domains.{domain}.paths: {address!r} must be hf://datasets/ORG/NAME[@REVISION]/PATTERN")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    repo, revision, pattern = match[1], match[2], match[3] or ""
    with hub_errors(f"data set {repo!r}", "give local files instead"):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if pattern in sizes or "*" in pattern:
        patterns = [pattern]
    else:
        folder = pattern.rstrip("/") + "/" if pattern else ""
        patterns = [folder + text for text in _TEXT]
    names = sorted(filter_repo_objects(list(sizes), allow_patterns=patterns))
    if not names:
        raise DataError(f"domains.{domain}.paths: {address!r} matches none of the {len(sizes)} files of the data set")
    return [HubFile(repo, str(info.sha), name, sizes[name]) for name in names]
