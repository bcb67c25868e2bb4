"""The tasks of a comparison as sections of its page and as Markdown: scores, suites beside the papers', speed."""

from collections.abc import Sequence

from scionlm.report.compare_tasks import Apart, Score, Scored, TaskComparison
from scionlm.report.html import Content, Markup, RowGroup, name_of, section, table, tag
from scionlm.report.markdown import safe
from scionlm.report.published import PublishedRow, published
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, count, quantity

_MAX_TASKS = 12  # columns; all are in compare.json
_MAX_ROWS = 100


def task_sections(found: TaskComparison | None) -> list[Markup]:
    """Return the sections on tasks, on each suite, and on speed, as far as there is anything to show."""
    if found is None:
        return []
    return [one for one in (_scores(found), *_suites(found), _speed(found)) if one is not None]


def _columns(found: TaskComparison) -> list[str]:
    return list(found.tasks)[:_MAX_TASKS]


def _scores(found: TaskComparison) -> Markup | None:
    rows = [one for one in found.models if one.scores][:_MAX_ROWS]
    if not rows:
        return None
    head, *lines = _grid(found, rows)
    cells: list[tuple[Content, ...]] = [(_named(one), *line[1:]) for one, line in zip(rows, lines, strict=False)]
    if len(lines) > len(rows):
        cells.append((tag("span", "chance", class_="soft"), *lines[-1][1:]))
    titles = [head[0], *(name_of(title, 40) for title in head[1:])]
    left_out = len(found.tasks) - _MAX_TASKS
    more = f" {left_out} more tasks are in compare.json." if left_out > 0 else ""
    caption = "Scores with their standard errors over items; higher is better, where no \u2193 says otherwise"
    body = table("tasks-table", caption, titles, [RowGroup(None, cells)])
    return section("tasks", "Tasks", body, tag("p", _told(found), more, class_="note"))


def _told(found: TaskComparison) -> str:
    words = "The mean is over the accuracies that all of them have."
    without = [one for one in found.models if one.scores and one.mean is None and found.against is not None]
    if not all(one.is_alike for one in without):
        words += " Without a mean: asked other items than most, so that its scores do not compare."
    elif without:
        words += " Without a mean: it was not asked all of them."
    if any(one.apart for one in found.models):
        words += (
            f" The difference is to {found.against}, item by item on the same items, with its 95 % interval: where that"
            " holds 0, the two are not told apart."
        )
    return words


def _named(one: Scored) -> Content:
    tone = {"source": "source", "control": "control"}.get(one.kind)
    return tag("b", name_of(one.name, 60), class_=tone) if tone else name_of(one.name, 60)


def _grid(found: TaskComparison, rows: Sequence[Scored]) -> list[list[str]]:
    """Return the table as text: a head, a row for each model, and chance where it is known."""
    tasks = _columns(found)
    paired = any(one.apart for one in rows)
    head = ["", *(_title(found, task) for task in tasks), "mean", *(["difference"] if paired else [])]
    grid = [head]
    for one in rows:
        cells = [_score(one.scores.get(task)) for task in tasks]
        grid.append([one.name, *cells, _figure(one.mean), *([_apart(one.apart)] if paired else [])])
    if any(task in found.chance for task in tasks):
        cells = [_figure(found.chance.get(task)) for task in tasks]
        grid.append(["chance", *cells, NONE, *([NONE] if paired else [])])
    return grid


def _title(found: TaskComparison, task: str) -> str:
    return f"{task}, {found.tasks[task]}" + (" \u2193" if task in found.lower else "")


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _score(score: Score | None) -> str:
    if score is None:
        return NONE
    return f"{score.value:.3f}" + (f" \u00b1 {score.stderr:.3f}" if score.stderr is not None else "")


def _apart(apart: Apart | None) -> str:
    if apart is None:
        return NONE
    values = [value for value in (apart.mean, apart.low, apart.high) if value is not None]
    signs = [f"{value:+.3f}".replace("-", "\u2212") for value in values]
    return signs[0] + (f" ({signs[1]} to {signs[2]})" if len(signs) == 3 else "")


