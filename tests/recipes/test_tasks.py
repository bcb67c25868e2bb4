"""Tasks in a run: known before it begins, scored at its end on the exported model, its source and its control."""

import pytest
import yaml

from evaluation_texts import written_data
from scionlm.cli.main import run as scion
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json, write_json
from scionlm.evaluation.paired_scores import paired_scores
from scionlm.recipes.card import model_card
from scionlm.recipes.config import Recipe
from scionlm.recipes.run import run_recipe
from scionlm.report import write_report
from whole_runs import quicken, recipe_of


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_folder):
    return written_data(tmp_path_factory.mktemp("written") / "w", tiny_folder)


@pytest.fixture(scope="module")
def settings(data):
    mixture = {"tales": 0.5, "python": 0.5}
    return {"data__mixture": mixture, "train__steps": 2, "evaluate__every": 2, "evaluate__tasks": ["offline"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_folder, data, settings):
    folder = tmp_path_factory.mktemp("run") / "r"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        patch.setattr("scionlm.evaluation.offline.NUM_ITEMS", 24)
        run_recipe(recipe_of(tiny_folder, data.path, **settings, control=True), folder)
    return folder


def test_the_result_has_scores_of_source_result_and_control(done):
    result = read_json(done / "result.json")
    for record in (result, result["source"], result["control"]):
        assert set(record["tasks"]) == {"offline_last_word", "offline_cloze", "offline_next_line"}
        assert record["tasks"]["offline_cloze"]["num_items"] == 24
    found = paired_scores(result["items"]["offline_cloze"], result["source"]["items"]["offline_cloze"])
    mine, theirs = (one["tasks"]["offline_cloze"]["acc"] for one in (result, result["source"]))
    assert found.difference == pytest.approx(mine - theirs)


def test_the_model_card_has_them(done):
    result, card = read_json(done / "result.json"), (done / "model" / "README.md").read_text()
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]
    stated = {one["dataset"]["type"]: one["metrics"][0]["value"] for one in index["results"]}
    for name, task in result["tasks"].items():
        assert stated[name] == round(task["acc"], 4)
        assert f"| {name} | acc | {result['source']['tasks'][name]['acc']:.4f} ± " in card.replace("\\_", "_")


def test_scion_evaluate_finds_the_same_on_the_exported_model(done, data, capsys, monkeypatch, tmp_path):
    out = tmp_path / "e.json"
    model = str(done / "model")
    flags = ["--data", str(data.path), "--suite", "offline", "--limit", "24", "--max-tokens", "48", "--seq-len", "24"]
    assert scion(["evaluate", model, *flags, "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "offline_cloze" in shown.out
    assert "±" in shown.out
    found, result = read_json(out), read_json(done / "result.json")
    assert found["items"] == result["items"]
    assert {name: task["acc"] for name, task in found["tasks"].items()} == {
        name: task["acc"] for name, task in result["tasks"].items()
    }
    assert set(found["domains"]) == {"tales", "python"}
    assert scion(["evaluate", model, *flags, "-o", str(out)]) == 2  # nothing that is there is written over
    assert "exists" in capsys.readouterr().err


def test_the_report_shows_scores_with_errors_and_takes_hostile_names(done):
    page = write_report(done).read_text()
    assert 'id="tasks"' in page
    assert "offline_next_line" in page
    result = read_json(done / "result.json")
    record = result["tasks"]["offline_cloze"]
    try:
        for part in (result, result["source"], result["control"]):
            part["tasks"] = {"<script>alert(1)</script>": record | {"metric": "<b>"}, "odd": "text", "none": {}}
        write_json(done / "result.json", result)
        assert "<script>alert(1)" not in write_report(done).read_text()
    finally:
        result["tasks"] = {"offline_cloze": record}
        write_json(done / "result.json", result)


def test_a_run_without_tasks_says_nothing_of_them(tmp_path, tiny_folder, data, settings, monkeypatch):
    quicken(monkeypatch.setattr)
    run_recipe(recipe_of(tiny_folder, data.path, **settings | {"evaluate__tasks": []}), tmp_path / "r")
    result = read_json(tmp_path / "r" / "result.json")
    assert not {"tasks", "items"} & (set(result) | set(result["source"]))
    assert 'id="tasks"' not in write_report(tmp_path / "r").read_text()


def test_an_unknown_task_stops_a_run_before_it_begins(tmp_path, tiny_folder, data, settings, monkeypatch):
    from lm_eval.tasks import TaskManager

    real = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: real(self, **(given | {"include_defaults": False}))
    )
    with pytest.raises(UsageError, match="unknown task 'ofline'; did you mean 'offline'"):
        run_recipe(recipe_of(tiny_folder, data.path, **settings | {"evaluate__tasks": ["ofline"]}), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_text_that_is_too_short_for_tasks_stops_a_run_before_it_begins(
    tmp_path, tiny_folder, data, settings, monkeypatch
):
    quicken(monkeypatch.setattr)
    monkeypatch.setattr("scionlm.evaluation.passages._documents", lambda *place: iter(["short"]))
    recipe = recipe_of(tiny_folder, data.path, **settings)
    with pytest.raises(DataError, match="too short for tasks"):
        run_recipe(recipe, tmp_path / "r")
    assert not list(tmp_path.rglob("*.json"))


def test_the_card_of_a_run_with_a_group_names_the_group_alone(done):
    result, manifest = read_json(done / "result.json"), read_json(done / "manifest.json")
    whole = {"metric": "acc", "acc": 0.5, "acc_stderr": 0.1, "num_items": 24}
    result["tasks"] = {"mmlu": whole, "mmlu_anatomy": {"acc": 0.25, "group": "mmlu", "metric": ""}}
    result["source"] |= {"base_model": "org/base"}
    card = model_card(result, manifest, dict.fromkeys(result["domains"], 1000), ["org/text"])
    assert "| mmlu | acc |" in card
    assert "mmlu_anatomy" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("org/base", ["org/text"])
    assert front["metrics"] == ["perplexity", "bits_per_byte", "acc"]


def test_what_is_no_name_is_refused_by_the_schema():
    with pytest.raises(ValueError, match="no name of a task"):
        Recipe.model_validate({"recipe": "scratch", "model": "tinyllama-120m", "evaluate": {"tasks": ["a b"]}})
