"""SIGTERM and Ctrl-C ask a run to stop; a second Ctrl-C ends it at once."""

import os
import signal
import threading
from types import FrameType, TracebackType

from scionlm.core.errors import StoppedError


class StopRequest:
    """While active, the first signal is only noted; the work asks for it at places where it can stop well."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(130)  # what was saved last is complete: every file is written aside and renamed
        self.requested = True

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
        """Stop here if a signal has come.

        Raises:
            StoppedError: It has.
        """
        if self.requested:
            raise StoppedError("stopped on request")
