"""Which of what rounds of growth left behind is the result's own: one file of metrics has all of them in a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scionlm.report.values import integer, mapping, number, text

_Record = Mapping[str, Any]


def folder_of_result(run: Path, growth: _Record) -> Path | None:
    """Return the folder of the round whose child is the result; None before there is one."""
    chosen = integer(growth, "result_round")
    return None if chosen is None else run / "rounds" / f"round-{chosen:02d}"


def own_lines(lines: Sequence[_Record], growth: _Record, config: _Record) -> tuple[Sequence[_Record], float]:
    """Return the metrics of what the child's own weights went through, and the tokens of the rounds before that.

    Steps and tokens of rounds are counted on from one to the next. Where each began anew only those of the chosen one
    are the child's, counted from its own beginning; where each went on, those of all rounds up to it.

    Args:
        lines: RUN/metrics.jsonl.
        growth: RUN/rounds.json; empty of a run that does not grow.
        config: The recipe.
    """
    chosen, rounds = integer(growth, "result_round"), growth.get("rounds")
    if chosen is None or not isinstance(rounds, list):
        return lines, 0.0
    if text(mapping(config.get("grow")), "from") == "student":
        return [line for line in lines if (integer(line, "round") or 0) <= chosen], 0.0
    earlier = [mapping(one) for one in rounds[: chosen - 1]]
    steps, tokens = (sum(number(one, key) or 0 for one in earlier) for key in ("steps", "tokens"))
    return [_counted_from(line, steps, tokens) for line in lines if integer(line, "round") == chosen], tokens


def _counted_from(line: _Record, steps: float, tokens: float) -> _Record:
    behind = {"step": steps, "tokens": tokens}
    return {**line, **{key: at - before for key, before in behind.items() if (at := number(line, key)) is not None}}
