"""What came of the run, in words first: the headline, the verdict on the gap, the state of an unfinished run."""

import math
from collections.abc import Iterable

from scionlm.report.collect import Run
from scionlm.report.findings import Finding, gap_closed, known, last_losses, speed
from scionlm.report.forgetting_read import forgetting_of
from scionlm.report.forgetting_words import continued_lead, continued_tiles
from scionlm.report.html import Content, Markup, card, clip, join, name_of, tag
from scionlm.report.pruning_read import method_of, method_words
from scionlm.report.svg import Caption, Mark, bars, gap_bar, responsive
from scionlm.report.values import mapping, number
from scionlm.report.wording import NONE, NOT_FINITE, article, count, duration, nats, percent, quantity

# More bars than this are a table's work, and the table is on the page.
_MAX_BARS = 24

_EXIT_CODES = {
    1: "a fault in Scion itself",
    2: "the request was wrong",
    3: "training diverged",
    65: "the data or the model is broken or does not fit",
    74: "the disk or the network failed",
    75: "stopped by a signal, after saving",
    130: "interrupted a second time",
}


def headline(run: Run, finding: Finding) -> Markup:
    """Return the sentences that say what was made, how good it is, and what that is worth."""
    continued = continued_lead(run, forgetting_of(run))
    if continued is not None:
        return join(continued, _verdict(run, finding))
    # Without a loss nothing follows that the comma could lead to.
    tokens = _tokens(run) if finding.child is not None else _tokens(run).removesuffix(",")
    reached = join(" ", _reached(run, finding)) if finding.child is not None else "."
    lead = tag("p", _what(run), tokens, reached, class_="lead")
    return join(lead, _verdict(run, finding))


def _what(run: Run) -> Content:
    """An 8-layer, 56.7M-parameter child of smollm2-135m (30 layers, 134.5M parameters): as far as is known."""
    layers, parameters = number(run.shape, "num_hidden_layers"), number(run.shape, "num_parameters")
    sizes = [f"{layers:.0f}-layer"] if layers is not None and math.isfinite(layers) else []
    sizes += [f"{count(parameters)}-parameter"] if parameters is not None else []
    first = layers if layers is not None and math.isfinite(layers) else parameters
    a = article(first).capitalize() if first is not None and math.isfinite(first) else "A"
    noun = "model" if run.source is None or run.inherit.init == "random" else "child"
    begin = f"{a} {', '.join(sizes)} {noun}" if sizes else f"{a} {noun}"
    if run.source is None:
        return [begin, ", begun from random weights" if run.recipe == "scratch" else ""]
    link = " of the kind of " if noun == "model" else " of "
    of = [f"{run.source.num_layers} layers"] if run.source.num_layers is not None else []
    of += [f"{count(run.source.num_parameters)} parameters"] if run.source.num_parameters is not None else []
    ending = ", begun from random weights" if noun == "model" else ""
    return [
        begin,
        link,
        name_of(run.source.name or "a source without a name"),
        f" ({', '.join(of)})" if of else "",
        ending,
    ]


def _tokens(run: Run) -> str:
    tokens, so_far = number(run.child.training, "tokens"), run.child.curves.last_tokens
    pruning = run.pruning
    if pruning is None or not (pruning.record or pruning.tokens):
        if tokens is not None:
            return f", trained on {count(tokens)} tokens,"
        return f", trained on {count(so_far)} tokens so far," if so_far is not None else ", not trained yet,"
    if not pruning.record:
        return f", being pruned (for {count(pruning.tokens)} tokens so far),"
    how = f", pruned {method_words(method_of(run, pruning))}"
    if tokens is None and so_far is None:
        return f"{how} and not trained since,"
    whole = pruning.tokens + (so_far or 0.0) if tokens is None else tokens
    part = f" ({count(pruning.tokens)} of them while pruning)" if pruning.tokens else ""
    return f"{how} and trained on {count(whole)} tokens{part}{' so far' if tokens is None else ''},"


def _reached(run: Run, finding: Finding) -> Content:
    verb = "reaches" if run.finished else "is at" if run.status.state == "running" else "was at"
    parts: list[Content] = [verb, " ", tag("strong", f"{nats(finding.child)}\u00a0nats", class_="child")]
    parts.append(" on held-out text")
    if finding.control is not None and run.control is not None:
        # Before the end the control may have seen more or fewer tokens than the child.
        so_far = run.control.curves.last_tokens
        after = "on the same tokens" if run.finished else f"after {count(so_far)} tokens"
        parts += [f"; the same shape from random weights, {after}, {verb} "]
        parts.append(tag("strong", nats(finding.control), class_="control"))
    if finding.source is not None:
        parts += ["; the source has ", tag("strong", nats(finding.source), class_="source")]
    return [*parts, "."]


