"""What a plan comes to: passes over the text as training makes them, room on the disk as a run takes it, the price."""

import math

import pytest

from scionlm import api
from scionlm.core.config import dump_yaml
from scionlm.core.records import read_json
from scionlm.recipes.bill import disk_bytes, epochs_of, with_price
from scionlm.recipes.config import Recipe
from scionlm.recipes.run import run_recipe
from whole_runs import recipe_of


def test_passes_are_those_that_training_makes(tmp_path, tiny_folder, data_folder):
    stages = [
        {"name": "one", "train": {"steps": 6}, "data": {"mixture": {"alpha": 1.0}}},
        {"name": "two", "train": {"steps": 8}, "data": {"ramp": {"start": {"alpha": 1.0}, "over": 4}}},
    ]
    recipe = recipe_of(tiny_folder, data_folder.path, stages=stages)
    expected = epochs_of(recipe)
    run_recipe(recipe, tmp_path / "run")
    found = read_json(tmp_path / "run" / "training.json")["epochs"]
    assert expected.keys() == found.keys() == {"alpha", "beta"}
    sequences = {name: recipe.data.seq_len / data_folder.num_tokens(name, "train") for name in expected}
    for name, passes in expected.items():
        assert math.isclose(passes, found[name], abs_tol=3 * sequences[name]), name
    assert expected["alpha"] > expected["beta"] > 0


def test_passes_are_unknown_without_text(tiny_folder, tmp_path):
    assert epochs_of(recipe_of(tiny_folder, tmp_path / "none")) == {}


def test_a_run_takes_the_room_that_was_planned(tmp_path, tiny_folder, data_folder):
    changes = {"checkpoint.every": 2, "checkpoint.keep": 2, "train.steps": 9}
    recipe = recipe_of(tiny_folder, data_folder.path, **changes)
    planned = api.plan(str(_written(recipe, tmp_path)))
    run_recipe(recipe, tmp_path / "run")
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    headers = 1.1  # and counters: much, beside such small weights
    assert planned["disk_bytes"] < taken < headers * planned["disk_bytes"]


def _written(recipe, folder):
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(recipe.model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.mark.parametrize(
    ("checkpoint", "stages", "kept"),
    [
        ({"every": "10 min", "keep": 3}, 1, 1 + 1),  # done within ten minutes
        ({"every": 10, "keep": 3}, 1, 3 + 1),
        ({"every": 10, "keep": 3}, 2, 3 + 2),
        ({"every": 50, "keep": 3, "keep_every": 25}, 1, 2 + 1 + 4),
    ],
)
def test_checkpoints_that_stay_are_counted(checkpoint, stages, kept):
    recipe = Recipe.model_validate({
        "recipe": "inheritune", "source": "s", "inherit": {"layers": 1}, "data": {"dir": "d"},
        "train": {"steps": 100 // stages}, "checkpoint": checkpoint,
        **({"stages": [{"name": str(n)} for n in range(stages)]} if stages > 1 else {}),
    })  # fmt: skip
    assert disk_bytes(recipe, {"dtype": "bfloat16"}, 1000, 7, 60.0) == 1000 * kept + 2 * 7


def test_hours_are_of_all_devices_and_cost_what_they_cost():
    planned = {"seconds": 7200.0, "devices": 8}
    assert with_price(planned, None) == planned | {"device_hours": 16.0}
    assert with_price(planned, 2.5)["cost"] == 40.0
