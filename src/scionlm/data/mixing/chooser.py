"""Which domain stands in the next slot, so that every prefix of slots is within one sequence of the mixture.

Source: Tijdeman 1980, The chairman assignment problem: among the domains that are owed enough to be chosen, take the
one whose debt would overflow first. It has to know the weights ahead, which a mixture does: weights that are changed
by what training measures begin a new phase (`SamplePlan.set_weights`).
"""

import heapq
from typing import Protocol

_FINE = 32  # bits behind the point of a deadline: only their order matters


class Demand(Protocol):
    """How much of each domain is asked for, in whole numbers: `scale` of them are one sequence.

    Slots are counted from 1 within a phase. In every slot the demands of all domains add up to `scale`.
    """

    scale: int
    num_domains: int

    def total(self, domain: int, slot: int) -> int:
        """Return what was asked of a domain in the slots up to this one."""
        ...

    def first(self, domain: int, amount: int) -> int | None:
        """Return the first slot in which the total is at least `amount`; None where it never is."""
        ...

    def deadline(self, domain: int, amount: int) -> int:
        """Return a number that orders domains by when their totals reach `amount`."""
        ...


class Constant:
    """The same weights in every slot.

    Args:
        weights: A whole number for each domain, not all zero; their sum is one sequence.
    """

    def __init__(self, weights: list[int]) -> None:
        self.weights = weights
        self.scale = sum(weights)
        self.num_domains = len(weights)

    def total(self, domain: int, slot: int) -> int:
        """See `Demand.total`."""
        return self.weights[domain] * slot

    def first(self, domain: int, amount: int) -> int | None:
        """See `Demand.first`."""
        weight = self.weights[domain]
        return max(-(-amount // weight), 1) if weight else None

    def deadline(self, domain: int, amount: int) -> int:
        """See `Demand.deadline`."""
        return (amount << _FINE) // self.weights[domain]


class Ramp:
    """Weights that move from one mixture to another in equal steps a slot, and then stay.

    Args:
        start: Whole weights before the first slot.
        end: Whole weights from slot `slots` on, of the same sum.
        slots: Length of the way.
    """

    def __init__(self, start: list[int], end: list[int], slots: int) -> None:
        self.start, self.end, self.slots = start, end, slots
        self._double = 2 * slots
        self.scale = sum(end) * self._double
        self.num_domains = len(end)

    def total(self, domain: int, slot: int) -> int:
        """See `Demand.total`: the sum of an arithmetic series, then of a constant."""
        first, last = self.start[domain], self.end[domain]
        on_the_way = min(slot, self.slots)
        moved = self._double * first * on_the_way + (last - first) * on_the_way * (on_the_way + 1)
        return moved + self._double * last * (slot - on_the_way)

    def first(self, domain: int, amount: int) -> int | None:
        """See `Demand.first`."""
        at_end = self.total(domain, self.slots)
        if at_end < amount:
            last = self._double * self.end[domain]
            return self.slots - (at_end - amount) // last if last else None
        low, high = 1, self.slots
        while low < high:
            middle = (low + high) // 2
            if self.total(domain, middle) >= amount:
                high = middle
            else:
                low = middle + 1
        return low

    def deadline(self, domain: int, amount: int) -> int:
        """See `Demand.deadline`; what is never reached comes last."""
        slot = self.first(domain, amount)
        return 1 << 256 if slot is None else slot


class Chooser:
    """Gives the domain of one slot after another, in time that grows with the logarithm of the number of domains.

    In every prefix the count of a domain differs from its demand by at most 1 - 1 / (2n - 2) for n domains.

    Args:
        demand: What is asked for.
        counts: How often each domain was chosen in this phase so far.
    """

    def __init__(self, demand: Demand, counts: list[int]) -> None:
        self._demand = demand
        self._counts = list(counts)
        self._slot = sum(counts)
        self._slack = max(2 * len(counts) - 2, 1)
        self._waiting: list[tuple[int, int]] = []  # (slot from which a domain may be chosen, domain)
        self._ready: list[tuple[int, int]] = []  # (deadline, domain)
        for domain in range(len(counts)):
            self._queue(domain)

    def _queue(self, domain: int) -> None:
        scale, slack = self._demand.scale, self._slack
        owed = self._counts[domain] * scale
        release = self._demand.first(domain, owed - (-scale // slack))  # rounded up: at least 1/slack is owed
        if release is not None:
            heapq.heappush(self._waiting, (release, domain))

    def next(self) -> int:
        """Return the domain of the next slot."""
        self._slot += 1
        demand, slack = self._demand, self._slack
        while self._waiting and self._waiting[0][0] <= self._slot:
            domain = heapq.heappop(self._waiting)[1]
            limit = self._counts[domain] * demand.scale - (-demand.scale * (slack - 1) // slack)
            heapq.heappush(self._ready, (demand.deadline(domain, limit), domain))
        # The debts of all domains add up to one sequence here, so that one of n is at least 1/n.
        domain = heapq.heappop(self._ready)[1]
        self._counts[domain] += 1
        self._queue(domain)
        return domain

    @property
    def counts(self) -> list[int]:
        """How often each domain was chosen in this phase."""
        return list(self._counts)

    def owed(self) -> list[float]:
        """Return what each domain is owed now, in sequences: demand less count."""
        demand = self._demand
        return [
            (demand.total(domain, self._slot) - count * demand.scale) / demand.scale
            for domain, count in enumerate(self._counts)
        ]
