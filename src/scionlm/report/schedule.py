"""The learning rate as planned and as it was, what was planned beside what was spent, and what went wrong."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scionlm.report.collect import Run
from scionlm.report.curves import Curves, thinned
from scionlm.report.findings import last_seconds, speed
from scionlm.report.html import Content, Markup, RowGroup, card, clip, join, name_of, section, table, tag
from scionlm.report.linechart import Chart, Series, responsive_chart
from scionlm.report.svg import Caption
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, duration, exact, quantity, scientific, size

_POINTS, _STAGES, _MARKS = 300, 20, 20


def schedule_section(run: Run) -> Markup | None:
    """Return how the learning rate moved and what the run took; None where neither a plan nor a rate was written."""
    planned, taken = _planned(run), thinned(run.child.curves.lr, _POINTS)
    if not planned and not taken:
        return None
    series = [Series("planned", planned, "source", thin=True)] if planned else []
    series += [Series("used", taken, "child", end=f"{taken[-1][1]:.3g}")] if taken else []
    chart = Chart(series, x_label="steps", y_label="learning rate")
    caption = Caption("rate", "Learning rate over the steps of training", _described(series))
    figure = card(responsive_chart(caption, chart), _note(run))
    body = join(figure, _events(run), _spent(run))
    return section("rate-and-cost", "Learning rate and cost", body)


def _stages(run: Run) -> list[Any]:
    stages = run.plan.get("stages")
    return [mapping(stage) for stage in stages[:_STAGES]] if isinstance(stages, list) else []


def _planned(run: Run) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for stage in _stages(run):
        curve = stage.get("curve")
        for pair in curve if isinstance(curve, list) else []:
            if isinstance(pair, list) and len(pair) == 2 and all(_is_finite(value) for value in pair):
                points.append((float(pair[0]), float(pair[1])))
    return list(thinned(points, _POINTS))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _described(series: Sequence[Series]) -> str:
    return " ".join(f"{one.name}: from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}." for one in series)


def _note(run: Run) -> Content:
    of = "" if run.pruning is None else " Of the recovery alone; pruning has a schedule of its own."
    stages = [(text(stage, "name") or NONE, text(stage, "schedule") or NONE) for stage in _stages(run)]
    if not stages:
        return f"The learning rate that each update was made with.{of}"
    words = "; ".join(f"{clip(name, 40)}: {clip(schedule, 200)}" for name, schedule in stages)
    return f"Strong: what each update was made with. Faint: as planned. {words}.{of}"


def _events(run: Run) -> Markup | None:
    """Return what went wrong: of a run that is not done, or has diverged, the metrics alone know."""
    training, lines = run.child.training, list[str]()
    for name, course in run.phases[:-1]:
        lines += [f"{name}: {words}" for words in _went_wrong(course, None, None)]
    known = (number(training, "skipped_updates"), number(training, "loss_spikes"))
    lines += _went_wrong(run.child.curves, *known)
    return tag("p", " ".join(lines)) if lines else None


def _went_wrong(course: Curves, skipped: float | None, spikes: float | None) -> Iterable[str]:
    if skipped := max(skipped or 0, len(course.skipped)):
        steps = _steps(course.skipped)
        yield f"{exact(skipped)} update(s) were left out because their loss or gradient was not finite{steps}."
    if spikes := max(spikes or 0, len(course.spikes)):
        yield f"The loss leapt {exact(spikes)} time(s) far above its recent course{_steps(course.spikes)}."


def _steps(found: Sequence[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in found[:_MARKS])
    more = f" and {len(found) - _MARKS:,} more" if len(found) > _MARKS else ""
    return f" (step {shown}{more})" if found else ""


def _spent(run: Run) -> Markup | None:
    plan, training = run.plan, run.child.training
    tokens, flops, planned_s = _planned_costs(run)
    rows = [
        ("tokens", _show(exact, tokens), _show(exact, number(training, "tokens"))),
        ("operations", _show(scientific, flops), _show(scientific, number(training, "flops"))),
        ("training time", duration(planned_s) or NONE, _training_time(run)),
        (
            "memory",
            size(number(plan, "memory_bytes_per_device")) or NONE,
            size(number(training, "peak_memory_bytes")) or NONE,
        ),
        ("of the device's peak speed", _share(number(plan, "utilization")), _share(_mfu(run))),
        ("time spent saving", NONE, _share(_saving(run))),
    ]
    if all(planned == NONE and spent == NONE for _, planned, spent in rows):
        return None
    formula = text(training, "mfu_formula")
    note = tag("p", f"Share of the peak: {clip(formula, 300)}.", class_="note") if formula else None
    shown = [(name_of(name), planned, spent) for name, planned, spent in rows]
    title = "Planned and spent, by model" if run.pruning is None else "Planned and spent, pruning and recovery together"
    return join(table("cost", title, ("", "planned", "spent"), [RowGroup(None, shown)]), note)


def _planned_costs(run: Run) -> tuple[float | None, float | None, float | None]:
    """Return tokens, operations and seconds that were planned for the child, without its control."""
    plan, parts = run.plan, run.plan.get("rounds")
    if isinstance(parts, list):
        phases = [mapping(part) for part in parts]
        phases = _of_the_child(run, [part for part in phases if text(part, "name") not in ("reference", "control")])
        tokens, flops, seconds = (_sum(phases, key) for key in ("num_tokens", "flops", "seconds"))
        return tokens, flops, seconds
    by_part, models = mapping(plan.get("seconds_by_part")), number(plan, "models_trained") or 1
    training, teacher = number(by_part, "training"), number(by_part, "teacher")
    seconds = None if training is None else (training + (teacher or 0.0)) / models
    return number(plan, "num_tokens"), number(plan, "flops"), seconds


def _of_the_child(run: Run, phases: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return those that the child's own weights went through: of rounds of growth the chosen one, or all up to it."""
    chosen = number(run.growth, "result_round")
    if chosen is None:
        return phases
    goes_on = text(mapping(run.config.get("grow")), "from") == "student"
    return phases[0 if goes_on else int(chosen) - 1 : int(chosen)]


def _sum(records: Sequence[Any], key: str) -> float | None:
    values = [value for record in records if (value := number(record, key)) is not None]
    return sum(values) if values and len(values) == len(records) else None


def _training_time(run: Run) -> str:
    seconds, pace = number(run.child.training, "seconds"), speed(run)
    if seconds is None:
        return NONE
    return (duration(seconds) or NONE) + (f", {quantity(pace)} tokens/s" if pace is not None else "")


def _mfu(run: Run) -> float | None:
    training = run.child.training
    peak = number(mapping(training.get("peak_flops")), "flops_per_s")
    flops, seconds = number(training, "flops"), number(training, "seconds")
    devices = number(training, "devices") or 1.0  # the peak is one's, the operations are those of all
    return flops / seconds / peak / devices if peak and flops and seconds else None


def _saving(run: Run) -> float | None:
    saving, seconds = number(run.child.training, "checkpoint_seconds"), last_seconds(run)
    return saving / (saving + seconds) if saving is not None and seconds else None


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _show(how: Any, value: float | None) -> str:
    return NONE if value is None else how(value)
