"""lm-eval's tasks on our scores: the same numbers as its own backend, errors in one line, nothing on the screen."""

import sys

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from evaluation_texts import task_folder
from factories import tiny_model
from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.evaluation.lm_eval_tasks import TaskOptions, lm_eval_scores, load_tasks
from scionlm.evaluation.suites import SuiteTask
from scionlm.evaluation.task_record import item_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return task_folder(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def found(folder, tiny_folder):
    options = TaskOptions(folder)
    return lm_eval_scores(tiny_model(), tiny_folder, load_tasks([], options), options)


def test_scores_are_those_of_lm_evals_own_backend(folder, tiny_folder, found):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def theirs(seed):
        model = tiny_model(seed=seed)
        wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_folder), batch_size=4)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        tasks = manager.load(["fruit", "reading"])
        return lm_eval.evaluator.evaluate(wrapped, tasks, bootstrap_iters=0)["results"]

    expected, other = theirs(0), theirs(1)
    for metric in ("acc", "acc_norm"):
        assert found.tasks["fruit"][metric] == pytest.approx(expected["fruit"][f"{metric},none"])
    bits = found.tasks["reading"]["bits_per_byte"]
    assert bits == pytest.approx(expected["reading"]["bits_per_byte,none"], abs=1e-4)
    assert abs(bits - other["reading"]["bits_per_byte,none"]) > 1e-2  # negative control


def test_a_record_says_what_was_measured_on_what(found):
    record = found.tasks["fruit"]
    assert (record["num_items"], record["num_fewshot"], record["version"], record["metric"]) == (12, 0, 3.0, "acc_norm")
    assert 0 < record["acc_stderr"] < 0.2
    assert len(record["config_sha256"]) == 64
    assert found.about["lm_eval"]["fewshot_seed"] == 1234
    assert found.about["lm_eval"]["version"].startswith("0.4.")


def test_items_add_up_to_the_score_and_their_hash_is_theirs(folder, tiny_folder, found):
    scores = item_scores(found.items["fruit"])
    assert sum(scores) / 12 == pytest.approx(found.tasks["fruit"]["acc_norm"])
    assert found.items["fruit"]["scores"] == "".join(str(int(s)) for s in scores)
    other = lm_eval_scores(
        tiny_model(seed=1), tiny_folder, load_tasks([SuiteTask("fruit")], TaskOptions(folder)), TaskOptions(folder)
    )
    assert other.items["fruit"]["sha256"] == found.items["fruit"]["sha256"]
    fewer = TaskOptions(folder, limit=5)
    cut = lm_eval_scores(tiny_model(), tiny_folder, load_tasks([SuiteTask("fruit")], fewer), fewer)
    assert cut.tasks["fruit"]["num_items"] == 5
    assert cut.items["fruit"]["sha256"] != found.items["fruit"]["sha256"]


def test_shots_change_prompts_and_the_config_hash(folder, tiny_folder, found):
    options = TaskOptions(folder, num_fewshot=2)
    shot = lm_eval_scores(tiny_model(), tiny_folder, load_tasks([SuiteTask("fruit")], options), options)
    assert shot.tasks["fruit"]["num_fewshot"] == 2
    assert shot.tasks["fruit"]["config_sha256"] != found.tasks["fruit"]["config_sha256"]
    assert shot.items["fruit"]["sha256"] != found.items["fruit"]["sha256"]


def test_nothing_is_printed_and_no_generator_moves(folder, tiny_folder, capfd):
    import random

    model = tiny_model()
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    options = TaskOptions(folder)
    lm_eval_scores(model, tiny_folder, load_tasks([], options), options)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]


def test_the_single_tasks_of_a_group_are_marked_and_have_a_metric_each(tmp_path, tiny_folder):
    folder = task_folder(tmp_path / "t")
    group = {"group": "both", "task": ["fruit", "reading"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    options = TaskOptions(folder)
    found = lm_eval_scores(tiny_model(), tiny_folder, load_tasks([SuiteTask("both")], options), options)
    told = {name: (record["metric"], record.get("group")) for name, record in found.tasks.items()}
    assert told == {"both": ("acc", None), "fruit": ("acc_norm", "both"), "reading": ("bits_per_byte", "both")}
    assert list(found.items) == ["both"]
    assert found.tasks["reading"]["higher_is_better"]["bits_per_byte"] is False
    assert found.tasks["fruit"]["higher_is_better"]["acc"] is True


def test_an_unknown_task_names_the_nearest(monkeypatch, folder):
    from lm_eval.tasks import TaskManager

    real = TaskManager.__init__
    # The default index takes seconds; what is asked here does not depend on how much is in it.
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: real(self, **(given | {"include_defaults": False}))
    )
    with pytest.raises(UsageError, match="unknown task 'friut'; did you mean 'fruit'"):
        load_tasks([SuiteTask("friut")], TaskOptions(folder))


def test_data_that_is_not_in_the_cache_is_a_storage_error_with_a_remedy(tmp_path):
    folder = task_folder(tmp_path / "t", dataset_path="no-such/data-set", dataset_kwargs={})
    with pytest.raises(StorageError, match=r"'fruit'.*not in the cache.*--suite offline"):
        load_tasks([SuiteTask("fruit")], TaskOptions(folder))


def test_a_broken_task_is_a_data_error(tmp_path):
    folder = task_folder(tmp_path / "t", test_split="nowhere")
    with pytest.raises(DataError, match="fruit"):
        load_tasks([SuiteTask("fruit")], TaskOptions(folder))


def test_a_suites_metric_that_a_task_lacks_is_said(folder, tiny_folder):
    options = TaskOptions(folder)
    loaded = load_tasks([SuiteTask("fruit", metric="f1")], options)
    with pytest.raises(DataError, match=r"no metric 'f1'.*acc"):
        lm_eval_scores(tiny_model(), tiny_folder, loaded, options)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'scionlm\[eval\]'"):
        load_tasks([], TaskOptions(folder))
