"""Any number of processes that share one piece of work, on one machine or many that see the same folder.

Nobody is in charge, and nobody has to know of the others: each process runs the same command, takes the next job that
is neither done nor being done, and does it. What a job makes is written in one atomic step and does not depend on who
made it, so that a process may be killed, or come late, or a job be done twice, and the result is the same.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from scionlm.core.errors import StoppedError
from scionlm.core.files import try_lock
from scionlm.core.log import say
from scionlm.core.signals import StopRequest

_POLL_SECONDS = 0.2
_SAY_EVERY_SECONDS = 30.0


class Crew:
    """This process as one of those who share the work.

    Args:
        locks: Folder for the lock files, seen by all.
        stop: Asked between jobs.
        is_over: Whether the whole work is done: then no job is left, whatever is left of it.
    """

    def __init__(self, locks: Path, stop: StopRequest, is_over: Callable[[], bool]) -> None:
        self._locks, self._stop, self._is_over = locks, stop, is_over

    def is_alone(self) -> bool:
        """Return whether no other process is at a job now."""
        for path in self._locks.rglob("*.lock"):
            with try_lock(path) as mine:
                if not mine:
                    return False
        return True

    def each(
        self,
        jobs: Iterable[str],
        is_done: Callable[[str], bool],
        work: Callable[[str], None],
        is_needed: Callable[[str], bool] = lambda job: True,
    ) -> None:
        """Return when every needed job is done, by this process or another.

        Args:
            jobs: Names of the jobs, in the order in which they are best done.
            is_done: Whether a job's result is there.
            work: Makes it.
            is_needed: Asked before a job is begun; what others have done meanwhile may have made it needless.

        Raises:
            StoppedError: A signal came.
        """
        waiting = list(jobs)
        said = time.monotonic()
        while True:
            left: list[str] = []
            worked = busy = 0
            for job in waiting:
                if self._stop.requested:
                    raise StoppedError("stopped; what is finished is kept, run it again to go on")
                if self._is_over() or is_done(job):
                    continue
                if not is_needed(job):  # so far: a job that is not finished yet may show that it is
                    left.append(job)
                    continue
                with try_lock(self._locks / f"{job}.lock") as mine:
                    if mine and not (self._is_over() or is_done(job)):
                        work(job)
                        worked += 1
                    elif not mine:
                        left.append(job)
                        busy += 1
            if not (worked or busy):
                return
            waiting = left
            if not worked:
                if time.monotonic() - said > _SAY_EVERY_SECONDS:
                    said = time.monotonic()
                    say(f"waiting for {busy} job(s) that other processes are at")
                time.sleep(_POLL_SECONDS)