def _verdict(run: Run, finding: Finding) -> Markup | None:
    sentences: list[Content] = []
    closed = finding.gap_closed
    if closed is not None:
        sentences.append(_gap_sentence(closed, bool(run.finished)))
    elif finding.control is not None and finding.source is not None:
        sentences.append("The control is no worse than the source, so there is no gap to close. ")
    if finding.child is not None:
        seed = number(run.child.training, "seed")
        seed = number(run.config, "seed") if seed is None else seed
        named = f" ({seed:.0f})" if seed is not None and math.isfinite(seed) else ""
        sentences.append(f"One seed{named}, so no spread is known.")
    if finding.partial:
        names = [[", " if k else "", name_of(name)] for k, name in enumerate(finding.domains[:8])]
        sentences.append([" These means are over the domains that all of them were measured on: ", names, "."])
    return tag("p", sentences, class_="verdict") if sentences else None


def _gap_sentence(closed: float, finished: bool) -> Content:
    tense = ("closes", "does") if finished else ("has closed", "did")
    if closed < 0:
        return f"The child is worse than the control: inheriting {tense[1]} not help here. "
    if closed > 1:
        return "The child is better than its source on this text. "
    share = tag("strong", percent(closed), class_="child")
    return ["The child ", tense[0], " ", share, " of the gap between control and source. "]


def banner(run: Run) -> Markup | None:
    """Return the notice over a run that is not done, with what to do; None for one that is."""
    status = run.status
    if status.state == "done" and run.finished:
        return None
    sentences: list[Content]
    if status.state == "running":
        sentences = [
            "This run is recorded as running: everything below is of the moment. ",
            "If nothing is working on it any more it was killed; the same command goes on from the last checkpoint.",
        ]
    elif status.state == "stopped":
        sentences = ["This run was stopped and saved. The same command goes on where it left off."]
    elif status.state == "failed":
        sentences = ["This run failed, so what is below is what it had reached until then."]
    elif status.state == "done":
        sentences = ["The run says that it is done, but its result.json is not here: the final losses are missing."]
    elif status.state == "unknown":
        sentences = ["The folder holds no status.json: whether the run came to its end is not recorded."]
    else:
        sentences = ["The run is in a state that this version does not know."]
    kind = status.state if status.state in {"running", "failed"} else "stopped"
    details = _progress(run)
    return tag("aside", tag("p", *sentences), tag("p", details) if details else None, class_=f"banner {kind}")


def _progress(run: Run) -> Content:
    """Step, exit code and message, as far as there are any."""
    status = run.status
    # Metrics go on to where it stopped; what status.json has is the last checkpoint's.
    step = status.step if run.child.curves.last_step is None else run.child.curves.last_step
    parts: list[Content] = []
    if run.pruning is not None and not run.pruning.is_done:
        so_far = sum(one.last_step or 0 for one in run.pruning.stretches)
        parts.append(f"Pruning, step {so_far:,}. " if so_far else "Pruning has not come to its first step. ")
        step = None
    if step is not None:
        total, rounds = _steps_to_take(run), run.growth.get("rounds")
        if run.growth.get("result_round") is not None:  # all are done: it is the control that is trained
            total, rounds = None, None
        words = f"Step {step:,}{f' of {total:,.0f}' if total is not None else ''}. "
        parts.append(f"Round {len(rounds) + 1}, s{words[1:]}" if isinstance(rounds, list) else words)
    if status.exit_code is not None and status.state != "running":
        meaning = _EXIT_CODES.get(status.exit_code)
        parts.append(f"Exit code {status.exit_code}{f': {meaning}' if meaning else ''}. ")
    if status.message:
        parts += ["Message: ", tag("bdi", clip(status.message, 600))]
    return parts or None


def _steps_to_take(run: Run) -> float | None:
    """Return the steps of all stages, as planned; of rounds of growth those of one."""
    stages = run.plan.get("stages")
    planned = [number(mapping(one), "steps") for one in stages] if isinstance(stages, list) else []
    known = [one for one in planned or [number(mapping(run.config.get("train")), "steps")] if one is not None]
    return sum(known) if len(known) == max(len(planned), 1) and math.isfinite(sum(known)) else None


def result_section(run: Run, finding: Finding) -> Markup:
    """Return the result at a glance: the gap as a bar, the share by domain, the main numbers as tiles."""
    return tag(
        "section",
        tag("h2", "At a glance", id="result"),
        _tiles(run, finding),
        _gap_figure(run, finding),
        _domain_figure(run),
        aria_labelledby="result",
    )


