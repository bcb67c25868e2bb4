"""What a person sees while Scion works: messages and progress, on stderr, so that stdout holds results only.

On a terminal progress is a bar; elsewhere it is a plain line now and then. Nothing here interprets markup: names and
texts of users are printed as they are.
"""

import contextlib
import sys
import time
from collections.abc import Generator
from types import TracebackType

_PLAIN_EVERY_SECONDS = 10.0
_MANY_HOURS = 10 * 86400  # in seconds: from here on nobody counts in hours

_silent = False


@contextlib.contextmanager
def silenced(silent: bool = True) -> Generator[None, None, None]:
    """Print nothing for a while: one process of many speaks for all."""
    global _silent  # noqa: PLW0603 - stderr is one for the whole process, too
    before, _silent = _silent, silent or _silent
    try:
        yield
    finally:
        _silent = before


def say(message: str) -> None:
    """Print one line about what is happening."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one line about something that a person should know but that does not stop the work."""
    say(f"warning: {message}")


def format_count(value: float) -> str:
    """Return a count for people: 950, 134.5M, 1.2B."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.99995:  # what would round up to a thousand of the unit below
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


def format_bytes(num_bytes: float) -> str:
    """Return a size for people, in units of 1024: 950 B, 1.2 GiB."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    # What three digits cannot tell, a thousand of a unit, is told in the next one.
    scale, suffix = next(unit for unit in units if num_bytes * 1024 >= 999.5 * unit[0])
    return f"{num_bytes / scale:.3g} {suffix}"


def format_seconds(seconds: float) -> str:
    """Return a time for people: 9s, 4m 05s, 2h 07m, 41 days."""
    whole = round(seconds)
    if whole >= _MANY_HOURS:
        return f"{whole / 86400:,.0f} days"
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class Progress:
    """Show how far a piece of work is; a context manager.

    Args:
        title: What is being done.
        total: Amount of work in any unit.
        done: Amount that was finished earlier (a resumed run); it does not count for the speed.
    """

    def __init__(self, title: str, total: float, done: float = 0.0) -> None:
        self._title = title
        self._total = total
        self._done = self._first = done
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and not _silent:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=int(self._done), detail="")
            self._bar.start()
        return self

    def update(self, done: float, detail: str = "") -> None:
        """Set the amount of work that is finished, with a few words on how it goes."""
        self._done = done
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = f"{format_seconds((self._total - done) / rate)} left" if rate > 0 else ""
        text = "  ".join(part for part in (detail, left) if part)
        if self._bar:
            self._bar.update(self._task, completed=done, detail=text)
        elif now - self._last_line >= _PLAIN_EVERY_SECONDS:
            self._last_line = now
            percent = 100 * done / self._total if self._total else 100
            say(f"{self._title}: {percent:.0f}%  {text}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._started >= 1:
            say(f"{self._title}: done in {format_seconds(time.monotonic() - self._started)}")
