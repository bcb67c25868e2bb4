"""When to save, and what to do when it fails: the old checkpoint stays, training goes on, and it is tried again.

In the background a checkpoint is a copy of the state in the processor's memory, written by a thread while training goes
on. There is one at a time. The main rank looks at the clock and at its thread, and all do what it says.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from scionlm.core.duration import Duration
from scionlm.core.errors import StorageError
from scionlm.core.log import warn
from scionlm.core.records import Record
from scionlm.parallel.placing import on_processor
from scionlm.parallel.runtime import Runtime
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.folders import checkpoint_folders
from scionlm.train.shards import Tensors

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
        background: The devices of a run whose checkpoints are written while it goes on; None waits for each.
    """

    def __init__(
        self, store: CheckpointStore, every: float | int, keep_every: int = 0, background: Runtime | None = None
    ) -> None:
        self.store, self._background = store, background
        self._ranks = background.ranks if background else store.ranks
        self._writing: _Writing | None = None
        self._every, self._keep_every = every, keep_every
        self.saved_step: int | None = None
        """Of the newest checkpoint."""
        self._counted_from, self._time = 0, time.monotonic()
        self._failures, self._next_try = 0, 0.0
        self._warned = False

    @classmethod
    def of(
        cls,
        store: CheckpointStore,
        every: Duration,
        total_steps: int,
        tokens_per_step: int,
        keep_every: int = 0,
        background: Runtime | None = None,
    ) -> "Saver":
        """Return a saver with its duration in seconds (float) or in steps (int)."""
        if every.unit == "seconds":
            return cls(store, float(every.amount), keep_every, background)
        return cls(store, max(1, every.in_steps(total_steps, tokens_per_step)), keep_every, background)

    def begin(self, step: int, saved: bool) -> None:
        """Count from here, where there is a checkpoint if `saved`."""
        self.saved_step = step if saved else None
        self._counted_from, self._time = step, time.monotonic()

    def has(self, step: int, must: bool) -> bool:
        """Return whether a step's checkpoint is there, or being written; where it `must` be there, wait for it."""
        if self.saved_step == step and must and self._writing is not None:
            with contextlib.suppress(StorageError):
                self._see_to_it()
        return self.saved_step == step

    def is_due(self, step: int, calm: bool = True) -> bool:
        """Return whether to save after `step`, and see to what was being written. All ranks have to ask.

        Args:
            step: The step.
            calm: Whether the last update was sound: one that was not must not replace good weights.

        Raises:
            StorageError: What was being written could not be, for the last of several times.
        """
        for_good = bool(
            self._keep_every and step % self._keep_every == 0
        )  # comes once: what is in its way is waited for
        over = self._writing is not None and (for_good or not self._writing.is_alive())
        over, due = self._ranks.share([over, calm and self._is_due(step)])
        if over:
            self._see_to_it()
        return due and self._writing is None

    def _is_due(self, step: int) -> bool:
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
        if self._writing is not None:
            with contextlib.suppress(StorageError):  # this one takes its place
                self._see_to_it()

        def flush() -> None:
            for record in records:
                record.flush()

        try:
            self._ranks.on_main(flush)
            if self._background and not must:
                held: Mapping[str, Tensors] = {}
                if self.store.shared or self._ranks.is_main:
                    held = {
                        name: {key: on_processor(tensor, self._background) for key, tensor in some.items()}
                        for name, some in tensors.items()
                    }
                self._writing = _Writing(self.store, self._background, state, held, for_good)
                self._writing.start()
            else:
                self.store.save(state, tensors, for_good)
        except StorageError as error:
            self._failed(error, step, must)
            return time.monotonic() - started
        taken = time.monotonic() - started
        since = max(time.monotonic() - self._time, 1e-9)
        much = round(100 * taken / since) > round(100 * _MUCH)
        if much and isinstance(self._every, float) and not must and not self._warned:
            self._warned = True
            warn(
                f"saving took {taken:.1f} s, {100 * taken / since:.0f} % of the time since the last checkpoint; "
                f"checkpoint.every: {taken / _MUCH / 60:.0f} min would make it {100 * _MUCH:.0f} %"
            )
        self._failures = 0 if self._writing is None else self._failures
        self.begin(step, saved=True)
        return taken

    def close(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.join()

    def _see_to_it(self) -> None:
        """Wait for what is being written, and take note of how it went."""
        writing, self._writing = self._writing, None
        assert writing is not None
        writing.join()
        if isinstance(writing.problem, StorageError):
            self.saved_step = None
            self._failed(writing.problem, writing.step, must=False)
        elif writing.problem is not None:
            raise writing.problem
        else:
            self._failures = 0

    def _failed(self, error: StorageError, step: int, must: bool) -> None:
        self._failures += 1
        last = max((number for number, _ in checkpoint_folders(self.store.folder)), default=None)
        saved = f"the last checkpoint is of step {last}" if last is not None else "there is no checkpoint yet"
        if must or self._failures >= _TRIES:
            raise StorageError(f"{error} (step {step}; {saved})") from error
        wait = _FIRST_WAIT_SECONDS * 2 ** (self._failures - 1)
        self._next_try = time.monotonic() + wait
        warn(f"{error} (step {step}; {saved}; going on, next try in {wait:.0f} s)")


class _Writing(threading.Thread):
    """The writing of one checkpoint.

    Attributes:
        step: Of the checkpoint.
        problem: Why it failed, if it did.
    """

    def __init__(
        self, store: CheckpointStore, runtime: Runtime, state: Record, tensors: Mapping[str, Tensors], for_good: bool
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step: int = state["step"]
        self.problem: BaseException | None = None
        self._arguments = (state, tensors, for_good)
        self._store, self._runtime = store, runtime

    def run(self) -> None:
        """Write it."""
        try:
            self._runtime.enter_thread()
            self._store.save(*self._arguments)
        except BaseException as error:
            self.problem = error
