"""SIGTERM and Ctrl-C ask a run to stop; a second Ctrl-C ends it at once."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from scionlm.core.errors import StoppedError


class StopRequest:
    """While active, the first signal is only noted; the work asks for it at places where it can stop well.

    Args:
        agree: Makes one answer of those of several processes, each of which asks `agreed` at the same places; None
            where there is one process.
    """

    def __init__(self, agree: Callable[[bool], bool] | None = None) -> None:
        self._noted = self._agreed = False
        self._agree = agree
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop; of several processes, whether they have agreed to."""
        return self._agreed if self._agree else self._noted

    def agreed(self) -> bool:
        """Return whether to stop, after asking the other processes."""
        if self._agree and not self._agreed:
            self._agreed = self._agree(self._noted)
        return self.requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            os._exit(130)  # what was saved last is complete: every file is written aside and renamed
        self._noted = True

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def check(self) -> None:
        """Stop here if a signal has come; of several processes all have to ask.

        Raises:
            StoppedError: It has.
        """
        if self.agreed():
            raise StoppedError("stopped on request")
