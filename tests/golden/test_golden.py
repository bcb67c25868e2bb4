"""Files that earlier versions wrote are still read."""

from pathlib import Path

import pytest
import torch

from factories import tiny_model
from scionlm.core.config import load_yaml
from scionlm.core.records import read_json, read_jsonl
from scionlm.data import DataFolder
from scionlm.recipes.analysis_against import beside
from scionlm.recipes.analysis_store import Store
from scionlm.recipes.config import Recipe
from scionlm.report import render_report
from scionlm.report.analysis_page import write_analysis_page
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings

V1 = Path(__file__).parent / "v1"


def test_a_data_folder_of_version_1_is_read_to_the_token():
    data = DataFolder(V1 / "data")
    assert data.domains == ["alpha", "beta"]
    assert data.fingerprint == read_json(V1 / "run/manifest.json")["data"]["fingerprint"]
    for domain in data.domains:
        for split in ("train", "held_out"):
            stream = data.stream(domain, split, verify=True)
            assert stream.num_tokens == data.num_tokens(domain, split)
            ends = {int(stream.read(document.end, 1)[0]) for document in stream.documents()}
            assert ends == {data.tokenizer.separator_id}


def test_every_document_of_a_run_of_version_1_is_read():
    paths = sorted((V1 / "run").rglob("*.json"))
    assert len(paths) > 8
    for path in paths:
        assert read_json(path)["format_version"] == 1
    assert read_jsonl(V1 / "run/metrics.jsonl")
    assert Recipe.model_validate(load_yaml(V1 / "run/config.yaml")).inherit.layers == 1
    result = read_json(V1 / "run/result.json")
    assert f"{result['domains']['alpha']['nll']:.2f}" in render_report(V1 / "run")


@pytest.mark.parametrize("which", ["run", "run/control"])
def test_a_checkpoint_of_version_1_is_loaded(which, tmp_path):
    import shutil

    shutil.copytree(V1 / which / "checkpoints", tmp_path / "checkpoints")
    model = tiny_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=2)
    learner = Learner(Objective(model, torch.float32), Optimizer(model, OptimizerSettings()), Guard(0))
    before = model.model.norm.weight.detach().clone()
    checkpoint = CheckpointStore(tmp_path / "checkpoints", 1).newest()
    assert checkpoint is not None
    assert checkpoint.state["step"] == 4
    learner.load(checkpoint)
    assert not torch.equal(before, model.model.norm.weight)
    assert learner.optimizer.tensors()["model.norm.weight/exp_avg"].abs().sum() > 0


def test_an_analysis_of_version_1_is_read(tmp_path):
    import shutil

    folder = tmp_path / "analysis"
    shutil.copytree(V1 / "analysis", folder)
    record = read_json(folder / "analysis.json")
    page = write_analysis_page(folder).read_text()
    assert f"{record['overall']['nll']:.2f}" in page

    settings = read_json(folder / "settings.json")
    assert settings.pop("format_version") == 1
    store = Store(folder, settings)
    for name in ("forward", "gradients", "removal", "lens", "greedy-1"):
        arrays = store.get(name, lambda: pytest.fail("it is there"))
        assert arrays
    assert beside(record)["layers"] == record["layers"]
