"""The page's learning rate, what was planned beside what was spent, and what went wrong on the way."""

import json
import re

import pytest

from scionlm.report import render_report
from scionlm.report.collect import read_run
from scionlm.report.schedule import schedule_section

HOSTILE = "</script><img src=x onerror=alert(1)>"
PLAN = {
    "format_version": 1,
    "num_tokens": 409_600,
    "flops": 1.5e14,
    "models_trained": 2,
    "seconds_by_part": {"training": 1200.0, "evaluation": 60.0},
    "memory_bytes_per_device": 2 * 10**9,
    "utilization": 0.5,
    "stages": [
        {"name": HOSTILE, "schedule": "warmup 20 steps to 0.0006", "curve": [[1, 3e-5], [20, 6e-4]]},
        {"name": "anneal", "schedule": "decay 380 steps to 6e-05", "curve": [[21, 6e-4], [400, 6e-5]]},
    ],
}


@pytest.fixture
def run(make_run):
    folder = make_run()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    result = json.loads((folder / "result.json").read_text())
    result["training"] |= {
        "peak_flops": {"flops_per_s": 4e11, "known_from": "measured"},
        "mfu_formula": "tokens/s * FLOPs / peak",
        "skipped_updates": 2,
        "loss_spikes": 1,
        "checkpoint_seconds": 10.0,
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines.append(json.dumps({"step": 401, "tokens": 410_000, "train/nll_nats": None, "train/skipped_updates": 2}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_planned_and_spent_stand_side_by_side(run):
    section = str(schedule_section(read_run(run)))
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", section)
    text = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    assert text[text.index("tokens") + 1 : text.index("tokens") + 3] == ["409,600", "409,600"]
    training = json.loads((run / "result.json").read_text())["training"]
    share = 100 * training["flops"] / training["seconds"] / 4e11
    peak = next(place for place, words in enumerate(text) if "peak speed" in words)
    assert text[peak + 2] == f"{share:.1f} %"
    saving = text[text.index("time spent saving") + 2]
    assert saving == f"{100 * 10 / (10 + training['seconds']):.1f} %"
    assert "10 min" in text[text.index("training time") + 1]  # of one of the two models
    assert "tokens/s * FLOPs / peak" in section


@pytest.mark.parametrize(("base", "tokens"), [("source", "2,000"), ("student", "3,000")])
def test_of_rounds_the_plan_of_what_the_childs_weights_saw_is_shown(run, base, tokens):
    sizes = {"reference": 9000, "round 1 (1 layers)": 1000, "round 2 (2 layers)": 2000, "round 3 (3 layers)": 4000}
    parts = [
        {"name": name, "num_tokens": n, "flops": n, "seconds": 1.0} for name, n in (sizes | {"control": 7}).items()
    ]
    plan = PLAN | {"rounds": parts, "num_tokens": 16_007}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "rounds.json").write_text(json.dumps({"format_version": 1, "rounds": [], "result_round": 2}))
    with (run / "config.yaml").open("a") as file:
        file.write(f"grow: {{from: {base}, by: 1}}\n")
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", str(schedule_section(read_run(run))))
    text = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    assert text[text.index("tokens") + 1] == tokens


def test_what_went_wrong_is_said_with_its_steps(run):
    section = str(schedule_section(read_run(run)))
    assert "2 update(s) were left out" in section
    assert "leapt 1 time(s)" in section
    assert "finite (step 401)." in section


def test_names_cannot_act_and_the_stages_are_in_words(run):
    section = str(schedule_section(read_run(run)))
    assert HOSTILE not in section
    assert "decay 380 steps to 6e-05" in section
    assert HOSTILE not in render_report(run)


@pytest.mark.parametrize(
    "plan", [{}, {"stages": "none"}, {"stages": [{"curve": [[1], "x", [1, None], [True, 2]]}, 7]}, {"stages": [{}]}]
)
def test_a_plan_that_is_missing_or_odd_is_passed_over(run, plan):
    (run / "plan.json").write_text(json.dumps({"format_version": 1} | plan))
    section = str(schedule_section(read_run(run)))
    assert "what each update was made with" in section or "each update was made with" in section


def test_a_run_without_rates_and_plan_has_no_such_section(make_run):
    folder = make_run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("optim/lr", None)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert schedule_section(read_run(folder)) is None
    assert "Learning rate and cost" not in render_report(folder)


def test_the_share_of_the_peak_is_of_all_devices(run):
    result = json.loads((run / "result.json").read_text())
    one = str(schedule_section(read_run(run)))
    result["training"]["devices"] = 8
    (run / "result.json").write_text(json.dumps(result))
    shares = [re.findall(r"peak speed.*?([\d.]+) %</td>", re.sub(r"50\.0 %", "", text))[0]
              for text in (one, str(schedule_section(read_run(run))))]  # fmt: skip
    assert float(shares[0]) == pytest.approx(8 * float(shares[1]), abs=0.5)


def test_what_was_left_out_is_told_of_a_run_without_a_result(run):
    (run / "result.json").unlink()
    lines = [json.dumps({"step": step, "tokens": step, "train/skipped_updates": 1}) for step in range(500, 530)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    section = str(schedule_section(read_run(run)))
    assert "31 update(s) were left out because their loss or gradient was not finite (step 401, 500," in section
    assert "518 and 11 more)" in section


def test_what_went_wrong_while_pruning_is_told_too(run):
    (run / "prune").mkdir()
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "prune: {method: masks}\n")
    line = json.dumps({"step": 7, "tokens": 70, "train/spike_sigmas": 9.0})
    (run / "prune" / "metrics.jsonl").write_text(f'{{"format_version": 1, "kind": "metrics"}}\n{line}\n')
    section = str(schedule_section(read_run(run)))
    assert "While pruning: The loss leapt 1 time(s) far above its recent course (step 7)." in section


def test_saving_is_a_share_of_the_phase_that_it_is_known_of(run):
    result = json.loads((run / "result.json").read_text())
    result["training"] |= {"seconds": 200.0, "recovery": {"seconds": 90.0}}
    (run / "result.json").write_text(json.dumps(result))
    assert "10.0 %" in str(schedule_section(read_run(run)))
