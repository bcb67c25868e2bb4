"""The runs of one sweep beside each other: what one has measured of a source, the others need not."""

from pathlib import Path

from scionlm.core.config import load_yaml
from scionlm.core.errors import ScionError
from scionlm.core.log import say
from scionlm.core.records import Record, read_json

RUNS = "runs"
"""Folder of the runs in that of their sweep."""


def is_in_sweep(run: Path) -> bool:
    """Return whether a run folder is one of a sweep's."""
    if run.parent.name != RUNS:
        return False
    try:
        return load_yaml(run.parent.parent / "config.yaml").get("recipe") == "sweep"
    except ScionError:  # none, or somebody else's: any folder may be called so
        return False


def measured_beside(run: Path, path: Path, conditions: Record) -> Record | None:
    """Return the record at the same place in another run of the sweep, if it was made under the same conditions.

    Args:
        run: The run folder.
        path: The place in it.
        conditions: All that decides what the record holds; it stands in the record.
    """
    place = path.relative_to(run)
    for other in sorted(run.parent.iterdir()):
        if (other / place).exists() and (record := read_json(other / place)).get("conditions") == conditions:
            say(f"{place.name}: taken from run {other.name}, which has measured the same")
            return record
    return None
