"""What a plan comes to: passes over the text as training makes them, room on the disk as a run takes it, the price."""

import math
from collections import Counter

import pytest

from scionlm import api
from scionlm.core.config import dump_yaml
from scionlm.core.errors import UsageError
from scionlm.core.records import read_json
from scionlm.recipes import planning as planning_module
from scionlm.recipes import setting as setting_module
from scionlm.recipes.bill import disk_bytes, epochs_of, with_price
from scionlm.recipes.config import Recipe
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import quicken, recipe_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


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


def test_passes_of_pruning_and_of_rounds_that_go_on_are_counted(tiny_folder, data_folder):
    text = {"source": str(tiny_folder), "data.dir": str(data_folder.path), "data.seq_len": 16,
            "train.global_batch_tokens": 32, "train.precision": "fp32"}  # fmt: skip
    shear = {"target": TARGET, "prune": {"method": "masks", "steps": 40}, "train.steps": 10}
    alone = epochs_of(load_recipe("inheritune", text | {"inherit.layers": 2, "train.steps": 50}))
    assert api.plan("shear", text | shear)["epochs"] == pytest.approx(alone)
    grow = {"inherit.layers": 2, "grow": {"by": 1, "max_rounds": 3}, "train.steps": 50}
    once, thrice = (
        api.plan("inheritune", text | grow | {"grow.from": base})["epochs"] for base in ("source", "student")
    )
    assert once == pytest.approx(alone)
    assert thrice == pytest.approx({name: 3 * passes for name, passes in alone.items()})


TARGET = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
          "num_key_value_heads": 1}  # fmt: skip
SHEAR = {"recipe": "shear", "inherit": None, "target": TARGET}
EVALUATED = {
    "child and control": {"control": True, "evaluate.every": 2},
    "what was known before": {
        "recipe": "continual", "inherit": None, "upstream.domains": ["alpha"], "data.mixture": {"beta": 1.0},
        "evaluate.dense": False,
    },
    "weights that move": {"reweight": {"every": 2, "tokens_per_domain": 64}, "train.steps": 8, "evaluate.every": 3},
    "rounds": {"grow": {"by": 1, "max_rounds": 2, "until": "end"}, "inherit.layers": 2},
    "rounds and a control": {
        "grow": {"by": 1, "max_rounds": 2, "until": "end", "from": "student"}, "inherit.layers": 2, "control": True,
    },
    "masks and a control": SHEAR | {"prune": {"method": "masks", "steps": 40}, "control": True, "evaluate.every": 3},
    "scores in two steps": SHEAR | {"prune": {"method": "scores", "steps": 8, "iterations": 2}},
    "scores at once, weights that move": SHEAR | {
        "prune": {"method": "scores", "steps": 8, "iterations": 1}, "reweight": {"every": 2, "tokens_per_domain": 64},
    },
    "scores that train nothing": SHEAR | {"prune": {"method": "scores", "iterations": 1}},
}  # fmt: skip


@pytest.mark.parametrize("what", EVALUATED)
def test_the_held_out_tokens_that_a_run_measures_are_those_of_its_plan(
    what, tiny_folder, data_folder, tmp_path, monkeypatch
):
    seen, planned = Counter(), list[int]()
    real, asked = setting_module.domain_losses, planning_module.evaluated_tokens

    def counted(token_nll, data, names, *more, **options):
        found = real(token_nll, data, names, *more, **options)
        seen["tokens"] += sum(loss.num_tokens for loss in found.values())
        return found

    def known(recipe, source, *more):
        found = asked(recipe, source, *more)
        planned.append(sum(tokens for _, tokens in found))
        return found

    monkeypatch.setattr(setting_module, "domain_losses", counted)
    monkeypatch.setattr(planning_module, "evaluated_tokens", known)
    recipe = recipe_of(tiny_folder, data_folder.path, **EVALUATED[what])
    api.plan(str(_written(recipe, tmp_path)))
    monkeypatch.setattr(planning_module, "evaluated_tokens", asked)
    run_recipe(recipe, tmp_path / "run")
    # Rounds are planned after the first of them, by itself; the end of a text is in no window.
    assert sum(planned[1:] or planned) == pytest.approx(seen["tokens"], rel=0.01)


def test_passes_are_unknown_without_text(tiny_folder, tmp_path):
    assert epochs_of(recipe_of(tiny_folder, tmp_path / "none")) == {}


def test_a_domain_that_is_not_in_the_text_is_no_plan(tiny_folder, data_folder):
    changes = {"data.mixture": {"prose": 1.0}}
    with pytest.raises(UsageError, match=r"domain 'prose' is not in .*; data.mixture=null takes all"):
        epochs_of(recipe_of(tiny_folder, data_folder.path, **changes))


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
