"""Between the passes: which documents are trained on, which are held out, and which are left out.

The held-out documents of a domain are those whose text hashes lowest, so that the choice depends on nothing but the
texts. A text that is held out in one domain is held out in all: nothing that is measured on was trained on.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.core.files import write_bytes_atomic
from scionlm.core.records import read_json, write_json
from scionlm.data.preparing.job import WORK, Job, Part
from scionlm.data.preparing.near import PERMUTATIONS, near_duplicates
from scionlm.data.preparing.survey import Survey, reaches_limit, read_signatures, read_survey

TRAIN, HELD_OUT, SAME, NEAR = range(4)
_KIND = "fates"
_SETTLED = "settled.json"
_DEVIATIONS = 4  # standard ones, of how many of a share of the documents are chosen
_EXACT_DOCUMENTS = 10_000  # up to so many the split is settled by counting, beyond by the law of large numbers

Fates = NDArray[np.uint8]


def needed_parts(job: Job, domain: str) -> list[Part]:
    """Return the parts that a domain's limits need, as far as their surveys are there; all where there is no limit."""
    config, parts = job.corpora.domains[domain], job.parts[domain]
    if config.max_documents is None and config.max_tokens is None:
        return parts
    documents = size = 0
    for index, part in enumerate(parts):
        if part.name not in job.surveyed:
            if not part.path("survey").exists():
                return parts[: index + 1]
            survey = read_survey(part)
            job.surveyed[part.name] = len(survey.places), int(survey.sizes.sum())
        more = job.surveyed[part.name]
        documents, size = documents + more[0], size + more[1]
        if reaches_limit(job, domain, documents, size):
            return parts[: index + 1]
    return parts


def is_settled(job: Job) -> bool:
    """Return whether the fate of every document is known."""
    return (job.out / WORK / _SETTLED).exists()


def settle(job: Job) -> None:
    """Decide the fate of every document, and keep it part by part.

    Raises:
        DataError: A domain has no text, or none that can be split.
    """
    parts = {name: needed_parts(job, name) for name in job.parts}
    for name, mine in parts.items():
        if not any(len(survey.places) for survey in _surveys(mine)):
            raise DataError(f"domains.{name}: the {sum(len(part.files) for part in mine)} file(s) hold no text")
    fates = {
        part.name: _within_limit(job, part, index, mine) for mine in parts.values() for index, part in enumerate(mine)
    }
    _mark_duplicates(job, parts, fates)
    thresholds = {name: _threshold(job, name, _kept_places(mine, fates)) for name, mine in parts.items()}
    held_out = np.unique(
        np.concatenate([
            places[places < thresholds[name]] for name, mine in parts.items() for places in _kept_places(mine, fates)
        ])
    )  # fmt: skip
    for mine in parts.values():
        for part in mine:
            fate = fates[part.name]
            out = np.isin(read_survey(part).places[: len(fate)], held_out)
            fate[out & (fate == TRAIN)] = HELD_OUT
            write_bytes_atomic(part.path(_KIND), safetensors.numpy.save({"fates": fate}))
    facts = {name: _facts(mine, fates, len(job.parts[name])) for name, mine in parts.items()}
    write_json(job.out / WORK / _SETTLED, {"domains": facts})


def _surveys(parts: list[Part]) -> Iterator[Survey]:
    return (read_survey(part) for part in parts)


def _within_limit(job: Job, part: Part, index: int, parts: list[Part]) -> Fates:
    """Return the fates of a part's documents up to the domain's limit, all to be trained on so far."""
    count = len(read_survey(part).places)
    limit = job.domain(part).max_documents
    if limit is not None:
        count = min(count, limit - sum(len(survey.places) for survey in _surveys(parts[:index])))
    return np.zeros(count, dtype=np.uint8)


def _kept_places(parts: list[Part], fates: dict[str, Fates]) -> Iterator[NDArray[np.uint64]]:
    for part in parts:
        fate = fates[part.name]
        yield read_survey(part).places[: len(fate)][fate == TRAIN]


