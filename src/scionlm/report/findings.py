"""The few numbers that answer "was it worth it?": means over domains, and the share of the gap that was closed.

    share = (control - child) / (control - source)      all three the plain mean over the same domains

0 means the child is no better than the same shape from random weights, 1 that it is as good as its source.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scionlm.report.collect import Losses, Run
from scionlm.report.curves import Curves
from scionlm.report.values import mapping, number

_Values = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """Mean held-out losses in nats over `domains`; None where one was not measured on them."""

    domains: tuple[str, ...]
    child: float | None
    before: float | None
    source: float | None
    control: float | None
    partial: bool

    @property
    def gap_closed(self) -> float | None:
        """The share of the gap between control and source that the child closed."""
        return gap_closed(self.child, self.control, self.source)

    @property
    def recovered(self) -> float | None:
        """The same against the child before training: how much of the damage of the cut training undid."""
        return gap_closed(self.child, self.before, self.source)


def speed(run: Run) -> float | None:
    """Return the tokens that the child saw in a second; of one that was pruned, from the first step of pruning on."""
    training = run.child.training
    tokens, seconds = number(training, "tokens"), number(training, "seconds")
    if run.pruning is not None and tokens is not None and seconds:
        return tokens / seconds
    return number(training, "tokens_per_s")


def last_seconds(run: Run) -> float | None:
    """Return how long the phase took that teacher and checkpoints are recorded of: what was pruned has two."""
    training = run.child.training
    recovery = number(mapping(training.get("recovery")), "seconds")
    return number(training, "seconds") if recovery is None else recovery


def gap_closed(child: float | None, start: float | None, source: float | None) -> float | None:
    """Return (start - child) / (start - source); None without all three, or where there is no gap to close."""
    if child is None or start is None or source is None:
        return None
    return (start - child) / (start - source) if start - source > 1e-9 else None


def find(run: Run) -> Finding:
    """Return the means of a run: of its exported files once it is done, of its last evaluation before that."""
    child = known(run.child.after) or last_losses(run.child.curves)
    before = known(run.child.before) or first_losses(run.child.curves)
    source = known(run.source.losses) if run.source else {}
    control = (known(run.control.after) or last_losses(run.control.curves)) if run.control else {}
    # Means compare only over the same domains; a model that shares none is left out rather than the others.
    domains = list(child)
    for other in (source, control):
        shared = [name for name in domains if name in other]
        domains = shared or domains
    return Finding(
        domains=tuple(domains),
        child=mean_of(child, domains),
        before=mean_of(before, domains),
        source=mean_of(source, domains),
        control=mean_of(control, domains),
        partial=len(domains) < len(child),
    )


def known(losses: Losses) -> _Values:
    """Return the losses that were measured and are finite."""
    return {name: loss.nll for name, loss in losses.items() if loss.nll is not None and math.isfinite(loss.nll)}


def first_losses(curves: Curves) -> _Values:
    """Return what the curves say of the model before its first step."""
    first = {name: points[0] for name, points in curves.domains.items()}
    return {name: point.nll for name, point in first.items() if point.step == 0 and math.isfinite(point.nll)}


def last_losses(curves: Curves) -> _Values:
    """Return the last finite losses of the curves."""
    finite = {
        name: [point.nll for point in points if math.isfinite(point.nll)] for name, points in curves.domains.items()
    }
    return {name: values[-1] for name, values in finite.items() if values}


def mean_of(losses: Mapping[str, float], domains: Iterable[str]) -> float | None:
    """Return the plain mean of the losses over domains; None where one of them lacks, or there are none."""
    names = list(domains)
    return sum(losses[name] for name in names) / len(names) if names and all(name in losses for name in names) else None
