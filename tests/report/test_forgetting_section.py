"""What the page of a continued run says of what was learned and forgotten: as recorded, or as measured so far."""

import json
import math
import re
from itertools import pairwise

import pytest
from test_report import HOSTILE, check_inert, check_page
from test_report import words as words_of

from report.continual_folders import (
    NEW,
    OLD,
    TOKENS_PER_STEP,
    config,
    continual_run,
    course,
    losses_at,
    mean,
    records,
    staged,
)
from report.run_folders import write_json
from report.test_pruning_section import words
from scionlm.report import html as report_html
from scionlm.report import render_report
from scionlm.report.collect import read_run
from scionlm.report.forgetting import forgetting_section
from scionlm.report.forgetting_read import forgetting_of, stretches_of


def section(folder):
    return forgetting_section(read_run(folder))


def rows_of(markup, ident):
    """Return the rows of a table as lists of their cells' text."""
    table = str(markup)[str(markup).index(f'id="{ident}"') :].partition("</table>")[0]
    return [
        [words(cell).strip() for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row)] for row in table.split("<tr>")[1:]
    ]


def test_the_top_of_the_page_says_what_was_learned_and_forgotten(tmp_path):
    page = words_of(check_page(render_report(continual_run(tmp_path / "run"))))
    assert (
        "Continued from org/base-30m (12 layers, 29.4M parameters) on 409,600 tokens: downstream 3.20 \u2192 2.60 "
        "nats, upstream 2.90 \u2192 3.00 nats: forgets 0.10, gains 0.60."
    ) in page
    assert "One seed (0), so no spread is known." in page
    assert "nats gained downstream: 3.20 to 2.60" in page
    assert "Nothing was cut: training went on with all the weights of the source." in page
    assert "% recovered" not in page  # a bar from the child before training to its source has no length here


def test_the_words_tell_both_sides_the_peak_and_the_replay(tmp_path):
    text = words(section(continual_run(tmp_path / "run")))
    lines = course()
    peak = max(mean(losses_at(lines, step), OLD) for step in (1, 2, 4, 8, 16, 32))
    back = (peak - 3.0) / (peak - 2.9)
    for shown in (
        "On the new text (law, medicine) the loss fell from 3.20 to 2.60 nats: 0.60 learned.",
        "On what it knew before (literature, reference) it rose from 2.90 to 3.00 nats: 0.10 forgotten.",
        "Nat for nat that is 0.50 better than its source.",
        f"the old text was at {peak:.2f} nats (step 16, 4.0% of the way in); {100 * back:.0f}% of that rise came back",
        "Earlier text was replayed: 5% of every batch.",
    ):
        assert shown in text, shown


def test_the_table_has_before_peak_and_after_of_each_side_and_domain(tmp_path):
    rows = rows_of(section(continual_run(tmp_path / "run")), "forgetting-losses")
    lines = course()
    before, after, worst = losses_at(lines, 0), losses_at(lines, 400), losses_at(lines, 16)
    by_name = {row[0]: row[1:] for row in rows[2:] if len(row) > 1}
    assert [row[0] for row in rows[1:]] == [
        "Upstream: what the model knew before", "mean", *OLD, "Downstream: the new text", "mean", *NEW,
    ]  # fmt: skip
    assert rows[2][1:] == ["2.900", f"{mean(worst, OLD):.3f}", "16", "3.000", "+0.100"]
    assert rows[6][1:] == ["3.200", f"{mean(losses_at(lines, 4), NEW):.3f}", "4", "2.600", "\u22120.600"]
    for name in (*OLD, *NEW):
        change = after[name] - before[name]
        highest = max(losses_at(lines, step)[name] for step in (0, 4, 8, 16, 32))
        assert by_name[name][:2] == [f"{before[name]:.3f}", f"{highest:.3f}"]
        assert by_name[name][-2:] == [f"{after[name]:.3f}", f"{change:+.3f}".replace("-", "\u2212")]


def test_what_the_result_records_counts_and_not_what_metrics_say(tmp_path):
    up = {"domains": ["literature"], "before": 5.0, "after": 5.25, "peak": {"nll": 7.0, "step": 3, "tokens": 3072}}
    forgetting = {"upstream": up, "downstream": None, "net": None, "stages": []}
    folder = continual_run(tmp_path / "run", forgetting=forgetting)
    text = words(section(folder))
    assert "On what it knew before (literature) it rose from 5.00 to 5.25 nats: 0.25 forgotten." in text
    assert "at 7.00 nats (step 3" in text
    assert "On the new text" not in text
    assert "Nat for nat" not in text
    assert "upstream 5.00 \u2192 5.25 nats: forgets 0.25." in words_of(check_page(render_report(folder)))


