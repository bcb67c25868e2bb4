"""The examples run, on tiny models and texts, and give what their heads promise."""

import re

import pytest
from small_runs import SMALL

from scripts import ROOT, load_script
from whole_runs import quicken

BUDGET = "30000"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


def test_cut_and_train(world):
    means = load_script("examples/cut_and_train.py").main("small", "data", "runs/half", SMALL)
    assert set(means) == {"first", "first/control", "spaced"}
    assert (world / "runs/half/compared/compare.html").exists()


def test_prune_to_budget(world):
    small = SMALL | {"prune.steps": 8, "prune.tokens": None, "distill": {"teacher": "source"}}
    sizes = load_script("examples/prune_to_budget.py").main("small", "data", BUDGET, "runs/budget", small)
    assert sizes["num_parameters"] <= int(BUDGET)
    assert (world / "runs/budget/model/config.json").exists()


def test_go_on_with_new_text(world):
    example = load_script("examples/go_on_with_new_text.py")
    found = example.main("small", "data", "prose", "code", "runs/new", SMALL)
    assert set(found) == set(example.SHARES)
    assert all(set(change) == {"forgetting", "adaptation"} for change in found.values())


def test_look_inside(world):
    options = {"seq_len": 16, "num_sequences": 2}
    losses = load_script("examples/look_inside.py").main("small", "data", "3", "looked", 64, **options)
    assert {"removal", "block_influence"} <= set(losses)
    assert (world / "looked/report.html").exists()


def test_each_is_short_says_how_to_run_it_and_is_tested():
    tested = set(re.findall(r"examples/(\w+\.py)", (ROOT / "tests/docs/test_examples.py").read_text()))
    assert {path.name for path in EXAMPLES} == tested
    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 80
        assert f"python examples/{path.name}" in text.split('"""')[1]
