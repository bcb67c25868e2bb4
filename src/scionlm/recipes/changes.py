"""What has changed since a run was started, and what of it would change the result."""

from typing import Any, NamedTuple

from scionlm.core.errors import UsageError
from scionlm.core.log import warn
from scionlm.core.records import Record

# A change in these gives other numbers; in the rest of versions and device, other last bits at most.
_DECISIVE = ("versions.torch", "versions.transformers", "device.kind", "device.precision", "branch")
_INPUTS = {"source": "sha256", "data": "fingerprint", "upstream": "fingerprint", "teacher": "sha256"}


class Change(NamedTuple):
    """One difference between a manifest and what is there now."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.key} ({self.before} -> {self.now})"


def find_changes(before: Record, now: Record) -> list[Change]:
    """Return what differs between two manifests: inputs, versions of packages, commit, device, threads."""
    found = [Change("git_commit", before.get("git_commit"), now.get("git_commit"))]
    for section in ("versions", "device"):
        old, new = before.get(section, {}), now.get(section, {})
        found += [Change(f"{section}.{key}", old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    if now.get("branch"):  # not begun yet: it may have gone on, or another may stand there
        found.append(Change("branch", before.get("branch"), now["branch"]))
    old, new = before.get("stages", {}), now.get("stages", {})
    for name in (name for name in old if name in new):
        keys = ("data", "replayed")
        found += [Change(f"stages.{name}.{key}", old[name].get(key), new[name].get(key)) for key in keys]
    return [change for change in found if change.before != change.now]


def judge_changes(before: Record, now: Record, out: str, allow_change: bool) -> list[Change]:
    """Return what has changed since a run was started, after saying so.

    Raises:
        UsageError: Source or data are others; or something else that changes the result, and that is not allowed.
    """
    for what, key in _INPUTS.items():
        if what in before and what in now and before[what][key] != now[what][key]:
            raise UsageError(f"{out} was started with another {what}: its {key} has changed; use another folder")
    changes = find_changes(before, now)
    decisive = [change for change in changes if change.key in _DECISIVE or change.key.startswith("stages.")]
    if decisive and not allow_change:
        words = ", ".join(map(str, decisive))
        raise UsageError(
            f"{out} was started with something else that changes the result: {words}; restore it, or go on all the "
            "same with --allow-change"
        )
    if changes:
        bits = "" if decisive else "; losses will agree, though perhaps not to the last bit"
        warn(f"changed since {out} was started: {', '.join(map(str, changes))}{bits}")
    return changes