def test_the_curves_have_the_levels_before_a_ring_and_doublings(tmp_path):
    page = str(section(continual_run(tmp_path / "run")))
    for ident in ("course-wide", "first-steps-wide"):
        drawing = page[page.index(f'id="{ident}-title"') :].partition("</svg>")[0]
        lines = re.findall(r'<path d="(M[^"]*)" class="line ([a-z]*)"', drawing)
        assert [tone for _, tone in lines] == ["upstream", "child"]
        assert drawing.count('class="reference upstream"') == 2  # in the legend, and in the chart
        assert drawing.count('class="ring upstream"') == 1
        ring = re.search(r'<circle cx="([\d.]*)" cy="([\d.]*)" r="6.5"', drawing)
        assert ring is not None
        assert f"{ring[1]} {ring[2]}" in re.sub(r"(\d)\.0\b", r"\1", lines[0][0])
    drawing = page[page.index('id="first-steps-wide-title"') :].partition("</svg>")[0]
    ticks = re.findall(r'<text x="([\d.]*)" y="[\d.]*" class="small" text-anchor="middle">([\d,]+)<', drawing)
    assert [text for _, text in ticks] == ["0", "1", "2", "4", "8", "16", "32", "64", "128", "256"]
    steps = [float(right[0]) - float(left[0]) for left, right in pairwise(ticks)]
    assert max(steps) - min(steps) < 0.2  # every doubling has the same width


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_stages_have_lines_names_a_chart_each_and_a_table(tmp_path, worst):
    lines, stages = staged(worst=worst)
    folder = continual_run(tmp_path / "run", lines, stages=stages)
    assert [(one.name, one.step, one.end) for one in stretches_of(read_run(folder))] == [
        ("on-law", 0, 300), ("on-medicine", 300, 600), ("on-poetry", 600, None),
    ]  # fmt: skip
    page = str(section(folder))
    check_page(render_report(folder))
    drawing = page[page.index('id="course-wide-title"') :].partition("</svg>")[0]
    assert all(f">{one['name']}<" in drawing for one in stages)
    assert len(re.findall(r'<line [^>]*class="axis"', drawing)) == 3  # the base, and where two stages begin
    assert page.count('aria-labelledby="first-steps-') == 3
    rings = [f'id="first-steps-{k}-title"' for k in range(3)]
    with_ring = ["ring" in page[page.index(one) :].partition("</svg>")[0] for one in rings]
    assert with_ring == [k == worst for k in range(3)]
    rows = rows_of(page, "forgetting-stages")[1:]
    for row, one in zip(rows, stages, strict=True):
        losses = [f"{one[key]:.3f}" for key in ("before", "at_its_end", "after")]
        change = one["after"] - one["at_its_end"]
        assert row == [one["name"], one["domains"][0], *losses, f"{change:+.3f}" if change else "0.000"]
    assert float(rows[0][-1]) > 0.2


def test_one_stage_needs_no_table_of_stages(tmp_path):
    page = str(section(continual_run(tmp_path / "run")))
    assert "forgetting-stages" not in page
    assert "Upright lines" not in page


def test_while_it_runs_the_page_goes_by_its_metrics_and_the_names_in_the_manifest(tmp_path):
    lines = [line for line in course() if line["step"] <= 130]
    folder = continual_run(tmp_path / "run", lines, state="running")
    forgetting = forgetting_of(read_run(folder))
    assert forgetting is not None
    assert not forgetting.final
    now = losses_at(lines, 128)
    assert forgetting.forgetting == pytest.approx(mean(now, OLD) - mean(OLD))
    assert forgetting.adaptation == pytest.approx(mean(NEW) - mean(now, NEW))
    text = words_of(check_page(render_report(folder)))
    assert "Continued from org/base-30m on 133,120 tokens so far: downstream 3.20 \u2192" in text
    assert "So far on the new text (law, medicine) the loss fell" in text
    assert "of the way in" not in text  # how long the way is nobody knows yet
    assert rows_of(section(folder), "forgetting-losses")[0][4] == "now"


@pytest.mark.parametrize("upstream", [None, (), 3])
def test_without_names_of_what_it_knew_nothing_is_claimed(tmp_path, upstream):
    folder = continual_run(tmp_path / "run", state="running", upstream=upstream)
    assert forgetting_of(read_run(folder)) is None
    text = words_of(check_page(render_report(folder)))
    assert "What was learned" not in text
    assert "upstream" not in text.partition("Settings")[0]


def test_a_branch_says_where_it_branched_off(tmp_path):
    recipe = config(source=None, branch={"run": "/x/runs/base-seed1", "step": 500})
    text = words_of(check_page(render_report(continual_run(tmp_path / "run", recipe=recipe))))
    assert "Continued from org/base-30m (12 layers, 29.4M parameters, branched off at its step 500) on" in text


