"""Where metrics go: always to RUN/metrics.jsonl, and to TensorBoard or a tracker with wandb's interface if asked."""

import contextlib
import hashlib
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from scionlm.core.errors import StorageError, UsageError
from scionlm.core.log import warn
from scionlm.core.records import JsonlWriter, Record, read_json

TrackerName = Literal["tensorboard", "wandb", "trackio"]

_BEAT_SECONDS = 15.0


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Writes event files into RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        module = _load("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish."""
        self._writer.close()


class WandbLike:
    """Logs to wandb, or to another package with its interface; a run that goes on goes on there too.

    Args:
        package: Its name.
        run: The run folder; its name is the run's, its parent's the project's.
        config: The recipe.
    """

    def __init__(self, package: str, run: Path, config: Record) -> None:
        module: Any = _load(package, package)
        folder = run.resolve()
        # wandb goes on with a run by its id; trackio by its name, and takes no id.
        same = {"id": _identity(folder)} if package == "wandb" else {}
        self._run = module.init(project=folder.parent.name, name=folder.name, config=config, resume="allow", **same)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish."""
        self._run.finish()


def _identity(folder: Path) -> str:
    """Return what tells a run from others, also from one that was in the same place before."""
    manifests = [place / "manifest.json" for place in (folder, folder.parent)]  # a control's is its run's
    started = next((str(read_json(path).get("started_at")) for path in manifests if path.exists()), "")
    return hashlib.sha256(f"{folder} {started}".encode()).hexdigest()[:16]


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Check that the packages of trackers are there, without loading them.

    Raises:
        UsageError: One is not installed.
    """
    for name in names:
        there = sys.modules[name] if name in sys.modules else importlib.util.find_spec(name)
        if there is None:
            raise _not_installed(name)


def _not_installed(package: str) -> UsageError:
    extra = "pip install 'scionlm[track]'" if package == "tensorboard" else f"pip install {package}"
    return UsageError(f"track: {package} is not installed; {extra}")


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _not_installed(package) from error


def open_tracker(name: TrackerName, run: Path, config: Record) -> Tracker:
    """Return a tracker.

    Raises:
        UsageError: Its package is not installed.
    """
    return TensorBoard(run) if name == "tensorboard" else WandbLike(name, run, config)


def open_trackers(names: Iterable[TrackerName], run: Path, config: Record) -> dict[str, Tracker]:
    """Return trackers by name; one that cannot begin (no network, not logged in) is named and left out.

    Raises:
        UsageError: A package is not installed.
    """
    found: dict[str, Tracker] = {}
    for name in names:
        try:
            found[name] = open_tracker(name, run, config)
        except UsageError:
            raise
        except Exception as error:
            warn(f"{name} cannot begin and is left out: {' '.join(str(error).split())[:200]}")
    return found


class Metrics:
    """Writes records to RUN/metrics.jsonl, and their numbers to the trackers.

    A tracker that fails is named and left out from then on: training does not depend on it.

    Args:
        writer: Of the file.
        trackers: By name.
        beat: Told the step now and then: what shows that the run is alive.
    """

    def __init__(
        self, writer: JsonlWriter, trackers: dict[str, Tracker] | None = None, beat: Callable[[int], None] | None = None
    ) -> None:
        self._writer, self._trackers, self._beat = writer, dict(trackers or {}), beat
        self._beaten = time.monotonic()

    def write(self, record: Record) -> None:
        """Append a record; see `JsonlWriter.write`."""
        self._writer.write(record)
        step = int(record["step"])
        values = {k: float(v) for k, v in record.items() if "/" in k and isinstance(v, int | float)}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, finite))
        if self._beat and time.monotonic() - self._beaten >= _BEAT_SECONDS:
            self._beaten = time.monotonic()
            with contextlib.suppress(StorageError):  # as for a line: the next one may find room
                self._beat(step)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            warn(f"{name} failed and is left out from now on: {' '.join(str(error).split())[:200]}")
            self._trackers.pop(name, None)

    def rewind(self, step: int, keep: Callable[[Record], bool] = lambda record: True) -> None:
        """Drop the lines of later steps; see `JsonlWriter.rewind`."""
        self._writer.rewind(step, keep)

    def flush(self) -> None:
        """Bring what was written to the disk; see `JsonlWriter.flush`."""
        self._writer.flush(sync=True)

    def close(self) -> None:
        """Close everything."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)
        self._writer.close()
