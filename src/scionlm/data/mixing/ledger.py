"""The consumption ledger: which samples a run has trained on, in order, in a few lines.

RUN/ledger.jsonl holds what the run's sample plan is made of (data, its fingerprint, seed, packing) and every phase of
weights that was in force, with the number of slots consumed. The plan is a pure function of these, so that any sample
of the run, and their order, can be had again exactly.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import JsonlWriter, Record, read_jsonl
from scionlm.data.folder import DataFolder
from scionlm.data.mixing.chooser import Chooser
from scionlm.data.mixing.mixture import demand_from_json
from scionlm.data.mixing.plan import Order, Place, Sample, SamplePlan, places_of

LEDGER = "ledger.jsonl"


class Ledger:
    """Writes the ledger of a run as it goes.

    Args:
        path: RUN/ledger.jsonl; None writes nothing.
        facts: What the plan is made of; see `plan_facts`.
    """

    def __init__(self, path: Path | None, facts: Record) -> None:
        self._writer = JsonlWriter(path, "ledger")
        self._facts = facts

    def rewind(self, step: int) -> None:
        """Go on after a checkpoint, or begin with step -1."""
        self._writer.rewind(step)
        if step < 0:
            self._writer.write({"step": 0, "plan": self._facts})

    def record(self, step: int, plan: SamplePlan) -> None:
        """Write down what has been consumed up to a step."""
        self._writer.write(
            {"step": step, "slots": plan.slot, "counts": plan.state()["counts"], "phases": plan.new_phases()}
        )

    def flush(self) -> None:
        """Bring what was written to the disk; see `JsonlWriter.flush`."""
        self._writer.flush(sync=True)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def plan_facts(
    data: DataFolder, domains: list[str], order: Order, replay: Record | None, start: dict[str, int] | None = None
) -> Record:
    """Return what a plan is made of, but for the weights, as a ledger records it.

    Args:
        data: The data folder.
        domains: Those of the mixture, in order.
        order: Of the samples.
        replay: What is replayed from where, if anything is.
        start: How many samples of each domain were taken before.
    """
    return {
        "data": str(data.path),
        "fingerprint": data.fingerprint,
        "domains": domains,
        "order": asdict(order),
        "replay": replay,
        "start": start or {},
    }


@dataclass(frozen=True)
class Consumed:
    """What a run trained on.

    Attributes:
        data: The data folder.
        places: Where the windows of each domain are, and the key of their order.
        counts: How many samples of each domain were consumed; what the run replayed itself does not count.
        start: How many had been taken before; the run's own come after them.
        phases: The weights that were in force, each from a slot on.
        names: What the phases' weights are of, in order.
        seq_len: Predicted tokens in a sample.
    """

    data: DataFolder
    places: dict[str, Place]
    counts: dict[str, int]
    phases: list[Record]
    names: list[str]
    seq_len: int
    start: dict[str, int] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """How many samples were consumed."""
        return sum(self.counts.values())

    def samples(self) -> "ConsumedSamples":
        """Return the samples in their original order."""
        return ConsumedSamples(self)


class ConsumedSamples:
    """Goes through the samples of a run in the order in which it took them."""

    def __init__(self, consumed: Consumed) -> None:
        self._consumed = consumed
        self._counts = dict.fromkeys(consumed.counts, 0)
        self._slot = 0
        self._open(0, [0] * len(consumed.names))

    def _open(self, phase: int, counts: list[int]) -> None:
        self._phase = phase
        self._chooser = Chooser(demand_from_json(self._consumed.phases[phase]), counts)

    def __next__(self) -> Sample:
        phases, names = self._consumed.phases, self._consumed.names
        while True:
            while self._phase + 1 < len(phases) and phases[self._phase + 1]["slot"] <= self._slot:
                self._open(self._phase + 1, [0] * len(names))
            name = names[self._chooser.next()]
            self._slot += 1
            if name in self._counts:
                self._counts[name] += 1
                return Sample(name, self._consumed.start.get(name, 0) + self._counts[name] - 1)

    def state(self) -> Record:
        """Return what is needed to go on."""
        return {
            "slot": self._slot,
            "counts": dict(self._counts),
            "phase": self._phase,
            "phase_counts": self._chooser.counts,
        }

    def restore(self, state: Record) -> None:
        """Go on from a state."""
        self._slot, self._counts = state["slot"], dict(state["counts"])
        self._open(state["phase"], list(state["phase_counts"]))


def read_consumed(run: Path, data: DataFolder | None = None) -> Consumed:
    """Return what the run in a folder trained on.

    Args:
        run: A run folder with a ledger.
        data: Where its data folder is now; None takes it from where the run had it.

    Raises:
        UsageError: There is no ledger, or the data folder is not there.
        DataError: The ledger is broken, or the data are not those of the run.
    """
    path = run / LEDGER
    if not path.is_file():
        stages = sorted(folder.parent.name for folder in run.glob(f"stages/*/{LEDGER}"))
        if stages:
            raise UsageError(f"{run} has a ledger for each of its stages: give {run}/stages/NAME ({', '.join(stages)})")
        raise UsageError(f"{run} has no {LEDGER}: not a run folder, or one that has not trained yet")
    lines = read_jsonl(path)
    try:
        facts: dict[str, Any] = next(line["plan"] for line in lines if "plan" in line)
        order, names = Order(**facts["order"]), list[str](facts["domains"])
        records = [line for line in lines if "slots" in line]
        all_counts: dict[str, int] = records[-1]["counts"]
        begun = {phase["slot"]: phase for line in records for phase in line["phases"]}
        phases = [begun[slot] for slot in sorted(begun)]
        demands = [demand_from_json(phase) for phase in phases]
        if phases[0]["slot"] != 0 or any(demand.num_domains != len(all_counts) for demand in demands):
            raise ValueError("a first phase, and a weight for each domain")
        start = {name: int(facts.get("start", {}).get(name, 0)) for name in names}
        counts = {name: int(all_counts[name]) - start[name] for name in names}
    except (StopIteration, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} is broken, or of a run that has not trained yet") from error
    folder = data or DataFolder(Path(facts["data"]))
    if folder.fingerprint != facts["fingerprint"]:
        raise DataError(f"{folder.path} is not the data that {run} was trained on; give replay.data where they are")
    return Consumed(
        folder, _places(folder, names, order), counts, phases, list(all_counts),
        order.seq_len, start,
    )  # fmt: skip


def _places(data: DataFolder, domains: list[str], order: Order) -> dict[str, Place]:
    return places_of({name: data.stream(name, "train") for name in domains}, order)


def as_consumed(data: DataFolder, order: Order, domains: list[str] | None = None) -> Consumed:
    """Return domains of a data folder as if a run had gone through each of them once: a proxy for earlier data.

    Args:
        data: The folder.
        order: Of the windows.
        domains: Which of its domains; None takes all.
    """
    names = domains or data.domains
    places = _places(data, names, order)
    counts = {name: place.windows.num_windows for name, place in places.items()}
    phase = {"slot": 0, "weights": list(counts.values())}
    return Consumed(data, places, counts, [phase], names, order.seq_len)
