"""The first pass: every document is read once, so that faults are found before hours are spent.

What is kept of a document is a hash that places it between 0 and 2**64 by its text alone, its size, and, where nearly
equal ones are looked for, its signature.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from scionlm.core.errors import DataError, StoppedError
from scionlm.core.files import write_bytes_atomic
from scionlm.core.log import Progress
from scionlm.core.signals import StopRequest
from scionlm.data.preparing.job import Job, Part
from scionlm.data.preparing.near import Signatures

BYTES_PER_TOKEN = 8  # more than text has: how much is read at most for a limit in tokens
DOCUMENTS_PER_HELD_OUT = 10  # and how many documents, so that those held out are not most of them
_KIND = "survey"


@dataclass(frozen=True)
class Survey:
    """What is known of the documents of a part, in their order.

    Attributes:
        places: Hash of each text, `[documents]`, uint64.
        sizes: UTF-8 bytes of each text, `[documents]`, int64.
        skipped: Documents that could not be used, by kind of problem.
        changed_ns: When each file was changed last.
        is_whole: Whether the files were read to their end, and not to a limit.
    """

    places: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    skipped: Counter[str]
    changed_ns: list[int]
    is_whole: bool

    @property
    def digest(self) -> str:
        """A hash of all texts in order."""
        return hashlib.sha256(self.places.tobytes() + self.sizes.tobytes()).hexdigest()


def place_of(text_bytes: bytes) -> int:
    """Return where a document falls between 0 and 2**64, by its text alone."""
    return int.from_bytes(hashlib.blake2b(text_bytes, digest_size=8).digest(), "big")


def reaches_limit(job: Job, domain: str, num_documents: int, num_bytes: int) -> bool:
    """Return whether so much of a domain is enough for its limits.

    For a limit in tokens there must be text for them beside what is held out, also where documents are long and few.
    """
    config, held_out = job.corpora.domains[domain], job.corpora.held_out
    if config.max_documents is not None and num_documents >= config.max_documents:
        return True
    enough = num_documents >= DOCUMENTS_PER_HELD_OUT * held_out.min_documents
    return config.max_tokens is not None and enough and num_bytes >= BYTES_PER_TOKEN * config.max_tokens


def survey_part(job: Job, part: Part, stop: StopRequest) -> None:
    """Read a part once and keep what is to be known of its documents.

    Raises:
        StoppedError: A signal came.
        DataError: A document cannot be used, and such are not to be skipped; or the text has changed since an earlier
            survey.
    """
    reader = job.reader(part, quiet=False)
    dedupe = job.corpora.dedupe
    signatures = Signatures() if dedupe and dedupe.method == "near" else None
    places: list[int] = []
    sizes: list[int] = []
    changed = [file.changed_ns for file in part.files]
    is_whole = True
    with Progress(f"reading {part.name}", sum(file.size for file in part.files)) as progress:
        total = shown = 0
        for document in reader.read(part.files):
            data = document.text.encode()
            places.append(place_of(data))
            sizes.append(len(data))
            if signatures is not None:
                signatures.add(document.text)
            total += len(data)
            if total - shown > 2**24:
                shown = total
                if stop.requested:
                    raise StoppedError("stopped; what is finished is kept, run it again to go on")
                progress.update(0, f"{total / 1e6:.0f} MB of text")
            if reaches_limit(job, part.domain, len(places), total):
                is_whole = False
                break
    rows = signatures.matrix() if signatures is not None else np.empty((0, 0), dtype=np.uint32)
    found = Survey(
        np.array(places, dtype=np.uint64),
        np.array(sizes, dtype=np.int64),
        reader.problems.skipped,
        changed,
        is_whole,
    )
    if part.path(_KIND).exists() and read_survey(part).digest != found.digest:
        raise DataError(
            f"{part.files[0].name}: the text has changed since it was first read; remove {part.folder} and prepare it "
            "again"
        )
    header = {"skipped": dict(found.skipped), "changed_ns": changed, "is_whole": is_whole}
    arrays = {"places": found.places, "sizes": found.sizes, "signatures": rows}
    write_bytes_atomic(part.path(_KIND), safetensors.numpy.save(arrays, {"scion": json.dumps(header)}))


def is_surveyed(part: Part) -> bool:
    """Return whether a part was read, and its files have not been touched since."""
    if not part.path(_KIND).exists():
        return False
    header, _ = _read(part)
    return header["changed_ns"] == [file.changed_ns for file in part.files]


def read_survey(part: Part) -> Survey:
    """Return what is known of a part.

    Raises:
        DataError: The file is broken.
    """
    header, arrays = _read(part, "places", "sizes")
    skipped = Counter[str](header["skipped"])
    return Survey(arrays["places"], arrays["sizes"], skipped, header["changed_ns"], header["is_whole"])


def read_signatures(part: Part) -> NDArray[np.uint32]:
    """Return the MinHash of each document of a part, `[documents, permutations]`; no rows where none were wanted.

    Raises:
        DataError: The file is broken.
    """
    return _read(part, "signatures")[1]["signatures"]


def _read(part: Part, *names: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    path = part.path(_KIND)
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:  # pyright: ignore[reportPrivateImportUsage]
            header: dict[str, Any] = json.loads(opened.metadata()["scion"])
            return header, {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is broken; remove {part.folder} and prepare the data again") from error