def _mark_duplicates(job: Job, parts: dict[str, list[Part]], fates: dict[str, Fates]) -> None:
    """Mark the documents that an earlier one makes needless; holds what is known of all of them, and little else."""
    dedupe = job.corpora.dedupe
    if dedupe is None:
        return
    groups = [[part for mine in parts.values() for part in mine]] if dedupe.across else list(parts.values())
    for group in groups:
        bounds = np.cumsum([0, *(len(fates[part.name]) for part in group)]).tolist()
        places, sizes = np.empty(bounds[-1], dtype=np.uint64), np.empty(bounds[-1], dtype=np.int64)
        for part, (begin, end) in zip(group, itertools.pairwise(bounds), strict=True):
            survey = read_survey(part)
            places[begin:end], sizes[begin:end] = survey.places[: end - begin], survey.sizes[: end - begin]
        marks = np.zeros(bounds[-1], dtype=np.uint8)
        marks[_repeated(places, sizes)] = SAME
        if dedupe.method == "near":
            del places, sizes
            _mark_near(group, bounds, marks, dedupe.threshold)
        for part, (begin, end) in zip(group, itertools.pairwise(bounds), strict=True):
            fates[part.name][:] = marks[begin:end]


def _mark_near(group: list[Part], bounds: list[int], marks: Fates, threshold: float) -> None:
    first = np.flatnonzero(marks == TRAIN)
    signatures = np.empty((len(first), PERMUTATIONS), dtype=np.uint32)
    filled = 0
    for part, (begin, end) in zip(group, itertools.pairwise(bounds), strict=True):
        mine = read_signatures(part)[: end - begin][marks[begin:end] == TRAIN]
        signatures[filled : filled + len(mine)] = mine
        filled += len(mine)
    marks[first[near_duplicates(signatures, threshold)]] = NEAR


def _repeated(places: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return which documents have the text of an earlier one: the same 64 bits of hash and the same length."""
    order = np.lexsort((sizes, places))  # stable: equal ones stay in the order of the documents
    same = (places[order[1:]] == places[order[:-1]]) & (sizes[order[1:]] == sizes[order[:-1]])
    return order[1:][same]


def _threshold(job: Job, name: str, places: Iterator[NDArray[np.uint64]]) -> int:
    """Return the place below which a domain's documents are held out.

    Raises:
        DataError: There are no two different texts, or most are the same few.
    """
    held_out = job.corpora.held_out
    limit = max(held_out.min_documents, _EXACT_DOCUMENTS)
    share = int(min(held_out.fraction, 0.5) * 2**64)
    # Of more documents than are ranked, so far below half that chance does not take it beyond.
    safe_share = int(min(held_out.fraction, 0.5 - _DEVIATIONS * 0.5 / limit**0.5) * 2**64)
    lowest = np.empty(0, dtype=np.uint64)
    count = below = 0
    for some in places:
        count, below = count + len(some), below + int((some < safe_share).sum())
        lowest = np.sort(np.concatenate([lowest, some]))[:limit]
    ranked: list[int] = lowest.tolist()
    if not ranked or ranked[0] == ranked[-1]:
        what = "one document only" if count < 2 else "all documents have the same text"
        more = " (a .txt is one document: give several files, or a .jsonl with one a line)" if count < 2 else ""
        raise DataError(f"domains.{name}: {what}; a split by document into training and held out needs two{more}")
    least = ranked[min(held_out.min_documents, count // 2) - 1] + 1
    if count <= limit:
        # At most half of the documents; where equal texts leave no such cut, the lowest text alone.
        threshold = min(max(share, least), ranked[count // 2])
        return threshold if threshold > ranked[0] else next(place for place in ranked if place > ranked[0])
    if below > count // 2:
        raise DataError(f"domains.{name}: most documents have the same few texts; remove them with dedupe: exact")
    return max(safe_share, least)


def _facts(parts: list[Part], fates: dict[str, Fates], num_parts: int) -> dict[str, Any]:
    """Return what is to be told of a domain: how much was read, skipped and left out."""
    skipped = sum((survey.skipped for survey in _surveys(parts)), start=Counter[str]())
    counts = sum(np.bincount(fates[part.name], minlength=4) for part in parts).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "num_files": sum(len(part.files) for part in parts),
        "documents_read": sum(counts),
        "skipped": dict(sorted(skipped.items())),
        "duplicates": {"exact": counts[SAME], "near": counts[NEAR]},
        "parts": len(parts),
        "all_read": len(parts) == num_parts and all(survey.is_whole for survey in _surveys(parts)),
    }


def read_fates(part: Part) -> Fates:
    """Return the fates of a part's documents; a part that no limit needs has none."""
    path = part.path(_KIND)
    return safetensors.numpy.load(path.read_bytes())["fates"] if path.exists() else np.empty(0, dtype=np.uint8)


def settled(job: Job) -> dict[str, dict[str, Any]]:
    """Return what is to be told of each domain."""
    return read_json(job.out / WORK / _SETTLED)["domains"]
