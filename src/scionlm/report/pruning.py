"""What pruning did: what was cut from what, how and at what cost, its losses, and whether the masks had settled."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scionlm.report.collect import Pruning, Run, losses_in
from scionlm.report.findings import known
from scionlm.report.html import Content, Markup, RowGroup, clip, facts, join, name_of, section, table, tag
from scionlm.report.pruning_charts import course_figure, finish_of, loss_figure
from scionlm.report.pruning_map import kept_figure, kept_table
from scionlm.report.pruning_read import (
    AXES,
    SIZES,
    Axis,
    axes_of,
    fidelity_words,
    method_of,
    method_words,
    shape_of,
    source_sizes,
    total_tokens,
)
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, count, duration, exact, listing, nats, percent, scientific

_MAX_STEPS, _MAX_DOMAINS, _MAX_CHECKS = 60, 8, 20
# Beyond it the masks had not come to a choice, and the page warns.
_TOLERANCE = 0.01
# Of the units that stay: where more than half of the masks were half open, which ones stay was a close thing.
_CLOSE = 0.5
_Record = Mapping[str, Any]
_CHOICES = {
    "masks": "Which units stay is learned: each has a mask, and masks and weights are trained together until only as "
    "many masks are open as the target has units.",
    "first": "The first units of every kind stay, whatever they are worth: this is what a choice has to be better "
    "than.",
    "random": "Which units stay is drawn by lot: this is what a choice has to be better than.",
}


def pruning_section(run: Run) -> Markup | None:
    """Return what was pruned, and how it went; None for a run that does not prune."""
    pruning = run.pruning
    if pruning is None:
        return None
    axes = axes_of(pruning.record)
    body = join(
        _words(run, pruning),
        _damage(run, pruning),
        tag("div", _cut(run, pruning), _how(run, pruning), class_="columns"),
        _losses(run, pruning),
        _steps(pruning),
        _settled(run, pruning, axes),
        loss_figure(run, pruning),
        tag("h3", "What stays", class_="sub") if mapping(pruning.record.get("plan")) else None,
        kept_figure(run, pruning),
        kept_table(run, pruning),
        _checks(pruning),
    )
    return section("pruning", "Pruning", body)


def _words(run: Run, pruning: Pruning) -> Markup:
    """Return what was cut from what, and how it was chosen."""
    source, shape = run.source, shape_of(run, pruning)
    of = [f"{source.num_layers:,} layers"] if source and source.num_layers is not None else []
    of += [f"{count(source.num_parameters)} parameters"] if source and source.num_parameters is not None else []
    name = name_of(source.name) if source and source.name else "a source without a name"
    sizes = [f"{exact(value)} {words}" for key, words in SIZES.items() if (value := number(shape, key)) is not None]
    tense = "was" if pruning.record else "is being" if run.status.state == "running" else "is to be"
    said: list[Content] = ["The source, ", name, f" ({', '.join(of)})" if of else "", f", {tense} pruned"]
    said.append(f" to {listing(sizes)}" if sizes else "")
    parameters = number(shape, "num_parameters")
    if parameters is not None:
        whole = source.num_parameters if source else None
        said.append(f": {count(parameters)} parameters{f', {percent(parameters / whole)} of it' if whole else ''}")
    return tag("p", [*said, ". "], _choice(run, pruning))


def _choice(run: Run, pruning: Pruning) -> Content:
    method, asked = method_of(run, pruning), mapping(run.config.get("prune"))
    if method != "scores":
        return _CHOICES.get(method, "")
    plan = mapping(pruning.record.get("plan"))
    width = text(plan, "width") or text(asked, "importance") or "activation"
    depth = text(plan, "strategy") or text(asked, "strategy") or "block_influence"
    rounds = pruning.record.get("pruning_steps")
    steps = len(rounds) if isinstance(rounds, list) else 0
    in_steps = f" in {steps} steps, measured anew in each" if steps > 1 else " in one go" if steps else ""
    return [
        f"What stays is chosen{in_steps} as what scores say is worth most: heads and channels by ",
        name_of(width, 40),
        ", layers by ",
        name_of(depth, 40),
        ".",
    ]


def _cut(run: Run, pruning: Pruning) -> Markup:
    """Return each size of the source and what is left of it."""
    shape, source = shape_of(run, pruning), source_sizes(run, pruning)
    pairs: list[tuple[Content, Content]] = []
    for key, words in {**SIZES, "num_parameters": "parameters"}.items():
        left, was = number(shape, key), source.get(key)
        if left is not None:
            many = key == "num_parameters"
            of = f" of {count(was) if many else exact(was)}" if was is not None else ""
            share = f", {percent(left / was)}" if was else ""
            pairs.append((words, f"{count(left) if many else exact(left)}{of}{share}"))
    return tag("div", tag("h3", "What is left" if pruning.record else "What is asked for"), facts(pairs))


def _how(run: Run, pruning: Pruning) -> Markup:
    """Return the method, the settings that matter, and what it took."""
    record, training = pruning.record, mapping(pruning.record.get("training"))
    method, settings = method_of(run, pruning), mapping(pruning.record.get("settings"))
    whole, tokens = total_tokens(run, pruning), pruning.tokens
    flops, steps = number(training, "flops"), number(training, "steps")
    checks = record.get("checks")
    share = f", {percent(tokens / whole)} of all" if tokens and whole else ""
    start = text(settings, "start")
    pairs: list[tuple[Content, Content]] = [
        ("pruned", method_words(method) if method else NONE),
        ("fidelity", _fidelity(run, pruning)),
        ("masks begin", "open" if start == "open" else ["by ", name_of(start, 30)] if start else None),
        ("constraint", name_of(settings["constraint"], 30) if text(settings, "constraint") else None),
        ("tokens", f"{count(tokens)}{share}" if tokens else "none: it is not trained" if pruning.is_done else None),
        ("steps", exact(steps) if steps else None),
        ("time", duration(number(training, "seconds")) if tokens else None),
        ("operations", scientific(flops) if flops and math.isfinite(flops) else None),
        ("proofs that hold", f"{len(checks)}" if isinstance(checks, list) and checks else None),
    ]
    return tag("div", tag("h3", "How"), facts(pairs))


def _fidelity(run: Run, pruning: Pruning) -> Content:
    fidelity = text(pruning.record, "fidelity") or text(run.config, "fidelity")
    if method_of(run, pruning) != "masks":
        return None  # no more than masks is learned in one way or another
    return None if fidelity is None else fidelity_words(fidelity) or name_of(fidelity, 30)


def _losses(run: Run, pruning: Pruning) -> Markup | None:
    """Return the held-out losses of the source, under the last masks, of what is left, and after the recovery."""
    record = pruning.record
    rows: list[tuple[Content, Mapping[str, float]]] = [
        (tag("b", "source", class_="source"), known(run.source.losses) if run.source else {}),
        ("source under its last masks", known(losses_in(record.get("masked")))),
        ("right after pruning", known(losses_in(record.get("domains")))),
        (tag("b", "after the recovery", class_="child"), known(run.child.after)),
        (tag("b", "control after training", class_="control"), known(run.control.after) if run.control else {}),
    ]
    rows = [(title, losses) for title, losses in rows if losses]
    if not pruning.is_done or not rows:
        return None
    names = [name for name in known(losses_in(record.get("domains"))) if all(name in losses for _, losses in rows)]
    if not names:
        return None
    means = [sum(losses[name] for name in names) / len(names) for _, losses in rows]
    shown = names[:_MAX_DOMAINS] if len(names) > 1 else []
    cells: list[list[Content]] = [
        [title, nats(mean, 3), *(nats(losses[name], 3) for name in shown)]
        for (title, losses), mean in zip(rows, means, strict=True)
    ]
    header = ["", "mean" if shown else "nats", *(name_of(name, 40) for name in shown)]
    caption = "Held-out loss on the way, in nats per token; lower is better"
    more = len(names) - len(shown) if shown else 0
    note = tag("p", f"{more} more domains are in result.json.", class_="note") if more else None
    return join(table("pruning-losses", caption, header, [RowGroup(None, cells)]), note)


def _damage(run: Run, pruning: Pruning) -> Markup | None:
    """Return in a sentence what pruning cost and what the recovery brought back."""
    losses = [known(run.source.losses) if run.source else {}, known(losses_in(pruning.record.get("domains")))]
    after = known(run.child.after)
    names = [name for name in losses[0] if all(name in each for each in ([*losses, after] if after else losses))]
    if not names:
        return None
    source, cut = (sum(each[name] for name in names) / len(names) for each in losses)
    child = sum(after[name] for name in names) / len(names) if after else None
    mean = f" (means over {len(names)} domains)" if len(names) > 1 else ""
    said = (
        f"Pruning {'raises' if cut >= source else 'lowers'} the held-out loss from {nats(source)} to {nats(cut)} nats"
    )
    if child is None:
        return tag("p", f"{said}{mean}; how much of that the recovery brings back is not known yet.")
    way = f", {percent((cut - child) / (cut - source))} of the way" if cut - source > 1e-9 and child <= cut else ""
    verb = "brings it back to" if child <= cut else "ends at"
    return tag("p", f"{said}; the recovery {verb} {nats(child)}{way}{mean}.")


def _steps(pruning: Pruning) -> Markup | None:
    """Return the steps in which scores cut, with the shape that each left."""
    found = pruning.record.get("pruning_steps")
    steps = [mapping(one) for one in found][:_MAX_STEPS] if isinstance(found, list) else []
    if len(steps) < 2:
        return None
    rows: list[list[Content]] = []
    for place, one in enumerate(steps, 1):
        shape, tokens = mapping(one.get("shape")), number(one, "tokens")
        rows.append(
            [
                f"step {place}",
                *(exact(number(shape, key)) for key in SIZES),
                count(number(shape, "num_parameters")),
                count(tokens),
                (duration(number(one, "seconds")) if tokens else None) or NONE,
            ]
        )
    header = ["", *SIZES.values(), "parameters", "tokens", "time"]
    note = "After each step what is left is trained on its part of the tokens, and measured again before the next cut."
    trained = any(number(one, "tokens") for one in steps)
    made = table("pruning-steps", "Step by step", header, [RowGroup(None, rows)])
    return join(made, tag("p", note, class_="note") if trained else None)


def _settled(run: Run, pruning: Pruning, axes: Sequence[Axis]) -> Markup | None:
    """Return whether the masks had come to a choice: how they went there, and where they ended."""
    figure = course_figure(pruning)
    if figure is None and not axes:
        return None
    title = tag("h3", "Did the masks settle?", class_="sub")
    return join(title, _verdict(pruning, axes), figure, _axis_table(axes))


def _verdict(pruning: Pruning, axes: Sequence[Axis]) -> Markup | None:
    if not axes:
        return tag("p", "Not known yet: masks are still being learned.")
    dead = [axis for axis in axes if axis.exceeds(axis.dead, _TOLERANCE)]
    far = [axis for axis in axes if axis.exceeds(axis.distance, _TOLERANCE)]
    if not dead and not far:
        close = [axis for axis in axes if axis.exceeds(axis.fractional, _CLOSE)]
        yes = "Yes" if not close else "In their number, yes"
        named = listing([f"{axis.words} {axis.shown(axis.fractional)}" for axis in close])
        but = f" But many of those that stay were half open ({named}): which ones stay was a close thing."
        return tag(
            "p",
            f"{yes}: on every axis the share of open units is within 1% of the target, and of the units that stay at "
            "most 1% had a closed mask.",
            but if close else "",
        )
    every = len({axis.name for axis in (*dead, *far)}) == len(axes)
    said: list[Content] = [tag("strong", "No. " if every else "Not everywhere. ")]
    if far:
        worst = listing([f"{axis.words} {axis.shown(axis.distance)}" for axis in far])
        said.append(
            f"The masks missed the target by more than 1% of the units ({worst} in the row that is furthest off): "
            "by themselves they would have kept another number, and were brought to the target's. "
        )
    if dead:
        worst = listing([f"{axis.words} {axis.shown(axis.dead)}" for axis in dead])
        said.append(
            f"More than 1% of the units that stay are dead ({worst}): their masks were as good as closed, so the rest "
            "was trained as if they were not there, and they were kept to fill up the number. "
        )
    return tag("aside", tag("p", said), tag("p", _advice(pruning, bool(dead))), class_="banner stopped")


def _advice(pruning: Pruning, dead: bool) -> Content:
    settings, finish = mapping(pruning.record.get("settings")), finish_of(pruning)
    steps = number(mapping(pruning.record.get("training")), "steps")
    parts: list[Content] = []
    if dead and finish is not None and steps:
        parts.append(
            f"The last {exact(steps - finish)} steps had hard masks, in which such units were trained as open ones. "
            if finish < steps
            else "There was no end with hard masks: the recovery is the first to train them. "
        )
    if dead and settings.get("constraint") == "published":
        code = tag("code", "prune.gates.constraint: calibrated")
        parts += ["The published constraint counts a closed mask as slightly open and so asks for some; ", code]
        return [*parts, " does not."]
    more = [tag("code", "prune.tokens"), " or a larger ", tag("code", "prune.gates.multiplier_lr")]
    return [*parts, "More ", *more, " give the masks more time or more force to meet the target."]


def _axis_table(axes: Sequence[Axis]) -> Markup | None:
    if not axes:
        return None
    rows = [list(_axis_cells(axis)) for axis in axes]
    header = ("", "of each row stay", "rows", "open / target", "furthest row", "dead", "in between", "margin")
    folded = any(axis.folded for axis in axes)
    notes: list[tuple[str, str]] = [
        ("Row", "units that are chosen from together: all hidden channels are one, MLP channels one a layer."),
        (
            "Open / target",
            "the share of the units that the masks would have left open on average when they moved last, beside the "
            "share that the target has. Furthest row: how far the worst row is from it, in % of its units.",
        ),
        ("Dead", "units that stay though their mask was as good as closed (below 0.05)."),
        ("In between", "units that stay whose mask was half open (0.05 to 0.95)" + _soft(folded)),
        (
            "Margin",
            "how much likelier the last unit that stays was to be open than the first that goes, in the closest row; "
            "near 0 lots might as well have been drawn between those two.",
        ),
    ]
    listed = tag("ul", [tag("li", tag("b", f"{word}: "), what) for word, what in notes], class_="note")
    return join(table("pruning-axes", "The masks at their end", header, [RowGroup(None, rows)]), listed)


def _soft(folded: bool) -> str:
    return "; their masks were multiplied into the weights." if folded else "; in the end they were opened."


def _axis_cells(axis: Axis) -> Iterable[Content]:
    yield axis.words if axis.name in AXES else name_of(axis.name, 40)
    yield f"{exact(axis.target)} of {exact(axis.units)}"
    yield exact(axis.rows)
    yield f"{axis.shown(axis.open)} / {axis.shown(axis.goal)}"
    for value, is_bad in ((axis.distance, True), (axis.dead, True), (axis.fractional, False)):
        shown = axis.shown(value)
        yield tag("b", shown, class_="bad") if is_bad and axis.exceeds(value, _TOLERANCE) else shown
    yield nats(axis.margin, 3)


def _checks(pruning: Pruning) -> Markup | None:
    """Return the proofs that hold of what is left, folded away."""
    checks = pruning.record.get("checks")
    words = [one for one in checks if isinstance(one, str)][:_MAX_CHECKS] if isinstance(checks, list) else []
    if not words:
        return None
    listed = tag("ul", [tag("li", clip(one, 200)) for one in words], class_="note")
    return tag("details", tag("summary", "What was proven"), listed)
