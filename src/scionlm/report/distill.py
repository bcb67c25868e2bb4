"""What was learned from a teacher: what from whom, the parts of the loss over training, and what the teacher cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scionlm.report.collect import Run
from scionlm.report.curves import Curves, Point, averaged
from scionlm.report.findings import last_seconds
from scionlm.report.html import Content, Markup, RowGroup, card, facts, join, name_of, section, table, tag
from scionlm.report.linechart import Chart, Series, responsive_chart
from scionlm.report.svg import Caption
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, count, duration, exact, percent, size

_POINTS = 300
_WORDS = {
    "forward_kl": "KL divergence of the student from the teacher",
    "reverse_kl": "KL divergence of the teacher from the student",
    "jensen_shannon": "Jensen-Shannon divergence of the two",
    "mse": "squared difference over the teacher's squared length",
    "cosine": "one minus the cosine",
}
# Parts of the loss in nats: key of the metric, name, color.
_NATS = (
    ("loss_nats", "loss", "child"),
    ("divergence_nats", "divergence by temperature squared", "source"),
    ("z_loss_nats", "z-loss", "soft"),
)


def distill_section(run: Run) -> Markup | None:
    """Return what a teacher gave and took, and the parts of the loss; None where the loss is cross-entropy alone."""
    settings, phases = mapping(run.config.get("distill")), [one for one in run.phases if one[1].parts]
    if not (number(settings, "weight") or settings.get("hidden")):
        settings = {}  # then nobody was asked
    if not settings and not phases:
        return None
    title = "Learning from the teacher" if settings else "Parts of the loss"
    body = join(
        _words(run, settings) if settings else None,
        *(_phase(k, name, course) for k, (name, course) in enumerate(phases)),
        _cost(run) if settings else None,
    )
    return section("distill", title, body)


def _words(run: Run, settings: Mapping[str, Any]) -> Markup:
    teacher = text(mapping(run.manifest.get("teacher")), "name") or text(settings, "teacher") or NONE
    weight, heat, top = (number(settings, key) for key in ("weight", "temperature", "top_k"))
    hidden = mapping(settings.get("hidden"))
    moves = text(settings, "schedule")
    learned = ["the divergence from the teacher's distribution of the next token"] if weight else []
    learned += ["the error of its hidden states beside the teacher's"] if hidden else []
    pairs: list[tuple[Content, Content] | None] = [
        ("teacher", name_of(teacher)),
        ("weight", _number(weight) + (f", {moves} to {_ratio(settings)}" if moves not in (None, "constant") else "")),
        ("divergence", _WORDS.get(text(settings, "loss") or "", NONE)) if weight else None,
        ("temperature", _number(heat)) if weight else None,
        ("told apart", f"its {top:.0f} most likely tokens") if weight and top else None,
        ("hidden states", f"{_WORDS.get(text(hidden, 'loss') or '', NONE)}, weight {_number(number(hidden, 'weight'))}")
        if hidden
        else None,
    ]
    return join(
        tag(
            "p",
            "Beside the text, the student learned from what a teacher makes of it: the loss is cross-entropy and "
            f"{' and '.join(learned)}, by weight.",
        ),
        facts([pair for pair in pairs if pair is not None]),
    )


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _ratio(settings: Mapping[str, Any]) -> str:
    return f"{_number(number(settings, 'final_ratio'))} of it"


def _phase(number_of: int, name: str, course: Curves) -> Markup:
    """Return the drawings of one phase of training."""
    mark, behind = f"-{number_of}" if number_of else "", f": {name[:1].lower()}{name[1:]}" if name else ""
    nats = _nats_figure(course.train, course.parts, mark, behind)
    return join(nats, _hidden_figure(course.parts.get("hidden_error_ratio", ()), mark, behind))


def _nats_figure(train: Sequence[Point], parts: Mapping[str, Sequence[Point]], mark: str, behind: str) -> Markup | None:
    series = [Series("cross-entropy", _line(train), "control", end="cross-entropy")] if train else []
    series += [Series(name, _line(parts[key]), tone, end=name) for key, name, tone in _NATS if parts.get(key)]
    if len(series) < 2:
        return None
    title, note = f"Parts of the training loss{behind}", "The loss is what is trained on."
    return _figure(series, f"parts{mark}", title, "nats per token", note)


def _hidden_figure(points: Sequence[Point], mark: str, behind: str) -> Markup | None:
    if not points:
        return None
    series = [Series("hidden states", _line(points), "child", end="error")]
    note = "0 where the student's layers give what the teacher's do."
    return _figure(series, f"hidden{mark}", f"Error of the hidden states{behind}", "error", note)


def _figure(series: Sequence[Series], ident: str, title: str, y_label: str, note: str) -> Markup:
    chart = Chart(series, x_label="tokens trained on", y_label=y_label)
    described = " ".join(f"{s.name}: from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}." for s in series if s.points)
    return card(responsive_chart(Caption(ident, title, described), chart), note, title)


def _line(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.tokens, point.nll) for point in averaged(points, _POINTS)]


def _cost(run: Run) -> Markup | None:
    training, plan = run.child.training, run.plan
    distill = mapping(training.get("distill"))
    seconds, whole = number(distill, "teacher_seconds"), last_seconds(run)
    models = number(plan, "models_trained") or 1
    planned = number(mapping(plan.get("seconds_by_part")), "teacher")
    rows: list[tuple[Content, ...]] = [
        ("parameters", NONE, _shown(count, number(distill, "num_parameters"))),
        ("steps that it was asked in", NONE, _shown(exact, number(distill, "teacher_steps"))),
        ("time", duration(planned / models) if planned is not None else NONE, duration(seconds) or NONE),
        ("of the training time", NONE, _shown(percent, seconds / whole if seconds is not None and whole else None)),
        ("memory", size(number(mapping(plan.get("memory_by_part")), "teacher")) or NONE, NONE),
    ]
    if all(_is_empty(row) for row in rows):
        return None
    return table("teacher-cost", "What the teacher took, by model", ("", "planned", "spent"), [RowGroup(None, rows)])


def _is_empty(row: Sequence[Content]) -> bool:
    return all(cell == NONE for cell in row[1:])


def _shown(how: Any, value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else how(value)