def _suites(found: TaskComparison) -> list[Markup]:
    sections: list[Markup] = []
    for name, paper in published().items():
        own = [(one, mapping(one.suites[name])) for one in found.models if name in one.suites]
        if not own:
            continue
        tasks = list(paper.rows[0].scores)
        names = list(mapping(own[0][1].get("scores"))) or tasks
        mine: list[tuple[Content, ...]] = [(_named(one), *_own(suite, names)) for one, suite in own]
        theirs: list[tuple[Content, ...]] = [
            (_cited(row), *(f"{value:.1f}" for value in (*row.scores.values(), row.mean))) for row in paper.rows
        ]
        head = ["", *(name_of(title, 30) for title in names), "mean"]
        groups = [RowGroup("measured here", mine), RowGroup(f"as published ({paper.source})", theirs)]
        note = text(own[0][1], "note") or ""
        words = "Published rows were measured by others, with other versions of the harness: this is no ranking. "
        unlike = dict.fromkeys(str(one) for _, suite in own for one in suite.get("unlike") or ())
        if unlike:
            groups, words = groups[:1], f"Not as published ({', '.join(unlike)}): no published rows stand beside it. "
        sections.append(
            section(
                f"suite-{name}",
                f"Suite {name}",
                table(f"suite-{name}-table", "Scores in per cent", head, groups),
                tag("p", words, note, " " if note else "", paper.note, class_="note"),
            )
        )
    return sections


def _own(suite: object, names: Sequence[str]) -> list[str]:
    scores = mapping(mapping(suite).get("scores"))
    values = [number(scores, name) for name in names]
    mean = number(mapping(suite), "mean")
    return [NONE if value is None else f"{100 * value:.1f}" for value in (*values, mean)]


def _cited(row: PublishedRow) -> Content:
    tokens = f" {count(row.tokens)} tokens" if row.tokens else ""
    return tag("span", name_of(row.model, 60), tag("span", tokens, class_="soft") if tokens else None)


def _speed(found: TaskComparison) -> Markup | None:
    rows = [one for one in found.models if one.inference]
    if not rows:
        return None
    head = ["", "parameters", "weights", "reads, tokens/s", "writes, tokens/s", "first token", "cache a token"]
    cells = [(_named(one), *_cost(one)) for one in rows[:_MAX_ROWS]]
    how = mapping(rows[0].inference.get("settings"))
    words = (
        f"One sequence at a time, {how.get('prompt_tokens')} tokens read and {how.get('new_tokens')} written, "
        f"{how.get('dtype')} on {how.get('device')} with {how.get('threads')} threads; {how.get('statistic')} of "
        f"{how.get('repeats')} rounds."
    )
    groups = [RowGroup(None, list(cells))]
    body = table("speed-table", "Inference", head, groups)
    return section("speed", "What they cost to run", body, tag("p", words, class_="note"))


def _cost(one: Scored) -> list[Content]:
    found = one.inference
    first = number(found, "time_to_first_token_seconds")
    size, cache = number(found, "weight_bytes"), number(found, "kv_cache_bytes_per_token")
    return [
        count(number(found, "num_parameters")),
        NONE if size is None else f"{size / 1e6:,.1f} MB",
        quantity(number(found, "prefill_tokens_per_second")),
        quantity(number(found, "decode_tokens_per_second")),
        NONE if first is None else f"{first:.3f} s",
        NONE if cache is None else f"{cache:,.0f} bytes",
    ]


def tasks_markdown(found: TaskComparison | None) -> str:
    """Return the table of scores as Markdown, and what its difference is; empty where there is none."""
    rows = [one for one in found.models if one.scores] if found is not None else []
    if found is None or not rows:
        return ""
    head, *body = _grid(found, rows)
    lines = [[safe(cell) for cell in line] for line in (head, *body)]
    lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{grid}\n\n{safe(_told(found))}"