def test_before_the_first_loss_there_is_no_section(tmp_path):
    folder = continual_run(tmp_path / "run", state="running")
    (folder / "metrics.jsonl").unlink()
    assert section(folder) is None
    check_page(render_report(folder))


def test_what_it_knew_may_not_have_been_measured(tmp_path):
    lines = [{k: v for k, v in line.items() if not any(name in k for name in OLD)} for line in course()]
    down = {"domains": list(NEW), "before": 3.2, "after": 2.6, "peak": None, "adaptation": 0.6}
    folder = continual_run(tmp_path / "run", state="running")
    write = json.loads((continual_run(tmp_path / "whole") / "result.json").read_text())
    write |= {"upstream": [], "forgetting": {"upstream": None, "downstream": down, "net": None, "stages": []}}
    write |= {key: {name: write[key][name] for name in NEW} for key in ("before", "domains")}
    write_json(folder / "result.json", write)
    write_json(folder / "status.json", {"format_version": 1, "state": "done", "exit_code": 0})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"format_version": 1, "kind": "metrics"}, *lines])
    )
    text = words(section(folder))
    assert "What it forgot is not known: no text that it knew before was measured." in text
    assert "Upstream:" not in text
    assert "downstream 3.20 \u2192 2.60 nats: gains 0.60." in words_of(check_page(render_report(folder)))


@pytest.mark.parametrize(
    ("kept", "gain", "said"),
    [
        (-0.2, 0.6, "nothing forgotten, but 0.20 gained there too. Nat for nat that is 0.80 better than its source."),
        (0.0, 0.6, "it stayed at 2.90 nats: nothing forgotten."),
        (0.5, 0.2, "Nat for nat that is 0.30 worse than its source: it forgot more than it learned."),
        (0.02, 0.013, "it rose from 2.900 to 2.920 nats: 0.020 forgotten."),
        (0.1, -0.3, "the loss rose from 3.20 to 3.50 nats: 0.30 lost, although this is what it trained on."),
        (0.3, 0.3, "What it learned and what it forgot are worth the same, nat for nat."),
    ],
)
def test_the_words_follow_the_sign(tmp_path, kept, gain, said):
    assert said in words(section(continual_run(tmp_path / "run", course(kept=kept, gain=gain, gap=0.0))))


def test_a_loss_that_was_not_finite_is_a_gap_and_no_peak(tmp_path):
    lines = course()
    for line in lines:
        if line["step"] in (16, 32) and "eval/literature/nll_nats" in line:
            line["eval/literature/nll_nats"] = None
    folder = continual_run(tmp_path / "run", [line for line in lines if line["step"] <= 130], state="stopped")
    forgetting = forgetting_of(read_run(folder))
    assert forgetting is not None
    assert forgetting.upstream is not None
    assert forgetting.upstream.peak is not None
    assert forgetting.upstream.peak.step == 8
    drawing = str(section(folder)).partition("</svg>")[0]
    path = re.search(r'<path d="([^"]*)" class="line upstream"', drawing)
    assert path is not None
    assert path[1].count("M") == 2


def test_other_recipes_have_no_such_section(make_run):
    folder = make_run(forgetting={"upstream": {"domains": ["prose"], "before": 1.0, "after": 2.0}}, upstream=["prose"])
    assert section(folder) is None
    assert "What was learned" not in render_report(folder)


def hostile(folder):
    """Write a run in which every text is an attack."""
    attack = " ".join(HOSTILE)
    names = {f"{k} {bad}": 3.0 for k, bad in enumerate(HOSTILE)}
    old = dict(list(names.items())[:4])
    lines = []
    for step in range(0, 21, 2):
        losses = {f"eval/{name}/nll_nats": nll + 0.1 * math.sin(step) for name, nll in names.items()}
        lines.append({"step": step, "tokens": step * TOKENS_PER_STEP} | losses)
    side = {"before": 3.0, "after": 3.1, "peak": {"nll": 3.5, "step": 2, "tokens": 2048}}
    stages = [
        {
            "name": attack,
            "steps": 10,
            "tokens": 10_240,
            "domains": [attack],
            "before": 3.0,
            "at_its_end": 2.0,
            "after": 3.0,
        }
    ] * 2
    changes = {
        "name": attack, "domains": records(names), "before": records(names), "best": {}, "upstream": list(old),
        "source": {"name": attack, "license": attack, "model_type": attack, "domains": records(names)},
        "forgetting": {
            "upstream": side | {"domains": list(old)},
            "downstream": side | {"domains": [n for n in names if n not in old]},
            "stages": stages,
        },
    }  # fmt: skip
    recipe = config(upstream={"dir": attack, "domains": list(old)}, source=attack, schedule={"name": attack})
    recipe["replay"] = {"fraction": 0.1, "data": attack}
    folder.mkdir()
    run = continual_run(folder / "plain")
    result = json.loads((run / "result.json").read_text()) | changes
    write_json(run / "result.json", result)
    write_json(run / "plan.json", {"format_version": 1, "stages": stages})
    (run / "config.yaml").write_text(json.dumps(recipe))
    body = [{"format_version": 1, "kind": "metrics"}, *lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in body))
    return run


