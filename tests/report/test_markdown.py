"""The Markdown twin of a page: its numbers are those of the folder, and nothing in it can act or break its table."""

import json
import re

import pytest
from test_report import HOSTILE, hostile_run

from scionlm.report import render_report, write_report
from scionlm.report.markdown import safe


def table_of(text):
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_losses_stand_in_a_table(make_run):
    run = make_run()
    text = render_report(run, markdown=True)
    rows = table_of(text)
    record = json.loads((run / "result.json").read_text())
    head = rows[0]
    assert head[:4] == ["held-out nll (nats)", "source", "child before training", "child"]
    by_name = {row[0]: row for row in rows[2:]}
    for name, loss in record["domains"].items():
        assert by_name[name][head.index("child")] == f"{loss['nll']:.3f}"
        assert by_name[name][head.index("source")] == f"{record['source']['domains'][name]['nll']:.3f}"
    mean = sum(loss["nll"] for loss in record["domains"].values()) / len(record["domains"])
    assert by_name["**mean**"][head.index("child")] == f"**{mean:.3f}**"
    assert "nats on held-out text" in text
    assert "no spread is known" in text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("done", "time 11 min 9 s, "),
        ("stopped", "Exit code 75: stopped by a signal, after saving."),
        ("failed", "Message: the loss was not finite at step 120; lower optimizer.lr"),
        ("running", "goes on from the last checkpoint"),
    ],
)
def test_every_state_of_a_run_has_its_twin(make_run, state, said):
    text = render_report(make_run(state=state), markdown=True).replace("\\", "")
    assert said in text
    assert "None" not in text
    assert ("time " in text) == (state == "done")
    assert "Scion 0.1.0" in text
    assert "Command: scion run inheritune-mini" in text


def scored(acc, items=400, **more):
    return {"metric": "acc", "acc": acc, "acc_stderr": 0.0125, "num_items": items, "chance": 0.25} | more


def test_scores_on_tasks_stand_in_a_table_of_their_own(make_run):
    run = make_run()
    path = run / "result.json"
    record = json.loads(path.read_text())
    child = {
        "arc": scored(0.3125),
        "exact": {"metric": "exact_match,strict", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.25},
        "mmlu": scored(0.26),
        "mmlu_anatomy": scored(0.999, group="mmlu"),
        "plain": {"acc": 0.75, "num_items": 12},
    }
    record["tasks"] = child
    record["source"]["tasks"] = {"arc": scored(0.5), "mmlu": scored(0.27)}
    record["control"]["tasks"] = {"arc": scored(0.25)}
    path.write_text(json.dumps(record))
    text = render_report(run, markdown=True)
    rows = table_of(text[text.index("| task ") :])
    assert rows[0] == ["task", "metric", "source", "child", "control", "items"]
    assert rows[2:] == [
        ["arc", "acc", "0.500 \u00b1 0.013", "0.312 \u00b1 0.013", "0.250 \u00b1 0.013", "400"],
        ["exact", "exact\\_match,strict", "\u2013", "0.500 \u00b1 0.250", "\u2013", "\u2013"],
        ["mmlu", "acc", "0.270 \u00b1 0.013", "0.260 \u00b1 0.013", "\u2013", "400"],
        ["plain", "acc", "\u2013", "0.750", "\u2013", "12"],
    ]
    assert "anatomy" not in text


def test_a_run_without_tasks_has_no_table_of_them(make_run):
    assert "| task " not in render_report(make_run(), markdown=True)


@pytest.mark.parametrize("tasks", [None, [], "all", {"a": None}, {"a": {"acc": "high", "metric": 3, "num_items": []}}])
def test_broken_scores_break_nothing(make_run, tasks):
    run = make_run()
    sound = render_report(run, markdown=True).splitlines()
    record = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(record | {"tasks": tasks}))
    assert set(sound) <= set(render_report(run, markdown=True).splitlines())  # the rest of the page is there


def test_a_name_that_ends_with_md_gets_it(make_run, tmp_path):
    run = make_run()
    assert write_report(run, tmp_path / "page.md").read_text() == render_report(run, markdown=True)
    assert write_report(run, tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_hostile_text_neither_acts_nor_breaks_the_table(make_run):
    run = hostile_run(make_run)
    record = json.loads((run / "result.json").read_text())
    record["tasks"] = {bad: {"metric": bad, bad: 0.5, "num_items": 3} for bad in HOSTILE}
    (run / "result.json").write_text(json.dumps(record))
    text = render_report(run, markdown=True)
    assert "<" not in text.replace("&lt;", "")
    assert not re.search(r"(?<!\\)\[[^]]*(?<!\\)\]\(", text)
    losses, _, tasks = text.partition("| task |")
    assert [len({len(row) for row in table_of(part)}) for part in (losses, "| task |" + tasks)] == [1, 1]
    for bad in HOSTILE:
        assert "\n" not in safe(bad)
        assert "<" not in safe(bad)
