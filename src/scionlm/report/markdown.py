"""The page of a run as Markdown, for a pull request or an issue: the sentences, losses, scores, what it cost."""

import html
import re
import shlex
from collections.abc import Mapping
from typing import Any

from scionlm.core.records import stderr_key
from scionlm.report.collect import Loss, Run
from scionlm.report.findings import find, speed
from scionlm.report.html import Markup, clip, escape
from scionlm.report.summary import banner, headline
from scionlm.report.tasks import TaskScores, read_tasks
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, count, duration, exact, nats, quantity

_MARKS = {"|": "\\|", "\\": "\\\\", "*": "\\*", "_": "\\_", "`": "\\`", "[": "\\[", "]": "\\]", "~": "\\~"}
_MAX_DOMAINS = _MAX_TASKS = 40


def safe(value: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    plain = " ".join(value.split())
    return "".join(_MARKS.get(character, character) for character in escape(plain))


def run_markdown(run: Run) -> str:
    """Return what came of a run as Markdown."""
    title = f"## {safe(clip(run.folder, 80))}"
    told = [_words(one) for one in (banner(run), headline(run, find(run))) if one is not None]
    parts = (title, *told, _losses(run), _tasks(read_tasks(run.scores)), _cost(run))
    return "\n\n".join(part for part in parts if part) + "\n"


def _words(markup: Markup) -> str:
    """Return the paragraphs of a piece of the page, as text."""
    paragraphs = re.split(r"</p>|</dd>", str(markup))
    plain = (html.unescape(re.sub(r"<[^>]*>", "", one)) for one in paragraphs)
    return "\n\n".join(safe(one) for one in plain if one.strip())


def _losses(run: Run) -> str:
    child, control = run.child, run.control
    source = run.source.losses if run.source else {}
    columns = {
        "source": source,
        f"child {run.start}": child.before,
        "child": child.after,
        "control": control.after if control else {},
    }
    columns = {name: losses for name, losses in columns.items() if losses}
    names = list({**child.after, **child.before, **source})
    if not names:
        return ""
    head = ["held-out nll (nats)", *columns, "bits per byte", "tokens"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in names[:_MAX_DOMAINS]:
        each = [losses.get(name, Loss()) for losses in columns.values()]
        last = child.after.get(name, Loss())
        tokens = count(max((loss.num_tokens or 0 for loss in each), default=0))
        rows.append([safe(clip(name, 60)), *(nats(one.nll, 3) for one in each), nats(last.bits_per_byte, 3), tokens])
    finding = find(run)
    means = {
        "source": finding.source, f"child {run.start}": finding.before, "child": finding.child,
        "control": finding.control,
    }  # fmt: skip
    if len(names) > 1:
        rows.append(["**mean**", *(f"**{nats(means[name], 3)}**" for name in columns), "", ""])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _tasks(scores: TaskScores) -> str:
    """Return the scores on tasks; of a group of tasks that of the group alone."""
    models = {"source": scores.source, "child": scores.child, "control": scores.control}
    models = {name: records for name, records in models.items() if records}
    names = [name for name, record in scores.child.items() if not text(mapping(record), "group")]
    if not names:
        return ""
    rows = [["task", "metric", *models, "items"], ["---", "---", *["---:"] * (len(models) + 1)]]
    for name in names[:_MAX_TASKS]:
        child = mapping(scores.child[name])
        metric = text(child, "metric") or "acc"
        each = [_score(mapping(records.get(name)), metric) for records in models.values()]
        items = exact(number(child, "num_items"))
        rows.append([safe(clip(name, 60)), safe(clip(metric, 40)), *each, items])
    left_out = len(names) - _MAX_TASKS
    more = f" {left_out} more tasks are in result.json." if left_out > 0 else ""
    return f"{_table(rows)}\n\nScores \u00b1 standard error over items.{more}"


def _score(record: Mapping[str, Any], metric: str) -> str:
    value, error = number(record, metric), number(record, stderr_key(metric))
    return nats(value, 3) if value is None or error is None else f"{nats(value, 3)} \u00b1 {nats(error, 3)}"


def _cost(run: Run) -> str:
    training, manifest = run.child.training, run.manifest
    parts = {
        "parameters": count(number(run.shape, "num_parameters")),
        "tokens": count(number(training, "tokens")),
        "FLOPs": quantity(number(training, "flops")),
        "time": duration(number(training, "seconds")),
        "tokens/s": quantity(speed(run)),
        "device": text(training, "device") or text(mapping(manifest.get("device")), "name") or "",
        "Scion": text(manifest, "scion_version") or "",
    }
    # What a run that did not come to its end has not recorded is None, or a dash.
    listed = ", ".join(f"{name} {safe(clip(value, 80))}" for name, value in parts.items() if value and value != NONE)
    command = manifest.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    return f"{listed}\n\nCommand: {safe(clip(shlex.join(words), 400))}" if words else listed