def _tiles(run: Run, finding: Finding) -> Markup:
    training = run.child.training
    tokens = number(training, "tokens")
    if tokens is None:
        so_far, pruned = run.child.curves.last_tokens, run.pruning.tokens if run.pruning is not None else 0.0
        tokens = so_far + pruned if so_far is not None else pruned or None
    loss = (nats(finding.child), "nats, held-out loss" + (f"; source {nats(finding.source)}" if finding.source else ""))
    pairs = [
        *(continued_tiles(forgetting_of(run)) or [loss]),
        *_size_tiles(run),
        (count(tokens), f"tokens trained on{_while_pruning(run, tokens)}"),
        (duration(number(training, "seconds")), _speed(speed(run))),
    ]
    tiles = [
        tag("div", tag("dt", what), tag("dd", shown)) for shown, what in pairs if shown not in {None, NONE, NOT_FINITE}
    ]
    return tag("dl", tiles, class_="tiles") if tiles else tag("p", "Nothing has been measured yet.", class_="soft")


def _while_pruning(run: Run, tokens: float | None) -> str:
    spent = run.pruning.tokens if run.pruning is not None else 0.0
    if not spent or not tokens or tokens < spent:
        return ""
    return f", {percent(spent / tokens)} of them while pruning" if tokens > spent else ", all while pruning"


def _size_tiles(run: Run) -> Iterable[tuple[str, str]]:
    parameters, layers = number(run.shape, "num_parameters"), number(run.shape, "num_hidden_layers")
    source = None if run.continues else run.source  # it has all of the source
    if parameters is not None:
        whole = source.num_parameters if source else None
        share = f", {percent(parameters / whole)} of the source's" if whole else ""
        yield count(parameters), f"parameters{share}"
    if layers is not None and not run.continues:
        of = f" of {source.num_layers}" if source and source.num_layers is not None else ""
        yield f"{count(layers)}{of}", "layers"


def _speed(tokens_per_s: float | None) -> str:
    return "training time" + (f", {quantity(tokens_per_s)} tokens/s" if tokens_per_s is not None else "")


def _gap_figure(run: Run, finding: Finding) -> Markup | None:
    """The gap to the source as a bar that training fills: from the control, or else from the child before training."""
    from_control = finding.gap_closed is not None
    closed = finding.gap_closed if from_control else finding.recovered
    start = finding.control if from_control else finding.before
    if closed is None or start is None or finding.child is None or finding.source is None or run.continues:
        return None  # what continues a source begins where that is
    name = "control" if from_control else run.start
    marks = (
        Mark(name, start, "control" if from_control else "plain", nats(start)),
        Mark("child", finding.child, "child", nats(finding.child)),
        Mark("source", finding.source, "source", nats(finding.source)),
    )
    values = f"{name} {nats(start)}, child {nats(finding.child)}, source {nats(finding.source)} nats"
    caption = Caption("gap", f"Loss from {name} to source", f"A bar: {values}; {percent(closed)} of it is filled.")
    where = "control (the same shape from random weights)" if from_control else f"the child {run.start}"
    word = "closed" if from_control else "recovered"
    filled = f"{percent(closed)} {word}" if closed <= 1 else "beyond the source"
    note = (
        f"Mean held-out loss over {_domains(len(finding.domains))}, in nats per token, falling from left to right: "
        f"from {where} to the source. Filled: what {'the child closes' if from_control else 'training recovered'}."
    )
    picture = responsive(caption, lambda named, width: gap_bar(named, width, marks, filled))
    return card(picture, note)


def _domain_figure(run: Run) -> Markup | None:
    """The share of the gap closed in each domain, where there are several."""
    if run.control is None or run.source is None:
        return None
    child = known(run.child.after) or last_losses(run.child.curves)
    control = known(run.control.after) or last_losses(run.control.curves)
    source = known(run.source.losses)
    shares = {name: gap_closed(child[name], control.get(name), source.get(name)) for name in child}
    marks = [
        Mark(name, share, "child", percent(share))
        for name, share in shares.items()
        if share is not None and abs(share) < 100
    ]
    if len(shares) < 2 or not marks:
        return None
    shown = marks[:_MAX_BARS]
    described = "; ".join(f"{clip(mark.label, 40)} {mark.shown}" for mark in shown)
    caption = Caption("shares", "Share of the gap closed, by domain", f"Bars: {described}.")
    goal = Mark("source = 100%", 1.0, "source", "")
    left_out = len(shares) - len(shown)
    note = f" {left_out} more: see the table." if left_out else ""
    picture = responsive(caption, lambda named, width: bars(named, width, shown, goal))
    return card(picture, "0% is the control, 100% the source." + note, "Share of the gap closed, by domain")


def _domains(number_of: int) -> str:
    return "1 domain" if number_of == 1 else f"{number_of} domains"
