"""Results that are kept as folders: the page says what the numbers beside it are, and its recipe can be run again."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import yaml

from scionlm.recipes.config_sweep import read_sweep
from scripts import load_script

keeping = load_script("tools/make_result.py")
RESULTS = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*/compare.json"))


def known(path):
    return json.loads(path.read_text())


def test_there_are_some():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_table_is_that_of_the_numbers(path):
    lines = (path.parent / "index.md").read_text().splitlines()
    found = known(path)
    means = {row["name"]: row["mean"] for row in found["rows"]}
    for group in found["groups"]:
        assert group["mean"] == pytest.approx(statistics.fmean(means[name] for name in group["rows"]))
        (line,) = [line for line in lines if line.startswith(f"| {group['name']} |") and "**" in line]
        assert f"**{group['mean']:.3f}**" + ("" if group["n"] == 1 else f" ± {group['std']:.3f}") in line
        assert all(f" {loss:.3f} " in line for loss in group["domains"].values())
    assert len(found["git_commit"]) == 40  # of a checkout in which nothing was changed


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_every_run_is_measured_to_its_end(path):
    found = known(path)
    with (path.parent / "metrics.csv").open() as file:
        last = {line["run"]: line for line in csv.DictReader(file)}  # of each the last line counts
    assert set(last) == {row["name"] for row in found["rows"]}
    for row in found["rows"]:
        for name, loss in row["domains"].items():
            assert float(last[row["name"]][name]) == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_recipe_is_one(path):
    sweep = read_sweep(yaml.safe_load((path.parent / "recipe.yaml").read_text()), "recipe.yaml")
    runs = {run.folder for run in sweep.runs}
    assert {row["name"].split("/")[-1] for row in known(path)["rows"] if row["kind"] == "run"} <= runs


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_it_names_no_path_of_the_machine_that_made_it(path):
    assert not [word for word in known(path)["command"] if word.startswith("/")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_seeds_that_join_later_are_grouped_as_compare_groups_them(path):
    found = known(path)
    rows = [row for row in found["rows"] if row["kind"] == "run" and row["seed"] is not None]
    groups = [group | {"gap_closed": None} for group in found["groups"] if group["kind"] == "run"]
    assert keeping.regrouped(rows) == groups
