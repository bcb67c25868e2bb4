"""How much of each domain: fixed shares, by size, by temperature, and ramps from one mixture to another."""

from dataclasses import dataclass
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.data.mixing.chooser import Constant, Demand, Ramp

UNIT = 2**32  # fixed weights are whole numbers of this unit, so that the accounting is exact

Weights = dict[str, float]


def by_temperature(sizes: dict[str, int], temperature: float) -> Weights:
    """Return shares in proportion to size ** (1 / temperature): 1 is by size, a large one nearly equal shares.

    Source: Devlin 2018 (multilingual BERT), Arivazhagan et al., arXiv:1907.05019.
    """
    largest = max(sizes.values())
    return {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}


def whole_weights(weights: Weights, unit: int = UNIT) -> dict[str, int]:
    """Return weights as whole numbers that sum to `unit` exactly (largest remainders get what is left)."""
    total = sum(weights.values())
    exact = {name: weight / total * unit for name, weight in weights.items()}
    whole = {name: int(value) for name, value in exact.items()}
    rest = unit - sum(whole.values())
    for name in sorted(exact, key=lambda n: whole[n] - exact[n])[:rest]:
        whole[name] += 1
    return whole


def rounded_counts(shares: Weights, slots: int, debt: Weights) -> dict[str, int]:
    """Return how many of the next `slots` sequences each domain gets.

    Args:
        shares: Share of each domain; they sum to one.
        slots: How many there are to be dealt out.
        debt: What each domain is owed from before, so that one too small for a whole sequence each time gets one now
            and then.
    """
    wanted = {name: share * slots + debt[name] for name, share in shares.items()}
    counts = {name: max(int(value // 1), 0) for name, value in wanted.items()}
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])  # who is owed most comes first
    for name in order[: max(slots - sum(counts.values()), 0)]:
        counts[name] += 1
    while sum(counts.values()) > slots:  # a debt larger than the share was forgiven; who has most too much pays
        counts[max((n for n in counts if counts[n]), key=lambda n: counts[n] - wanted[n])] -= 1
    return counts


@dataclass(frozen=True)
class Mixture:
    """What is asked for, as a function of the slot.

    Attributes:
        shares: Share of each domain; they need not sum to one.
        ramp_from: Shares at the beginning, from which they move to `shares` in equal steps; None stays at `shares`.
        ramp_slots: Length of the way.

    Raises:
        UsageError: A share is negative, none is positive, or the two mixtures name different domains.
    """

    shares: Weights
    ramp_from: Weights | None = None
    ramp_slots: int = 0

    def __post_init__(self) -> None:
        for weights in (self.shares, self.ramp_from or self.shares):
            if any(not weight >= 0 for weight in weights.values()) or not 0 < sum(weights.values()) < float("inf"):
                raise UsageError(f"mixture {weights}: each weight must be at least 0 and their sum positive")
        if self.ramp_from is not None and set(self.ramp_from) != set(self.shares):
            raise UsageError(f"the mixture starts with {sorted(self.ramp_from)} and ends with {sorted(self.shares)}")

    @property
    def names(self) -> list[str]:
        """The domains, in order."""
        return list(self.shares)

    def without(self, exhausted: set[str]) -> "Mixture":
        """Return the mixture with the shares of some domains given to the others.

        Raises:
            DataError: No domain is left.
        """

        def left(weights: Weights) -> Weights:
            return {name: 0.0 if name in exhausted else weight for name, weight in weights.items()}

        shares, start = left(self.shares), left(self.ramp_from) if self.ramp_from is not None else None
        if start is not None and not sum(start.values()):
            start = None
        if not sum(shares.values()):
            if start is None:
                raise DataError("every domain of the mixture is exhausted; add text, or set data.exhausted: repeat")
            shares, start = start, None  # where the ramp would lead there is nothing left
        return Mixture(shares, start, self.ramp_slots if start is not None else 0)

    def with_share(self, name: str, share: float) -> "Mixture":
        """Return the mixture with a fixed share for one more domain."""

        def smaller(weights: Weights) -> Weights:
            total = sum(weights.values())
            return {known: weight / total * (1 - share) for known, weight in weights.items()} | {name: share}

        return Mixture(smaller(self.shares), smaller(self.ramp_from) if self.ramp_from else None, self.ramp_slots)

    def at(self, slot: int) -> "Mixture":
        """Return what is left of the mixture after `slot`: on a ramp, the rest of the way from where it has got to."""
        start = self.ramp_from
        if start is None or slot >= self.ramp_slots:
            return Mixture(self.shares)
        sums = sum(start.values()), sum(self.shares.values())
        part = slot / self.ramp_slots
        now = {n: (1 - part) * start[n] / sums[0] + part * self.shares[n] / sums[1] for n in self.shares}
        return Mixture(self.shares, now, self.ramp_slots - slot)

    def demand(self) -> Demand:
        """Return the demand from the first slot on."""

        def whole(weights: Weights) -> list[int]:
            return list(whole_weights({name: weights[name] for name in self.shares}).values())

        if self.ramp_from is None or not self.ramp_slots:
            return Constant(whole(self.shares))
        return Ramp(whole(self.ramp_from), whole(self.shares), self.ramp_slots)


def demand_to_json(demand: Demand) -> dict[str, Any]:
    """Return a demand as plain JSON."""
    if isinstance(demand, Ramp):
        return {"from": demand.start, "to": demand.end, "slots": demand.slots}
    assert isinstance(demand, Constant)
    return {"weights": demand.weights}


def demand_from_json(record: dict[str, Any]) -> Demand:
    """Return the demand that `demand_to_json` wrote."""
    if "weights" in record:
        return Constant([int(weight) for weight in record["weights"]])
    return Ramp(record["from"], record["to"], record["slots"])
