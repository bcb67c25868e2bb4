"""The sample plan: which window of which domain stands in which slot.

A slot is the place of one sequence in training: step k has slots k*B to (k+1)*B - 1. What stands there is a pure
function of (seed, stage, slot, weights so far); the number of devices, of micro-batches and of stops has no part in it.

Slots are dealt out in phases. Within a phase the demand is known ahead, and in every prefix each domain is within one
sequence of it (`chooser`). New weights begin a new phase; they are rounded to whole sequences of the period they hold
for, and what was rounded away is carried over, so that nothing a domain is owed is ever lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import warn
from scionlm.data.folder import TokenStream
from scionlm.data.mixing.chooser import Chooser, Constant, Demand
from scionlm.data.mixing.mixture import Mixture, Weights, demand_from_json, demand_to_json, rounded_counts
from scionlm.data.mixing.permute import permuted
from scionlm.data.mixing.windows import Batch, PackingName, Page, Windows, open_windows

Exhausted = Literal["repeat", "redistribute", "stop"]

REPLAYED = "replay:"
"""Begins the name of a domain of earlier data; no data folder can have such a name."""


class Sample(NamedTuple):
    """One sequence: the `draw`-th one taken from `domain`."""

    domain: str
    draw: int


class Place(NamedTuple):
    """Where the windows of a domain are, and the key of their order."""

    windows: Windows
    key: str


class Replay(Protocol):
    """Earlier data that stands in a share of the slots; see `scionlm.data.mixing.replay`."""

    fraction: float
    num_samples: int
    """How many there are before any comes again."""
    repeat: bool
    places: dict[str, Place]

    def skip(self, draws: int) -> None:
        """Go past the first draws, which somebody else has had."""
        ...

    def sample(self, draw: int) -> Sample:
        """Return the sample of a draw; draws are asked for in order."""
        ...

    def state(self) -> Any:
        """Return what is needed to go on."""
        ...

    def restore(self, state: Any, draws: int) -> None:
        """Go on after so many draws."""
        ...


@dataclass(frozen=True)
class Order:
    """What, beside data and weights, decides the order of samples.

    Attributes:
        seq_len: Predicted tokens in a sequence.
        seed: Seed of the order.
        stage: Name of the stage of training, part of the order's key.
        packing: How documents fill windows; see `scionlm.data.mixing.windows`.
        document_mask: Give positions that keep attention inside each document.
        max_epochs: How often each domain may be gone through; a domain that is not named has no limit.
        exhausted: What happens then: `repeat` it all the same, `redistribute` its share to the others, or `stop`.
    """

    seq_len: int
    seed: int = 0
    stage: str = "main"
    packing: PackingName = "concat"
    document_mask: bool = False
    max_epochs: dict[str, float] | None = None
    exhausted: Exhausted = "repeat"


def places_of(streams: Mapping[str, TokenStream], order: Order) -> dict[str, Place]:
    """Return where the windows of each domain are; a replay finds those of an earlier plan by the same keys."""
    key = f"{order.seed}/{order.stage}"
    return {
        name: Place(open_windows(stream, order.seq_len, order.packing, name), f"{key}/{name}")
        for name, stream in streams.items()
    }


class SamplePlan:
    """An endless sequence of samples from weighted domains, and the batches made of them.

    Args:
        streams: Name of each domain to its training stream.
        mixture: Share of each domain.
        order: What else decides the order.
        replay: Earlier data for a share of the slots.
        start: How many samples of each domain, and of what is replayed (`REPLAYED`), earlier plans of the same order
            have taken: this one goes on there.

    Raises:
        UsageError: The mixture is not of these domains.
        DataError: A domain has fewer tokens than one window.
    """

    def __init__(
        self,
        streams: dict[str, TokenStream],
        mixture: Mixture,
        order: Order,
        replay: Replay | None = None,
        start: dict[str, int] | None = None,
    ) -> None:
        if set(mixture.shares) != set(streams):
            raise UsageError(f"mixture {mixture.shares} needs a weight for each of {', '.join(streams)}, and no other")
        self._places = places_of({name: streams[name] for name in mixture.shares}, order)
        self._mixture, self._order, self.replay = mixture, order, replay
        if replay is not None:
            self._places |= replay.places
        self._names = self._with_replay(mixture).names
        self._limits = self._draw_limits()
        self._slot = 0
        self._counts = [(start or {}).get(name, 0) for name in self._names]
        if replay is not None:
            replay.skip((start or {}).get(REPLAYED, 0))
        self._debt = dict.fromkeys(self._names, 0.0)  # what each domain was owed when the phase began, in sequences
        self._asked: Weights | None = None  # the weights that were set last, before anything was given away
        self._exhausted: set[str] = set()
        if order.exhausted == "redistribute":
            limits = zip(self._names, self._limits, self._counts, strict=True)
            self._exhausted = {name for name, limit, count in limits if limit is not None and count >= limit}
            for name in self._exhausted:
                warn(f"domain {name!r} is exhausted before it begins: its limit leaves not one sequence")
        self._phases: list[dict[str, Any]] = []
        self._begin(self._with_replay(mixture.without(self._exhausted)).demand())

    def _with_replay(self, mixture: Mixture) -> Mixture:
        return mixture if self.replay is None else mixture.with_share(REPLAYED, self.replay.fraction)

    def _draw_limits(self) -> list[int | None]:
        order, limits = self._order, dict.fromkeys(self._names)
        for name, epochs in (order.max_epochs or {}).items():
            if name not in self._mixture.shares:
                raise UsageError(f"max_epochs: {name!r} is not a domain of the mixture ({', '.join(self._names)})")
            if order.exhausted != "repeat":
                limits[name] = int(epochs * self._places[name].windows.num_windows)
        if self.replay is not None and not self.replay.repeat:
            limits[REPLAYED] = self.replay.num_samples
        return list(limits.values())

    def _begin(self, demand: Demand, asked: Weights | None = None) -> None:
        """Begin a phase of slots; `asked` is what the demand was rounded from."""
        self._phase: dict[str, Any] = {"slot": self._slot, **demand_to_json(demand)}
        if asked:
            self._phase["asked"] = asked
        self._phases.append(self._phase)
        self._chooser = Chooser(demand, [0] * len(self._names))

    def set_weights(self, weights: Weights, slots: int) -> None:
        """Change the shares of the domains from the next slot on; replay keeps its share.

        Args:
            weights: Share of each domain; they need not sum to one.
            slots: How long they hold, until they are set again. They are rounded to whole sequences of these slots, and
                what was rounded away is carried over to the next time. Setting weights long before their slots are
                over, again and again, leaves them rounded to more than there was.

        Raises:
            UsageError: The weights are not of the plan's domains.
            DataError: Only exhausted domains have a weight.
        """
        if set(weights) != set(self._mixture.shares):
            raise UsageError(f"weights {weights} are not of the domains {', '.join(self._mixture.shares)}")
        self._asked = dict(weights)
        shares = self._with_replay(
            Mixture({name: weights[name] for name in self._mixture.shares}).without(self._exhausted)
        )
        total = sum(shares.shares.values())
        asked = {name: shares.shares[name] / total for name in self._names}
        self._debt = self._debt_now()
        counts = rounded_counts(asked, slots, self._debt)
        self._begin(Constant(list(counts.values())), asked)

    def _debt_now(self) -> Weights:
        """Return what each domain is owed by what was asked for, in sequences."""
        owed, asked = self._chooser.owed(), self._phase.get("asked")
        if asked:
            slots = self._slot - self._phase["slot"]
            owed = [asked[n] * slots - count for n, count in zip(self._names, self._chooser.counts, strict=True)]
        return {name: self._debt[name] + more for name, more in zip(self._names, owed, strict=True)}

    def num_windows(self, domain: str) -> int:
        """Return the windows in one epoch of a domain."""
        return self._places[domain].windows.num_windows

    def padding(self) -> dict[str, float]:
        """Return the share of padding in each domain's windows."""
        return {name: place.windows.padding for name, place in self._places.items()}

    @property
    def shares(self) -> Weights:
        """The weights of the domains as the plan was made with them."""
        return dict(self._mixture.shares)

    def weights(self) -> Weights:
        """Return the shares that the next slot is dealt by, replay included."""
        demand = demand_from_json(self._phase)
        slot = self._slot - self._phase["slot"]
        totals = [demand.total(i, slot + 1) - demand.total(i, slot) for i in range(len(self._names))]
        return {name: total / demand.scale for name, total in zip(self._names, totals, strict=True)}

    def take(self, count: int) -> list[Sample]:
        """Return the samples of the next `count` slots and move on.

        Raises:
            DataError: A domain is exhausted and the order says to stop; the plan is where it was.
        """
        before, phases = self.state(), list(self._phases)
        try:
            return [self._next() for _ in range(count)]
        except DataError:
            self.restore(before)
            self._phases = phases
            raise

    def _next(self) -> Sample:
        if len(self._exhausted) == len(self._mixture.shares):
            self._mixture.without(self._exhausted)  # says that nothing is left
        index = self._chooser.next()
        name, draw, limit = self._names[index], self._counts[index], self._limits[index]
        if (
            limit is not None and draw >= limit
        ):  # only where it is said to stop; else its share was given away with its last window
            self._refuse(name)
        self._slot += 1
        self._counts[index] += 1
        sample = Sample(name, draw) if name != REPLAYED or self.replay is None else self.replay.sample(draw)
        if draw + 1 == limit and name != REPLAYED and self._order.exhausted == "redistribute":
            self._give_away(name)
        return sample

    def _give_away(self, name: str) -> None:
        """Give the share of a domain that has come to its end to the others, if there are some."""
        self._exhausted.add(name)
        if len(self._exhausted) == len(self._mixture.shares):
            return
        warn(f"domain {name!r} is exhausted after {self._slot} sequences; its share goes to the others")
        mixture = Mixture(self._asked) if self._asked is not None else self._mixture.at(self._slot)
        self._begin(self._with_replay(mixture.without(self._exhausted)).demand())
        self._debt = dict.fromkeys(self._names, 0.0)  # the accounting begins anew

    def _refuse(self, name: str) -> None:
        if name == REPLAYED:
            raise DataError(
                "replay would begin its second pass over the earlier data; lower replay.fraction or set replay.repeat"
            )
        epochs = (self._order.max_epochs or {}).get(name)
        raise DataError(
            f"domain {name!r} is exhausted: data.max_epochs allows {epochs:g} epochs; add text, lower its share, or "
            "set data.exhausted to repeat or redistribute"
        )

    def batch(self, samples: list[Sample]) -> Batch:
        """Return the token ids and labels of some samples."""
        order = self._order
        rows: dict[str, list[int]] = {}
        for row, sample in enumerate(samples):
            rows.setdefault(sample.domain, []).append(row)
        shifted = all(self._places[name].windows.shifted for name in rows)
        page = Page(len(samples), order.seq_len, shifted, order.document_mask)
        lengths = {name: self._places[name].windows.num_windows for name in rows}
        sizes = np.array([lengths[sample.domain] for sample in samples], dtype=np.int64)
        epochs, positions = np.divmod(np.array([sample.draw for sample in samples], dtype=np.int64), sizes)
        keys = {name: self._places[name].key for name in rows}
        named = [f"{keys[sample.domain]}/{epoch}" for sample, epoch in zip(samples, epochs.tolist(), strict=True)]
        windows = permuted(positions, sizes, named)
        for name, mine in rows.items():
            self._places[name].windows.read(windows[mine], mine, page)
        return page.batch()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on: the slot, one cursor a domain, and the phase."""
        counts = dict(zip(self._names, self._counts, strict=True))
        return {
            "slot": self._slot,
            "counts": counts,
            "phase": self._phase | {"counts": self._chooser.counts},
            "debt": dict(self._debt),
            "asked": self._asked,
            "exhausted": sorted(self._exhausted),
            "replay": self.replay.state() if self.replay is not None else None,
            "mixture": self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        """Return what the plan was made with that may not be another where it goes on."""
        replayed = self.replay.fraction if self.replay is not None else 0.0
        return {"shares": self._mixture.shares, "from": self._mixture.ramp_from, "replayed": replayed}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            DataError: The state is of other domains.
            UsageError: It is of other shares of them.
        """
        if set(state["counts"]) != set(self._names):
            raise DataError(f"the checkpoint's domains {sorted(state['counts'])} are not {sorted(self._names)}")
        if (before := state.get("mixture", self._facts())) != self._facts():
            raise UsageError(
                f"the mixture is not the checkpoint's ({before} -> {self._facts()}), and cannot change inside a stage"
            )
        self._slot = int(state["slot"])
        self._counts = [int(state["counts"][name]) for name in self._names]
        self._debt = dict(state.get("debt") or dict.fromkeys(self._names, 0.0))
        self._asked = state.get("asked")
        self._exhausted = set(state.get("exhausted", ()))
        # A state of before there were phases is in the first one.
        first = {"slot": 0, **demand_to_json(self._with_replay(self._mixture).demand()), "counts": self._counts}
        phase = dict(state.get("phase") or first)
        self._chooser = Chooser(demand_from_json(phase), [int(count) for count in phase.pop("counts")])
        self._phase = phase
        self._phases = [phase]  # what was before is in the ledger
        if self.replay is not None:
            self.replay.restore(state["replay"], self._counts[self._names.index(REPLAYED)])

    @property
    def slot(self) -> int:
        """How many slots have been dealt out."""
        return self._slot

    def new_phases(self) -> list[dict[str, Any]]:
        """Return the phases that began since this was asked last: what the ledger records."""
        new, self._phases = self._phases, []
        return new

    def epochs(self) -> dict[str, float]:
        """Return how often each domain has been gone through so far."""
        sizes = [self.replay.num_samples if n == REPLAYED and self.replay else self.num_windows(n) for n in self._names]
        counts = zip(self._names, self._counts, sizes, strict=True)
        return {name.removesuffix(":"): count / size for name, count, size in counts}