def test_nothing_from_a_file_acts_on_the_page(tmp_path, monkeypatch):
    run = hostile(tmp_path / "runs")
    document = render_report(run)
    check_inert(document)
    assert "forgetting-stages" in document
    assert "first-steps-1" in document
    monkeypatch.setattr(report_html, "escape", str)
    with pytest.raises(AssertionError):
        check_inert(render_report(run))


SIDE = {"domains": list(OLD), "before": 2.9, "after": 3.0, "peak": {"nll": 3.3, "step": 16, "tokens": 16_384}}


@pytest.mark.parametrize(
    "broken",
    [
        None, 3, [], {"upstream": 3}, {"upstream": {"before": "x"}}, {"upstream": SIDE | {"domains": None}},
        {"upstream": SIDE | {"domains": [None, 3, "literature"]}}, {"upstream": SIDE | {"before": float("nan")}},
        {"upstream": SIDE | {"after": 1e400}}, {"upstream": SIDE | {"peak": {"nll": 1e400, "step": 1, "tokens": 1}}},
        {"upstream": SIDE | {"peak": {"nll": 3.5, "step": 1e300, "tokens": -1e300}}}, {"upstream": SIDE | {"peak": 1}},
        {"upstream": SIDE | {"before": 1e300, "after": -1e300}}, {"upstream": SIDE, "stages": "two"},
        {"upstream": SIDE, "stages": [None, 3, {}, {"name": 3, "domains": 3, "before": float("nan")}]},
        {"upstream": SIDE, "stages": [{"after": 1e400}, {"at_its_end": 1.0}]},
        {"upstream": SIDE, "downstream": SIDE | {"domains": ["nobody"], "before": None}},
    ],
)  # fmt: skip
def test_what_is_broken_breaks_no_page(tmp_path, broken):
    folder = continual_run(tmp_path / "run", forgetting=broken)
    write_json(
        folder / "plan.json", {"format_version": 1, "stages": [{"name": 3, "steps": -1, "tokens": None}, 3, None]}
    )
    check_page(render_report(folder))


@pytest.mark.parametrize(
    "stages",
    [[{"name": "a", "steps": 1e300, "tokens": 1e300}] * 3, [{"name": "a", "steps": 0, "tokens": 0}] * 2, [{}, {}], "x"],
)
def test_odd_plans_make_no_stages_and_break_no_page(tmp_path, stages):
    folder = continual_run(tmp_path / "run")
    write_json(folder / "plan.json", {"format_version": 1, "stages": stages})
    check_page(render_report(folder))


def test_a_long_run_of_many_domains_stays_below_the_limit(tmp_path):
    names = [f"domain-{k:03}-{'x' * 40}" for k in range(60)]
    lines = []
    for step in range(0, 2000, 5):
        losses = {f"eval/{name}/nll_nats": 3.0 + 0.3 * math.sin(step / 70 + k) for k, name in enumerate(names)}
        lines.append({"step": step, "tokens": step * TOKENS_PER_STEP} | losses)
    folder = continual_run(tmp_path / "run", lines, state="stopped", upstream=tuple(names[:30]))
    text = words_of(check_page(render_report(folder)))
    assert "Of each the first 20 domains; the others are under Losses by domain." in text


def test_a_peak_between_the_points_that_are_drawn_is_drawn_too(tmp_path):
    lines = []
    for step in range(0, 2000, 5):
        losses = {"old": 4.0 if step == 1020 else 3.0, "new": 3.0 - step / 4000}
        place = {"step": step, "tokens": step * TOKENS_PER_STEP}
        lines.append(place | {f"eval/{name}/nll_nats": nll for name, nll in losses.items()})
    folder = continual_run(tmp_path / "run", lines, state="stopped", upstream=("old",))
    for drawing in str(section(folder)).split("</svg>")[:4]:
        ring = re.search(r'<circle cx="([\d.]*)" cy="([\d.]*)" r="6.5"', drawing)
        path = re.search(r'<path d="([^"]*)" class="line upstream"', drawing)
        assert ring is not None
        assert path is not None
        assert f"{float(ring[1]):.1f} {float(ring[2]):.1f}" in path[1]
        assert path[1].count("L") < 200
