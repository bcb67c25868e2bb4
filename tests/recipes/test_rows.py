"""What a run settles by the device: the fastest micro-batch of those that fit, and the kernel of attention."""

import gc
import shutil

import pytest
import torch
from transformers import PreTrainedModel

from scionlm.core.config import load_yaml
from scionlm.core.devices import this_machine
from scionlm.core.errors import UsageError
from scionlm.parallel.ranks import Ranks
from scionlm.parallel.runtime import Runtime, check_attention
from scionlm.recipes import calibrate, setting
from scionlm.recipes import setting as setting_module
from scionlm.recipes.calibrate import choose_rows
from scionlm.recipes.planning import plan_recipe, table_seconds
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.sources import load_hf_model, open_folder
from scionlm.train import step as step_module
from scionlm.train.objective import Objective
from whole_runs import quicken, recipe_of

ALONE = Runtime("cpu", "a processor", 1, "fp32")


@pytest.fixture
def recipe(tiny_folder, data_folder):
    return recipe_of(tiny_folder, data_folder.path, train__micro_batch_size="auto")


@pytest.fixture
def speeds(monkeypatch):
    """Let a pass of so many sequences take what the test says; None is out of memory."""

    def speeds(seconds):
        tried = []

        def passing(objective, optimizer, batch):
            rows = len(batch.input_ids)
            tried.append(rows)
            assert optimizer.tensors()  # beside its state it has to fit
            if seconds[rows] is None:
                raise torch.OutOfMemoryError("too much")

        monkeypatch.setattr(calibrate, "_pass", passing)
        monkeypatch.setattr(calibrate, "_seconds", lambda work, runtime: (work(), seconds[tried[-1]])[1])
        return tried

    return speeds


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}, 8, {1, 2, 4, 8}),
        ({1: 1.0, 2: 1.2, 4: 2.4, 8: 4.8, 16: 0.1}, 2, {1, 2, 4, 8}),
        ({1: 1.0, 2: 1.2, 4: 2.5, 8: 4.0, 16: 8.0}, 8, {1, 2, 4, 8, 16}),
        ({1: 1.0, 2: 1.5, 4: None, 8: 1.0}, 2, {1, 2, 4}),
        ({1: 1.0, 2: 1.99}, 1, {1, 2}),
    ],
)
def test_the_fastest_for_a_sequence_is_taken(recipe, speeds, seconds, best, tried, capsys):
    passed = speeds(seconds)
    assert choose_rows(recipe, list(seconds), ALONE) == best
    assert set(passed) == tried
    assert f"micro_batch_size: {best}" in capsys.readouterr().err


def test_where_weights_are_shared_the_largest_is_taken(recipe, speeds):
    class Pair(Ranks):
        world = 2

    passed = speeds({})
    assert choose_rows(recipe, [1, 2, 4], Runtime("cpu", "a processor", 1, "fp32", Pair(), 2)) == 4
    assert passed == []


def test_a_run_writes_down_what_it_took_and_keeps_it(recipe, tmp_path, monkeypatch):
    quicken(monkeypatch.setattr)
    run_recipe(recipe, tmp_path / "run")
    rows = load_yaml(tmp_path / "run" / "config.yaml")["train"]["micro_batch_size"]
    assert rows in (1, 2, 4)
    monkeypatch.setattr(calibrate, "choose_rows", None)
    run_recipe(recipe, tmp_path / "run")
    assert load_recipe(str(tmp_path / "run" / "config.yaml"), {}).train.micro_batch_size == rows


def test_a_stage_of_its_own_size_is_resolved_once_and_gone_on_with(tiny_folder, data_folder, tmp_path, monkeypatch):
    quicken(monkeypatch.setattr)
    stages = [{"name": "a"}, {"name": "b", "train": {"steps": 2, "micro_batch_size": "auto"}}]
    recipe = recipe_of(tiny_folder, data_folder.path, stages=stages)
    monkeypatch.setattr(setting, "choose_rows", lambda recipe, sizes, runtime: 2)
    run_recipe(recipe, tmp_path / "run")
    assert load_yaml(tmp_path / "run" / "config.yaml")["stages"][1]["train"]["micro_batch_size"] == 2
    monkeypatch.setattr(setting, "choose_rows", None)
    run_recipe(recipe, tmp_path / "run")
    stages[1]["name"] = "c"
    with pytest.raises(UsageError, match="with other settings: stages"):
        run_recipe(recipe_of(tiny_folder, data_folder.path, stages=stages), tmp_path / "run")


