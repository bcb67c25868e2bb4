"""What the page says of rounds of growth: numbers as in the ledger, origins of layers, hostile and broken records."""

import json

import pytest

from report.run_folders import CONFIG
from scionlm.report import render_report
from scionlm.report.growth_read import own_lines

ROUND = {
    "layers": 2, "num_parameters": 100, "tokens": 1000, "flops": 2.5e9, "seconds": 61.0, "nll": 5.1234,
    "origins": [{"init": "source", "source_layer": 0}, {"init": "source", "source_layer": 7}],
    "difference": {"mean": 0.0213, "low": 0.0201, "high": 0.0225, "confidence": 0.95},
}  # fmt: skip


def growth(**changes):
    second = ROUND | {
        "round": 2, "layers": 3, "nll": 5.0999, "difference": ROUND["difference"] | {"mean": -0.0022},
        "origins": [{"init": "source", "source_layer": 0, "student_layer": 0}, {"init": "source", "source_layer": 8},
                    {"init": "random"}],
    }  # fmt: skip
    record = {
        "format_version": 1,
        "reference": {"name": "<b>ref</b>", "layers": 9, "nll": 5.1021, "num_tokens": {"a": 600, "b": 400},
                      "num_sequences": 42, "tokens": 4000, "flops": None, "seconds": None},
        "rounds": [ROUND | {"round": 1}, second],
        "total": {"tokens": 2000, "flops": 5e9, "seconds": 122.0},
        "outcome": "matched", "why": "the reference is matched with 3 layers", "result_round": 2,
    }  # fmt: skip
    return record | changes


@pytest.fixture
def page(tmp_path):
    def page(record, config="grow: {from: student, by: 1}\n", **status):
        (tmp_path / "config.yaml").write_text(CONFIG + config)
        (tmp_path / "status.json").write_text(json.dumps({"format_version": 1, "state": "running"} | status))
        (tmp_path / "rounds.json").write_text(json.dumps(record))
        return render_report(tmp_path)

    return page


def test_rounds_are_shown_as_the_ledger_has_them(page):
    html = page(growth())
    for shown in (
        "Growth, round by round", "The reference is matched with 3 layers.", "The result is the child of round 2.",
        "1,000 held-out tokens", "in 42 windows", "goes on with the trained child", "5.1234",
        "+0.0213 (+0.0201 to +0.0225)",
        "-0.0022", "5.1021", "95% interval", "2,000", "1 min 1 s",
    ):  # fmt: skip
        assert shown in html, shown
    assert "&lt;b&gt;ref&lt;/b&gt;" in html
    assert "<b>ref" not in html
    assert "round 1: 0, 7; round 2: 0, 8, fresh" in html


def test_one_round_draws_no_line(page):
    record = growth()
    assert "growth-loss" in page(record)
    assert "growth-loss" not in page(record | {"rounds": record["rounds"][:1]})


def test_rounds_to_come(page):
    html = page(growth(outcome="running", why="grow to 4 layers", result_round=None))
    assert "Next: grow to 4 layers." in html


def test_a_control_that_is_trained_after_the_rounds_is_no_round_more(page):
    assert "Round 3, step 600" in page(growth(result_round=None), step=600)
    assert "Step 600. " in page(growth(), step=600)


def test_a_run_that_does_not_grow_has_no_such_section(page):
    assert "Growth, round by round" not in page(growth(), config="")


@pytest.mark.parametrize(
    "broken",
    [
        {"rounds": "none"}, {"rounds": [None, 3]}, {"rounds": []}, {"reference": None}, {"total": 3}, {"why": None},
        {"rounds": [ROUND | {"difference": None, "origins": "all"}]}, {"rounds": [{}, {}]}, {"result_round": "two"},
        {"rounds": [ROUND | {"origins": [{"source_layer": 1e400}, {}]}] * 3},
    ],
)  # fmt: skip
def test_what_is_broken_breaks_no_page(broken, page):
    assert "Growth, round by round" in page(growth(**broken))


def lines_of_rounds():
    """Return the metrics of two rounds of three steps, counted on."""
    return [
        {"step": 3 * number + step, "tokens": 30 * number + 10 * step, "round": number + 1}
        for number in (0, 1)
        for step in (0, 3)
    ]


@pytest.mark.parametrize(
    ("base", "chosen", "steps", "before"),
    [("source", 2, [0, 3], 30), ("source", 1, [0, 3], 0), ("student", 2, [0, 3, 3, 6], 0), ("student", 1, [0, 3], 0)],
)
def test_the_curve_is_that_of_the_rounds_that_the_result_has_been_through(base, chosen, steps, before):
    record = {"result_round": chosen, "rounds": [{"steps": 3, "tokens": 30}, {"steps": 3, "tokens": 30}]}
    found, tokens = own_lines(lines_of_rounds(), record, {"grow": {"from": base}})
    assert [line["step"] for line in found] == steps
    assert tokens == before
    assert [line["tokens"] for line in found] == [10 * step for step in steps]
    unfinished = own_lines(lines_of_rounds(), record | {"result_round": None}, {})
    assert unfinished == (lines_of_rounds(), 0.0)
