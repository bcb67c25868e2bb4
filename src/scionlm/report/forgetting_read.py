"""What a continued model learned of the new and forgot of the old, as its result records it or its metrics show it.

    forgetting = after - before       mean over upstream domains, those that it knew: higher is worse
    adaptation = before - after       mean over downstream domains, the others: higher is better
    net        = adaptation - forgetting
All in nats per token of the same held-out tokens; means are plain ones over domains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scionlm.report.collect import Run
from scionlm.report.curves import Point, mean_over
from scionlm.report.findings import first_losses, known, last_losses, mean_of
from scionlm.report.values import integer, mapping, number, text

_MAX_STAGES = 20


@dataclass(frozen=True)
class Side:
    """The mean loss over some domains; what is not known is None, and so is a peak that no curve shows."""

    domains: tuple[str, ...]
    before: float | None
    after: float | None
    peak: Point | None

    @property
    def change(self) -> float | None:
        """By how much the loss rose."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class StageSide:
    """The mean loss over the domains that were first seen in a stage."""

    name: str
    domains: tuple[str, ...]
    before: float | None
    at_its_end: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        """By how much the loss rose since the stage ended."""
        return None if self.at_its_end is None or self.after is None else self.after - self.at_its_end


@dataclass(frozen=True)
class Forgetting:
    """Both sides, and the stages where there are several; `final` where the losses are those of the exported model."""

    upstream: Side | None
    downstream: Side | None
    stages: tuple[StageSide, ...] = ()
    final: bool = False

    @property
    def forgetting(self) -> float | None:
        """Nats lost on what it knew."""
        return self.upstream.change if self.upstream else None

    @property
    def adaptation(self) -> float | None:
        """Nats gained on what is new."""
        change = self.downstream.change if self.downstream else None
        return None if change is None else -change

    @property
    def net(self) -> float | None:
        """What it gained less what it lost."""
        forgetting, adaptation = self.forgetting, self.adaptation
        return None if forgetting is None or adaptation is None else adaptation - forgetting


@dataclass(frozen=True)
class Stretch:
    """A stage as a stretch of training: it begins after so many steps and tokens; `end` is None of the last."""

    name: str
    step: int
    tokens: float
    end: int | None


def forgetting_of(run: Run) -> Forgetting | None:
    """Return what was learned and forgotten; None of a run that does not continue, or while nothing is known."""
    if not run.continues:
        return None
    record = run.forgetting
    recorded = [_recorded(run, mapping(record.get(key))) for key in ("upstream", "downstream")]
    if any(recorded):
        return Forgetting(recorded[0], recorded[1], _stages(record.get("stages")), final=True)
    measured = list(run.child.curves.domains) or list(known(run.child.before))
    old = tuple(name for name in measured if name in run.upstream)
    if not old:
        return None  # what is new is what is left, and of what nothing is known
    new = tuple(name for name in measured if name not in old)
    upstream, downstream = (side_of(run, names) for names in (old, new))
    if not any(side.change is not None for side in (upstream, downstream) if side):
        return None
    return Forgetting(upstream, downstream, final=bool(known(run.child.after)))


def side_of(run: Run, domains: tuple[str, ...]) -> Side | None:
    """Return the mean loss over domains as measured on the way and at the end; None of no domains."""
    if not domains:
        return None
    curves = run.child.curves
    # Measured as what is exported is, in float32; the first evaluation is in the precision of training.
    source = known(run.source.losses) if run.source is not None and not mapping(run.config.get("branch")) else {}
    before = source if all(name in source for name in domains) else known(run.child.before) or first_losses(curves)
    after = known(run.child.after) or last_losses(curves)
    return Side(domains, mean_of(before, domains), mean_of(after, domains), _peak(mean_over(curves, domains)))


def _peak(points: Sequence[Point]) -> Point | None:
    return max((point for point in points if math.isfinite(point.nll)), key=lambda point: point.nll, default=None)


def _recorded(run: Run, record: Mapping[str, Any]) -> Side | None:
    """Return a side as recorded; None where its losses are not."""
    domains = _names(record.get("domains"))
    before, after = (_finite(record, key) for key in ("before", "after"))
    if before is None and after is None:
        return None
    peak = mapping(record.get("peak"))
    highest, step, tokens = _finite(peak, "nll"), integer(peak, "step"), _finite(peak, "tokens")
    if highest is None or step is None or tokens is None:
        return Side(domains, before, after, _peak(mean_over(run.child.curves, domains)))
    return Side(domains, before, after, Point(step, tokens, highest))


def _stages(found: object) -> tuple[StageSide, ...]:
    records = [mapping(one) for one in found[:_MAX_STAGES]] if isinstance(found, list) else []
    return tuple(
        StageSide(
            text(one, "name") or "",
            _names(one.get("domains")),
            *(_finite(one, key) for key in ("before", "at_its_end", "after")),
        )
        for one in records
        if one
    )


def _names(found: object) -> tuple[str, ...]:
    return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()


def _finite(record: Mapping[str, Any], key: str) -> float | None:
    value = number(record, key)
    return value if value is not None and math.isfinite(value) else None


def stretches_of(run: Run) -> list[Stretch]:
    """Return the stages in order, by the plan; one stretch without a name where no plan tells of several."""
    found = run.plan.get("stages")
    stages = [mapping(one) for one in found[:_MAX_STAGES]] if isinstance(found, list) else []
    sizes = [(integer(one, "steps"), _finite(one, "tokens")) for one in stages]
    if len(stages) < 2 or any(not steps or steps < 0 or tokens is None for steps, tokens in sizes):
        return [Stretch("", 0, 0.0, None)]
    stretches: list[Stretch] = []
    step, tokens = 0, 0.0
    for one, (size, amount) in zip(stages, sizes, strict=True):
        end = step + (size or 0)
        # A run may go on for longer than was planned, so the last stage has no end.
        stretches.append(Stretch(text(one, "name") or "", step, tokens, end if one is not stages[-1] else None))
        step, tokens = end, tokens + (amount or 0.0)
    return stretches