def tensor_bytes():
    plain = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum(one.nbytes for one in plain if one.device.type == "cpu")


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("measure", ["choose_rows", "measure_steps"])
def test_what_was_tried_gives_its_memory_back(tiny_folder, data_folder, measure, taught):
    """At once, though the modules of a trial hold each other; that of a teacher too."""
    distill = {"teacher": str(tiny_folder)} if taught else None
    recipe = recipe_of(tiny_folder, data_folder.path, train__micro_batch_size="auto", distill=distill)
    calibrate.measure_steps(recipe)  # what is held for good is there
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        calibrate.choose_rows(recipe, [1, 2], ALONE) if measure == "choose_rows" else calibrate.measure_steps(recipe)
        assert tensor_bytes() <= before + 1000
    finally:
        gc.enable()


def test_what_was_taken_is_what_trains_from_the_first_start_on(recipe, tmp_path, monkeypatch):
    quicken(monkeypatch.setattr)
    monkeypatch.setattr(setting_module, "choose_rows", lambda *arguments: 1)
    sizes, micro_batches = [], step_module.micro_batches

    def watched(batch, size):
        sizes.append(size)
        return micro_batches(batch, size)

    monkeypatch.setattr(step_module, "micro_batches", watched)
    run_recipe(recipe, tmp_path / "run")
    assert set(sizes) == {1}


@pytest.mark.parametrize("name", ["flash", "flex"])
def test_attention_that_needs_a_gpu_is_refused_without_one(name, tiny_folder, data_folder, tmp_path):
    with pytest.raises(UsageError, match=f"train.attention {name} needs a GPU"):
        run_recipe(recipe_of(tiny_folder, data_folder.path, train__attention=name), tmp_path / "run")
    check_attention("flex", Runtime("cuda", "a GPU", 1, "bf16"))
    with pytest.raises(UsageError, match="flash-attn"):
        check_attention("flash", Runtime("cuda", "a GPU", 1, "bf16"))


def test_the_kernel_that_is_measured_is_the_one_that_trains(recipe, tiny_folder, data_folder, monkeypatch):
    """Of the model and of its teacher; one that is not here is refused as it is by the run."""
    asked = []
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda model, name: asked.append(name))
    monkeypatch.setattr(calibrate, "check_attention", lambda *_: None)
    calibrate.measure_steps(recipe)
    assert "flex_attention" not in asked
    distill = {"teacher": str(tiny_folder)}
    calibrate.measure_steps(recipe_of(tiny_folder, data_folder.path, train__attention="flex", distill=distill))
    assert asked.count("flex_attention") == 2
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"train\.attention flex needs a GPU"):
        calibrate.calibrated(recipe_of(tiny_folder, data_folder.path, train__attention="flex"))


def test_a_time_is_measured_with_a_pass_that_fits(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(calibrate, "plan_recipe", lambda _: {"micro_batch_size": 2, "flops": 0})
    monkeypatch.setattr(calibrate, "_pass", lambda objective, optimizer, batch: seen.append(len(batch.input_ids)))
    calibrate.measure_steps(recipe)
    assert set(seen) == {2}


@pytest.mark.parametrize(
    ("setting", "flops", "compiled"), [("auto", 1e18, True), ("auto", 0, False), (False, 1e18, False)]
)
def test_a_step_is_measured_compiled_where_the_run_compiles(
    tiny_folder, data_folder, monkeypatch, setting, flops, compiled
):
    calls = []

    def compiling(self):
        calls.append(self)

    monkeypatch.setattr(Objective, "compile", compiling)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(calibrate, "plan_recipe", lambda _: {"micro_batch_size": 2, "flops": flops})
    calibrate.measure_steps(recipe_of(tiny_folder, data_folder.path, train__compile=setting))
    assert len(calls) == compiled


def test_lengths_that_do_not_go_together_by_the_table_are_measured_all_the_same(tiny_folder, data_folder):
    """By the table a warm-up of so long is longer than the run; by what is measured it may not be."""
    recipe = recipe_of(tiny_folder, data_folder.path, schedule__warmup="1 hour")
    with pytest.raises(UsageError, match=r"schedule\.warmup"):
        plan_recipe(recipe)
    assert len(calibrate.step_seconds(recipe)) == 1


def test_a_model_too_large_for_a_trial_takes_its_times_from_the_table(recipe, tiny_folder, monkeypatch, capsys):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Objective, "forward", full)
    found = calibrate.step_seconds(recipe)
    assert "one device has no room to measure a step on" in capsys.readouterr().err
    config = load_hf_model(open_folder(tiny_folder), torch.float32).config.to_dict() | {"num_hidden_layers": 2}
    assert found == table_seconds(recipe, config, None, this_machine())
