"""When to save, and what to do when it fails: the old checkpoint stays, training goes on, and it is tried again."""

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from scionlm.core.duration import Duration
from scionlm.core.errors import StorageError
from scionlm.core.log import warn
from scionlm.core.records import Record
from scionlm.train.checkpoint import CheckpointStore, Tensors

_TRIES = 5
_FIRST_WAIT_SECONDS = 10.0
_MUCH = 0.02  # of the time


class Flushed(Protocol):
    """A file that grows."""

    def flush(self) -> None:
        """Write what waits."""
        ...


class Saver:
    """Saves the state of a run every so often.

    Args:
        store: Where.
        every: Time, or updates in all, between two checkpoints.
        keep_every: Updates between two that are kept for good; 0 keeps none.
    """

    def __init__(self, store: CheckpointStore, every: float | int, keep_every: int = 0) -> None:
        self.store = store
        self._every, self._keep_every = every, keep_every
        self.saved_step: int | None = None
        """Of the newest checkpoint."""
        self._counted_from, self._time = 0, time.monotonic()
        self._failures, self._next_try = 0, 0.0
        self._warned = False

    @classmethod
    def of(
        cls, store: CheckpointStore, every: Duration, total_steps: int, tokens_per_step: int, keep_every: int = 0
    ) -> "Saver":
        """Return a saver with its duration in seconds (float) or in steps (int)."""
        if every.unit == "seconds":
            return cls(store, float(every.amount), keep_every)
        return cls(store, max(1, every.in_steps(total_steps, tokens_per_step)), keep_every)

    def begin(self, step: int, saved: bool) -> None:
        """Count from here, where there is a checkpoint if `saved`."""
        self.saved_step = step if saved else None
        self._counted_from, self._time = step, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether to save after `step`."""
        if self._failures:
            return time.monotonic() >= self._next_try
        if self._keep_every and step != self._counted_from and step % self._keep_every == 0:
            return True
        if isinstance(self._every, float):
            return time.monotonic() - self._time >= self._every
        return step - self._counted_from >= self._every

    def save(
        self,
        state: Record,
        tensors: Mapping[str, Tensors],
        records: Iterable[Flushed],
        *,
        must: bool,
        for_good: bool = False,
    ) -> float:
        """Save, and return the seconds that it took.

        Args:
            state: What is not a tensor.
            tensors: What is.
            records: Have to be on the disk before it.
            must: There is no later.
            for_good: Keep it.

        Raises:
            StorageError: It cannot be written, and `must`, or this was the last of several tries.
        """
        step, started = state["step"], time.monotonic()
        for_good = for_good or bool(self._keep_every and step % self._keep_every == 0)
        try:
            for record in records:
                record.flush()
            self.store.save(state, tensors, for_good)
        except StorageError as error:
            self._failures += 1
            saved = (
                f"the last checkpoint is of step {self.saved_step}"
                if self.store.all()
                else "there is no checkpoint yet"
            )
            if must or self._failures >= _TRIES:
                raise StorageError(f"{error} (step {step}; {saved})") from error
            wait = _FIRST_WAIT_SECONDS * 2 ** (self._failures - 1)
            self._next_try = time.monotonic() + wait
            warn(f"{error} (step {step}; {saved}; going on, next try in {wait:.0f} s)")
            return time.monotonic() - started
        taken = time.monotonic() - started
        since = max(time.monotonic() - self._time, 1e-9)
        if taken > _MUCH * since and isinstance(self._every, float) and not must and not self._warned:
            self._warned = True
            warn(
                f"saving took {taken:.1f} s, {100 * taken / since:.0f} % of the time since the last checkpoint; "
                f"checkpoint.every: {taken / _MUCH / 60:.0f} min would make it {100 * _MUCH:.0f} %"
            )
        self._failures = 0
        self.begin(step, saved=True)
        return taken
