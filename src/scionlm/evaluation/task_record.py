"""How task scores are written down: figures by task, and what became of each item."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scionlm.core.records import Record


@dataclass
class TaskResults:
    """Scores of tasks.

    Attributes:
        tasks: By name: `{METRIC, METRIC_stderr, ..., num_items, num_fewshot, version, config_sha256}`.
        items: By name: `{metric, scores, sha256}`, see `item_record`.
        about: What they were made with: library, seeds, batch size.
    """

    tasks: Record = field(default_factory=dict)
    items: Record = field(default_factory=dict)
    about: Record = field(default_factory=dict)

    def add(self, other: "TaskResults") -> None:
        """Take up the scores of more tasks."""
        self.tasks |= other.tasks
        self.items |= other.items
        self.about |= other.about


def item_record(metric: str, scores: Sequence[float], sha256: str) -> Record:
    """Return the scores of single items: of right and wrong a string of 1 and 0, else a list of numbers.

    Args:
        metric: What they are.
        scores: One an item, in the task's order.
        sha256: Hash of the items: scores of two models are only paired where it is the same.
    """
    if all(value in (0, 1) for value in scores):
        return {"metric": metric, "scores": "".join(str(int(value)) for value in scores), "sha256": sha256}
    return {"metric": metric, "scores": [round(float(value), 6) for value in scores], "sha256": sha256}


def item_scores(record: Record) -> list[float]:
    """Return the scores of single items from their record."""
    return [float(value) for value in record["scores"]]
