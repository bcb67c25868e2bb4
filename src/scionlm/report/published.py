"""What papers report of models on their suites: `published.yaml` beside this file."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class PublishedRow:
    """A model in a paper's table: scores in per cent, by the suite's task."""

    model: str
    tokens: float | None
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """Plain mean of the scores."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class PublishedTable:
    """A paper's table of a suite."""

    source: str
    note: str
    rows: tuple[PublishedRow, ...]


@cache
def published() -> dict[str, PublishedTable]:
    """Return the tables by the name of their suite."""
    text = files("scionlm.report").joinpath("published.yaml").read_text(encoding="utf-8")
    return {
        name: PublishedTable(
            table["source"],
            table.get("note", ""),
            tuple(
                PublishedRow(row["model"], row["tokens"], dict(zip(table["tasks"], row["scores"], strict=True)))
                for row in table["rows"]
            ),
        )
        for name, table in yaml.safe_load(text).items()
    }
