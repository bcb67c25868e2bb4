"""Limits in training tokens: how much room a part has, and the shard that a limit cuts through."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scionlm.core.errors import DataError
from scionlm.data.preparing.job import Part
from scionlm.data.preparing.units import is_tokenized, units_of
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

_NO_LIMIT = 2**62


def room_for(part: Part, parts: list[Part], max_tokens: int | None) -> int:
    """Return how many training tokens a part can have at most, by what the parts before it are known to have."""
    if max_tokens is None:
        return _NO_LIMIT
    room = max_tokens
    for before in parts[: part.number]:
        if not is_tokenized(before):
            break
        room -= sum(unit["shards"].get("train", {"num_tokens": 0})["num_tokens"] for unit in units_of(before))
    return max(room, 0)


@dataclass(frozen=True)
class Limited:
    """The shards of a domain up to its limit, by split, and whether the limit cut anything off."""

    shards: dict[str, list[dict[str, Any]]]
    is_cut: bool

    def totals(self, domain: str) -> dict[str, Any]:
        """Return the domain's entry in the index.

        Raises:
            DataError: A split has no documents.
        """
        result: dict[str, Any] = {}
        for split, shards in self.shards.items():
            if not shards:
                raise DataError(f"domains.{domain}: its limits leave no document for the {split} split; raise them")
            sums = {key: sum(shard[key] for shard in shards) for key in ("num_tokens", "num_documents", "num_bytes")}
            result[split] = sums | {"shards": shards}
        return result


def limited(parts: list[Part], max_tokens: int | None, info: TokenizerInfo) -> Limited:
    """Return the shards of a domain: what is held out, and of the rest, in reading order, what there is room for."""
    room = _NO_LIMIT if max_tokens is None else max_tokens
    shards: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    is_cut = False
    for part in parts:
        for unit in units_of(part):
            if "held_out" in unit["shards"]:
                shards["held_out"].append(unit["shards"]["held_out"])
            entry = unit["shards"].get("train")
            if entry is None:
                continue
            if is_cut or entry["num_tokens"] > room:
                entry = None if is_cut else _cut(part, entry, room, info)
                is_cut = True
            if entry is not None:
                shards["train"].append(entry)
                room -= entry["num_tokens"]
    return Limited(shards, is_cut)


def _cut(part: Part, entry: dict[str, Any], room: int, info: TokenizerInfo) -> dict[str, Any] | None:
    """Write a shard's first documents again, up to the one that there is no room for; None where that is the first."""
    folder = part.folder / part.domain
    shard = Shard(folder / entry["file"])
    count = int(np.searchsorted(shard.document_ends, room, side="right"))
    if not count:
        return None
    opening = 0 if info.bos_id is None else 1
    ends = shard.document_ends[:count].tolist()
    documents = [np.asarray(shard.tokens[b + opening : e - 1]) for b, e in zip([0, *ends[:-1]], ends, strict=True)]
    name = entry["file"].replace(".safetensors", "-cut.safetensors")
    return write_shard(folder / name, documents, shard.document_bytes[:count].tolist(), info)
