"""The suites that papers judge their models by, as data: `suites.yaml` beside this file."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from scionlm.core.config import nearest
from scionlm.core.errors import UsageError

OFFLINE = "offline"
"""The suite that is made of one's own held-out text."""


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite.

    Attributes:
        task: lm-eval's name; a user's own, where it is of no suite.
        num_fewshot: Examples before the question; None is the task's own number.
        metric: What the suite's table shows; None takes the task's own.
        name: What the table calls it.
    """

    task: str
    num_fewshot: int | None = None
    metric: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: Ours.
        source: Paper and table.
        note: What the paper leaves open.
        tasks: In the table's order.
    """

    name: str
    source: str
    note: str
    tasks: tuple[SuiteTask, ...]


@cache
def suites() -> dict[str, Suite]:
    """Return all suites by name; `offline` is not among them, for it depends on data."""
    text = files("scionlm.evaluation").joinpath("suites.yaml").read_text(encoding="utf-8")
    return {
        name: Suite(name, entry["source"], entry["note"], tuple(SuiteTask(**task) for task in entry["tasks"]))
        for name, entry in yaml.safe_load(text).items()
    }


def suite_of(name: str) -> Suite:
    """Return a suite of a paper.

    Raises:
        UsageError: There is none of this name; the message lists them.
    """
    known = suites()
    if name not in known:
        names = [*known, OFFLINE]
        raise UsageError(f"unknown suite {name!r}{nearest(name, names)} (there are: {', '.join(names)})")
    return known[name]
