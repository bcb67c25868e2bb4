"""`scion export`: checkpoints as plain Hugging Face folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scionlm import api
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import quicken


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, data_folder):
    out = tmp_path_factory.mktemp("export") / "run"
    settings = {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": None, "data.seq_len": 24,
        "inherit.layers": 2, "train.steps": 6, "train.global_batch_tokens": 96, "train.precision": "fp32",
        "evaluate.tokens_per_domain": 100, "control": False, "checkpoint.every": 2, "checkpoint.keep": 3,
        "average.method": "ema", "average.decay": 0.5,
    }  # fmt: skip
    run_recipe(load_recipe("inheritune-mini", settings), out)
    return out


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def saved(run, step, name="weights"):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def same(folder, wanted) -> bool:
    found = weights(folder)
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_is_exported_as_it_is(run, tmp_path):
    api.export(run, tmp_path / "newest")
    api.export(run, tmp_path / "four", step=4)
    api.export(run / "checkpoints" / "step-00000004", tmp_path / "by-folder")
    assert same(tmp_path / "newest", saved(run, 6))
    assert same(tmp_path / "four", saved(run, 4))
    assert same(tmp_path / "by-folder", saved(run, 4))
    assert not same(tmp_path / "four", saved(run, 6))
    assert (tmp_path / "four" / "tokenizer.json").exists()


def test_the_last_checkpoints_are_averaged(run, tmp_path):
    api.export(run, tmp_path / "mean", last=3)
    parts = [saved(run, step) for step in (2, 4, 6)]
    found = weights(tmp_path / "mean")
    for name in parts[0]:
        mean = sum(part[name].double() for part in parts) / 3
        assert torch.allclose(found[name].double(), mean, atol=1e-7)
    assert not same(tmp_path / "mean", parts[-1])


def test_the_runs_own_average_is_what_it_exported_itself(run, tmp_path):
    api.export(run, tmp_path / "average", averaged=True)
    assert same(tmp_path / "average", saved(run, 6, "average"))
    assert same(run / "model", saved(run, 6, "average"))
    assert not same(run / "model", saved(run, 6))


def settings_of(tiny_folder, data_folder, **changes):
    return {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": None, "data.seq_len": 24,
        "train.steps": 4, "train.global_batch_tokens": 96, "train.precision": "fp32", "checkpoint.every": 2,
        "evaluate.tokens_per_domain": 100, "evaluate.every": 0, "export.dtype": "float32",
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip


def test_an_average_with_the_first_weights_is_exported_as_the_average_that_it_is(tiny_folder, data_folder, tmp_path):
    asked = settings_of(tiny_folder, data_folder, inherit__layers=2, average__method="start", average__share=0.25)
    run_recipe(load_recipe("inheritune", asked), tmp_path / "run")
    api.export(tmp_path / "run", tmp_path / "average", averaged=True)
    first, last = (saved(tmp_path / "run", 4, name) for name in ("average", "weights"))
    assert same(tmp_path / "average", {name: torch.lerp(last[name], first[name], 0.25) for name in last})
    assert same(tmp_path / "run" / "model", weights(tmp_path / "average"))
    assert not same(tmp_path / "average", first)


def test_an_average_that_has_not_begun_is_none(tiny_folder, data_folder, tmp_path):
    asked = settings_of(tiny_folder, data_folder, inherit__layers=2, average__decay=0.5, average__start=3)
    run_recipe(load_recipe("inheritune", asked), tmp_path / "run")
    with pytest.raises(UsageError, match="holds no average, or none yet"):
        api.export(tmp_path / "run", tmp_path / "early", step=2, averaged=True)
    api.export(tmp_path / "run", tmp_path / "late", averaged=True)
    assert same(tmp_path / "late", saved(tmp_path / "run", 4, "average"))


def test_an_exported_control_says_that_it_began_at_random(tiny_folder, data_folder, tmp_path):
    asked = settings_of(tiny_folder, data_folder, inherit__layers=2, control=True)
    run_recipe(load_recipe("inheritune", asked), tmp_path / "run")
    api.export(tmp_path / "run" / "control", tmp_path / "control")
    api.export(tmp_path / "run", tmp_path / "child")
    said = {name: read_json(tmp_path / name / "provenance.json")["init"] for name in ("control", "child")}
    assert said == {"control": "random", "child": "source"}
    assert "from random weights" in (tmp_path / "control" / "README.md").read_text()
    assert same(tmp_path / "control", saved(tmp_path / "run" / "control", 4))


def test_a_later_step_of_pruning_is_exported_as_what_the_one_before_left(tiny_folder, data_folder, tmp_path):
    target = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2,
              "num_key_value_heads": 1}  # fmt: skip
    prune = {"method": "scores", "importance": "magnitude", "iterations": "auto", "steps": 8}
    asked = settings_of(tiny_folder, data_folder, target=target, prune=prune)
    run_recipe(load_recipe("shear", asked), tmp_path / "run")
    steps = sorted((tmp_path / "run" / "prune").glob("step-*"))
    assert len(steps) > 1
    for step in steps:
        api.export(step, tmp_path / step.name)
        assert same(tmp_path / step.name, weights(step / "model")), step.name


@pytest.mark.parametrize("pruned", [None, "scores", "masks"])
def test_settings_of_generation_are_the_sources_also_where_transformers_would_not_save_them(
    tiny_folder, data_folder, tmp_path, pruned
):
    """Llama-2-chat has such ones: a temperature, and no sampling."""
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    written = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 7], "transformers_version": "4.32.0"}
    (source / "generation_config.json").write_text(json.dumps(written))
    asked = settings_of(source, data_folder, inherit__layers=2)
    if pruned:
        target = {"num_hidden_layers": 4, "intermediate_size": 24}
        asked = settings_of(source, data_folder, target=target, prune={"method": pruned, "steps": 4})
    out = tmp_path / "run"
    run_recipe(load_recipe("shear" if pruned else "inheritune", asked), out)
    api.export(out, tmp_path / "exported")
    for folder in [tmp_path / "exported", out / "model", *out.glob("prune/**/model")]:
        assert json.loads((folder / "generation_config.json").read_text()) == written, folder


def test_a_model_has_no_settings_of_generation_where_its_source_has_none(tiny_folder, data_folder, tmp_path):
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    (source / "generation_config.json").unlink()
    run_recipe(load_recipe("inheritune", settings_of(source, data_folder, inherit__layers=2)), tmp_path / "run")
    assert not (tmp_path / "run" / "model" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 5}, r"no checkpoint of step 5 \(has: 2, 4, 6\)"),
        ({"last": 4}, "there are 3 checkpoints"),
        ({"last": 2, "averaged": True}, "leave --last out"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_is_left(run, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        api.export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_and_a_damaged_checkpoint_are_named(run, tmp_path):
    with pytest.raises(UsageError, match="neither a run folder"):
        api.export(tmp_path, tmp_path / "out")
    path = run / "checkpoints" / "step-00000002" / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(DataError, match=r"damaged \(weights\.safetensors\)"):
            api.export(run, tmp_path / "out", step=2)
    finally:
        path.write_bytes(whole)
