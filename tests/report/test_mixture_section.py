"""The mixture of a run over its tokens: lines and counts are those of its ledgers, which may be of any state."""

import json

import pytest
import run_folders
from test_report import HOSTILE, Page, check_inert, check_page, words

from scionlm.core.errors import DataError
from scionlm.report import render_report
from scionlm.report.mixture_read import read_mixing

UNIT = 2**32


def plan(stage="main", start=None, seq_len: object = 64):
    order = {"seq_len": seq_len, "seed": 0, "stage": stage}
    return {"step": 0, "plan": {"domains": ["a", "b"], "order": order, "start": start or {}}}


def record(step, slots, counts, *phases):
    return {"step": step, "slots": slots, "counts": counts, "phases": list(phases)}


def constant(slot, *weights):
    return {"slot": slot, "weights": [round(weight * UNIT) for weight in weights]}


RAMP = {"slot": 0, "from": [UNIT, 0], "to": [UNIT // 4, 3 * UNIT // 4], "slots": 100}


def write_ledger(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    every = [{"format_version": 1, "kind": "ledger"}, *lines]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in every))


def section_of(run):
    """Return the words of the section; empty where there is none."""
    document = render_report(run)
    check_page(document)
    _, found, rest = document.partition('<section aria-labelledby="mixture">')
    return words(Page(rest.partition("</section>")[0])) if found else ""


def test_a_ramp_is_a_straight_line_and_then_stays(tmp_path):
    write_ledger(tmp_path, plan(), record(40, 160, {"a": 78, "b": 82}, RAMP))
    lines = read_mixing(tmp_path).lines
    assert lines["a"] == [(0, 1.0), (100 * 64, pytest.approx(0.25)), (160 * 64, pytest.approx(0.25))]
    assert lines["b"] == [(0, 0.0), (100 * 64, pytest.approx(0.75)), (160 * 64, pytest.approx(0.75))]


def test_a_ramp_that_was_stopped_on_its_way_ends_where_it_had_got_to(tmp_path):
    write_ledger(tmp_path, plan(), record(10, 40, {"a": 34, "b": 6}, RAMP))
    assert read_mixing(tmp_path).lines["a"] == [(0, 1.0), (40 * 64, pytest.approx(1 - 0.75 * 0.4))]


def test_stages_follow_one_another_by_their_steps(make_run):
    run = make_run()
    # By name the second would come first, and it has the order of the first: it goes on through the same windows.
    second = plan("z", {"a": 9, "b": 1}, 32)
    replayed = {"a": 13, "b": 13, "replay:": 4}
    write_ledger(run / "stages" / "y", second, record(20, 20, replayed, constant(0, 0.2, 0.6, 0.2)))
    write_ledger(run / "stages" / "z", plan("z"), record(10, 10, {"a": 9, "b": 1}, constant(0, 0.9, 0.1)))
    mixing = read_mixing(run)
    assert mixing.stages == [(0, "z"), (640, "y")]
    assert [(x, round(y, 6)) for x, y in mixing.lines["a"]] == [(0, 0.9), (640, 0.9), (640, 0.2), (1280, 0.2)]
    assert [(x, round(y, 6)) for x, y in mixing.lines["replay:"]] == [(0, 0), (640, 0), (640, 0.2), (1280, 0.2)]
    shown = section_of(run)
    assert "where a stage begins: z, y." in shown
    assert "a10z957690.0 %20y412820.0 %" in shown  # step, stage, sequences, tokens, share
    assert "replayed10z000.0 %20y412820.0 %" in shown


def test_the_counts_are_those_between_checkpoints(make_run):
    run = make_run(state="stopped")
    lines = [record(10, 40, {"a": 34, "b": 6}, RAMP), record(20, 80, {"a": 56, "b": 24})]
    again = record(20, 80, {"a": 56, "b": 24}, RAMP)  # as a resumed run writes it
    write_ledger(run, plan(), *lines, again)
    shown = section_of(run)
    assert "a10main342,17685.0 %20main221,40855.0 %" in shown
    assert "b10main638415.0 %20main181,15245.0 %" in shown


def test_many_checkpoints_are_drawn_together_and_nothing_is_lost(make_run):
    run = make_run()
    write_ledger(run, plan(), *(record(k, 4 * k, {"a": k, "b": 3 * k}, *([RAMP] * (k == 1))) for k in range(1, 200)))
    shown = section_of(run)
    rows = shown[shown.index("stagesequences") :]
    assert rows.count("main") <= 2 * 20
    assert "190main" in rows
    assert "199main" in rows


@pytest.mark.parametrize(
    "lines",
    [
        [plan(), record(40, 160, {"a": 80, "b": 80}, constant(0, 0.5, 0.5))],
        [plan(), record(40, 160, {"a": 80, "b": 80}, constant(0, 0.5, 0.5), constant(80, 0.5005, 0.4995))],
        [plan()],
        [],
    ],
)
def test_a_mixture_that_stayed_has_no_section(make_run, lines):
    run = make_run()
    write_ledger(run, *lines)
    assert section_of(run) == ""


def test_weights_that_followed_the_losses_have_their_own_section_alone(make_run):
    run = make_run()
    write_ledger(run, plan(), record(40, 160, {"a": 80, "b": 80}, constant(0, 0.5, 0.5), constant(80, 0.7, 0.3)))
    assert section_of(run)
    line = {"step": 20, "tokens": 20_480, "reweight/a/weight": 0.7, "reweight/b/weight": 0.3}
    run_folders.write_metrics(run / "metrics.jsonl", [*run_folders.metric_lines(6.1, 1.01), line])
    assert section_of(run) == ""
    assert "Weights of the domains" in render_report(run)


def test_names_of_domains_and_stages_cannot_act(make_run):
    run = make_run()
    counts = dict.fromkeys([*HOSTILE, *map(str, range(60))], 5)
    n = len(counts)
    phases = constant(0, *[1 / n] * n), constant(50, *([0.5] + [0.5 / (n - 1)] * (n - 1)))
    write_ledger(run / "stages" / "<b>x", plan(), record(10, 5 * n, counts, *phases))
    write_ledger(run / "stages" / "y", plan(), record(20, 5 * n, counts, *phases))
    document = render_report(run)
    check_inert(document)
    assert "Mixture of the domains" in document
    assert "<b>x" not in document


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "plan": None}, record(1, 4, {"a": 4}, RAMP)],
        [plan(seq_len="long"), record(1, 4, {"a": 4}, RAMP)],
        [plan(), record(1, 1e400, {"a": 4}, RAMP)],
        [plan(), record(1, 1e307, {"a": 1e307, "b": 2}, RAMP)],
        [plan(), record(1, 4, None, RAMP)],
        [plan(), record(1, 4, {"a": 3, "b": 1}, None, "x", {"slot": 0}, {"slot": 1, "weights": [0, 0]})],
        [plan(), record(1, 4, {"a": 3, "b": 1}, {"slot": 0, "weights": [1]}, {"slot": 2, "weights": [1, -1]})],
        [plan(), record(1, 4, {"a": "x", "b": None}, {"slot": 0, "weights": [10**400, 1]}, RAMP | {"slots": 0})],
        [plan(), {"step": 1, "slots": 4, "counts": {"a": 3, "b": 1}, "phases": 7}],
    ],
)
def test_a_ledger_with_other_keys_breaks_no_page(make_run, lines):
    run = make_run()
    write_ledger(run, *lines)
    section_of(run)


def test_a_ledger_that_is_broken_is_named(make_run):
    run = make_run()
    (run / "ledger.jsonl").write_text('{"format_version": 1, "kind": "ledger"}\n{"step"\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl"):
        render_report(run)
