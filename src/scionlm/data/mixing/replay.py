"""Replay: earlier data in a share of the slots, so that a model does not forget it.

The share is taken from the new data's, so that the cost stays the same (compute-equivalent replay). From a run's ledger
come the very samples that it trained on, in their original order, from an offset on, or reshuffled; where no ledger is
to be had, a proxy corpus stands in.

Source: Ibrahim et al., arXiv:2403.08763, section 4.2. The order of theirs is the original one.
"""

from typing import Any, Literal

import numpy as np

from scionlm.core.errors import DataError, UsageError
from scionlm.data.mixing.chooser import Chooser, Constant
from scionlm.data.mixing.ledger import Consumed
from scionlm.data.mixing.permute import permuted
from scionlm.data.mixing.plan import REPLAYED, Sample

ReplayOrder = Literal["original", "offset", "reshuffled"]
REPLAY_FRACTION = 0.05
"""The share of the slots where a recipe that replays names none."""


class LedgerReplay:
    """Replays what a run consumed.

    Args:
        consumed: From the run's ledger.
        fraction: Share of the slots.
        order: `original`; `offset`: the same, from `offset` on, and then from the beginning; `reshuffled`.
        offset: Where to start, as a share of what was consumed.
        repeat: Allow a second pass.
        seed: Of reshuffling.

    Raises:
        UsageError: The fraction or offset is no share.
    """

    def __init__(
        self,
        consumed: Consumed,
        fraction: float,
        order: ReplayOrder = "original",
        offset: float = 0.0,
        repeat: bool = False,
        seed: int = 0,
    ) -> None:
        if not (0 < fraction < 1 and 0 <= offset < 1):
            raise UsageError(f"replay.fraction {fraction} must be between 0 and 1, replay.offset {offset} below 1")
        self.fraction, self.repeat = fraction, repeat
        self.num_samples = consumed.num_samples
        if not self.num_samples:
            raise DataError("the run to replay has consumed nothing yet")
        self.places = {REPLAYED + name: place for name, place in consumed.places.items()}
        self._consumed, self._seed = consumed, seed
        self._reshuffled = order == "reshuffled"
        self._first = int(offset * self.num_samples) if order == "offset" else 0
        self._names = [name for name, count in consumed.counts.items() if count]
        self._dealt: dict[str, int] = dict.fromkeys(self._names, 0)  # of the pass, when reshuffled
        self._in_order = consumed.samples()
        self._position = 0
        while not self._reshuffled and self._position < self._first:
            next(self._in_order)
            self._position += 1

    def skip(self, draws: int) -> None:
        """Go past the first draws; see `Replay`."""
        for draw in range(draws):
            self.sample(draw)

    def sample(self, draw: int) -> Sample:
        """Return the sample of a draw; see `Replay`."""
        if self._reshuffled:
            return self._shuffled(draw)
        if self._position == self.num_samples:
            self._position, self._in_order = 0, self._consumed.samples()
        self._position += 1
        name, original = next(self._in_order)
        return Sample(REPLAYED + name, original)

    def _shuffled(self, draw: int) -> Sample:
        """Deal the domains out evenly, and each one's samples in a new order every pass."""
        turn = draw // self.num_samples
        if draw % self.num_samples == 0:
            self._dealt = dict.fromkeys(self._names, 0)
            self._chooser = self._deal([0] * len(self._names))
        name = self._names[self._chooser.next()]
        number = self._dealt[name]
        self._dealt[name] += 1
        key = f"replay/{self._seed}/{turn}/{name}"
        index = permuted(np.array([number]), np.array([self._consumed.counts[name]]), [key])[0]
        return Sample(REPLAYED + name, self._consumed.start.get(name, 0) + int(index))

    def _deal(self, counts: list[int]) -> Chooser:
        return Chooser(Constant([self._consumed.counts[name] for name in self._names]), counts)

    def state(self) -> Any:
        """Return what is needed to go on; see `Replay`."""
        return {"dealt": dict(self._dealt)} if self._reshuffled else self._in_order.state()

    def restore(self, state: Any, draws: int) -> None:
        """Go on after so many draws; see `Replay`."""
        if self._reshuffled:
            self._dealt = dict(state["dealt"])
            self._chooser = self._deal([self._dealt[name] for name in self._names])
            return
        self._in_order.restore(state)
        self._position = (self._first + draws - 1) % self.num_samples + 1 if draws else self._first
