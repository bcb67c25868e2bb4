"""The share of each domain in what a run trained on, as its consumption ledgers record it.

RUN/ledger.jsonl, of several stages RUN/stages/NAME/ledger.jsonl, hold the phases of weights that were in force, each
from a slot on, and at every checkpoint how many sequences of each domain had been taken. In every prefix of slots a
domain is within one sequence of its weights, so lines by the phases are what was really taken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scionlm.core.records import read_jsonl
from scionlm.report.values import integer, mapping, number

_MAX_STAGES, _MAX_PHASES = 20, 200
_MOST = 2**53  # sequences, or tokens of one; more is a fault
_LEAST = 1e-3  # a share that moved by less has stayed: weights are rounded to whole sequences

_Record = Mapping[str, Any]


@dataclass(frozen=True)
class Taken:
    """How many sequences of each domain were taken from one record of the ledger to the next, up to `step`."""

    stage: str
    step: int
    seq_len: int
    sequences: Mapping[str, int]


@dataclass(frozen=True)
class Mixing:
    """The shares of a run's domains: as lines over tokens, and as counted.

    Attributes:
        lines: By domain, points of tokens and share.
        taken: In order.
        stages: Where each stage begins, in tokens, and its name; empty where there is one.
    """

    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    taken: Sequence[Taken] = ()
    stages: Sequence[tuple[float, str]] = ()

    @property
    def moves(self) -> bool:
        """Whether the share of a domain was not the same all the time."""
        shares = [[share for _, share in line] for line in self.lines.values()]
        return any(max(line) - min(line) > _LEAST for line in shares if line)


@dataclass(frozen=True)
class _Stage:
    """A ledger as far as it is whole: `phases` are (slot, the record)."""

    name: str
    seq_len: int
    names: Sequence[str]
    slots: int
    phases: Sequence[tuple[int, _Record]]
    taken: Sequence[Taken]

    @property
    def last_step(self) -> int:
        return self.taken[-1].step if self.taken else 0


def read_mixing(folder: Path) -> Mixing:
    """Return the shares that the ledgers of a run in `folder` record; empty where nothing was taken yet.

    Raises:
        DataError: A ledger is broken or of a newer format.
    """
    own = folder / "ledger.jsonl"
    paths = [own] if own.is_file() else sorted(folder.glob("stages/*/ledger.jsonl"))[:_MAX_STAGES]
    # A stage that goes on through the windows of an earlier one has its order, so the folder says which it is.
    read = (_read("main" if path == own else path.parent.name, read_jsonl(path)) for path in paths)
    # Steps are counted through all stages, so they say which came first.
    stages = sorted((one for one in read if one is not None), key=lambda one: one.last_step)
    names = list(dict.fromkeys(name for stage in stages for name in stage.names))
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    begins: list[tuple[float, str]] = []
    tokens = 0.0
    for stage in stages:
        begins.append((tokens, stage.name))
        for slot, shares in _corners(stage):
            for name in names:
                lines[name].append((tokens + slot * stage.seq_len, shares.get(name, 0.0)))
        tokens += stage.slots * stage.seq_len
    taken = [one for stage in stages for one in stage.taken]
    return Mixing(lines, taken, begins if len(begins) > 1 else ())


def _read(name: str, lines: Sequence[_Record]) -> _Stage | None:
    """Return what a ledger holds; None of one in which nothing was taken yet, or that lacks what it needs."""
    facts = next((mapping(line["plan"]) for line in lines if "plan" in line), {})
    seq_len = integer(mapping(facts.get("order")), "seq_len")
    records = [line for line in lines if integer(line, "step") is not None and mapping(line.get("counts"))]
    slots = integer(records[-1], "slots") if records else None
    if not seq_len or not slots or not 0 < seq_len < _MOST or not 0 < slots < _MOST:
        return None
    names = list(mapping(records[-1]["counts"]))
    found: dict[int, _Record] = {}
    for line in records:
        begun = line.get("phases")
        for phase in begun if isinstance(begun, list) else []:
            slot = integer(mapping(phase), "slot")
            if slot is not None and 0 <= slot < slots:
                found[slot] = mapping(phase)  # a resumed run writes the one that it is in again
    if not found:
        return None
    phases = sorted(found.items())[:: -(-len(found) // _MAX_PHASES)]
    return _Stage(name, seq_len, names, slots, phases, list(_taken(name, seq_len, facts, records)))


def _taken(stage: str, seq_len: int, facts: _Record, records: Sequence[_Record]) -> Iterable[Taken]:
    """Return what was taken between records; what other stages took before of the same order does not count."""
    before = mapping(facts.get("start"))
    for line in records:
        counts = mapping(line["counts"])
        sequences = {name: (integer(counts, name) or 0) - (integer(before, name) or 0) for name in counts}
        step = integer(line, "step")
        if step is not None and min(sequences.values()) >= 0 and any(sequences.values()):
            yield Taken(stage, step, seq_len, sequences)
            before = counts


def _corners(stage: _Stage) -> Iterable[tuple[float, Mapping[str, float]]]:
    """Return the shares at the slots between which they are constant, or move on a straight line."""
    ends = [slot for slot, _ in stage.phases[1:]] + [stage.slots]
    for (slot, phase), end in zip(stage.phases, ends, strict=True):
        first, last = (_shares(phase.get(key, phase.get("weights")), stage.names) for key in ("from", "to"))
        way = number(phase, "slots")
        if not first or not last:
            continue
        yield slot, first
        if first == last or way is None or not 0 < way < math.inf:
            yield end, last
            continue
        part = min((end - slot) / way, 1.0)
        yield min(end, slot + way), {name: (1 - part) * first[name] + part * last[name] for name in first}
        if slot + way < end:
            yield end, last


def _shares(weights: object, names: Sequence[str]) -> Mapping[str, float]:
    """Return the shares that weights, in the order of `names`, come to; empty where they are none."""
    values = [number({"": one}, "") for one in weights] if isinstance(weights, list) else []
    known = [value for value in values if value is not None and 0 <= value < math.inf]
    total = sum(known)
    if len(known) != len(names) or len(values) != len(names) or not 0 < total < math.inf:
        return {}
    return {name: value / total for name, value in zip(names, known, strict=True)}
