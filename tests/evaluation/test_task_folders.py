"""Task folders of users: what runs code is refused before it does, and runs where it is allowed to."""

import pytest
import yaml

from evaluation_texts import task_folder
from factories import tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.evaluation.lm_eval_tasks import TaskOptions, lm_eval_scores, load_tasks
from scionlm.evaluation.suites import SuiteTask
from scionlm.evaluation.task_folders import check_task_folder

METRICS = {"acc", "acc_norm", "bits_per_byte"}

CODE = """
from pathlib import Path
Path({canary!r}).write_text("ran at import")
def text(doc):
    return doc["question"]
"""


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def hostile(folder, canary, text):
    (folder / "helper.py").write_text(CODE.format(canary=str(canary)))
    (folder / "evil.yaml").write_text(text)
    return folder


EVIL = """
task: evil
include: fruit.yaml
doc_to_text: !function helper.text
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_task_with_a_function_is_refused_before_anything_of_it_runs(tmp_path, canary, nested):
    folder = task_folder(tmp_path / "t")
    text = EVIL
    if nested:  # in a file of another name, which one of the index includes
        (folder / "_base_yaml").write_text("doc_to_text: !function helper.text\n")
        text = "task: evil\ninclude: [fruit.yaml, _base_yaml]\n"
    hostile(folder, canary, text)
    with pytest.raises(UsageError, match=r"!function.*--allow-task-code"):
        load_tasks([], TaskOptions(folder))
    assert not canary.exists()


def test_where_it_is_allowed_the_function_runs(tmp_path, canary, tiny_folder):
    folder = hostile(task_folder(tmp_path / "t"), canary, EVIL)
    options = TaskOptions(folder, allow_code=True)
    found = lm_eval_scores(tiny_model(), tiny_folder, load_tasks([], options), options)
    assert canary.read_text() == "ran at import"
    assert found.tasks["evil"]["num_items"] == 12


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("task: a\nunsafe_code: true\n", "unsafe_code"),
        ("task: a\nclass: here.Task\n", "class"),
        ("group: g\ntask: [{task: inner, unsafe_code: true}]\n", "unsafe_code"),
        ("task: a\ndoc_to_text: !!python/object/apply:os.system ['true']\n", "tag"),
        ("task: a\nmetric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
        ("task: a\nmetric_list: [{metric: theirs}]\n", "none of lm-eval's own"),
        ("group: g\ntask: [{task: inner, metric_list: [{metric: ./theirs}]}]\n", "none of lm-eval's own"),
        ("task: a\ndataset_path: pandas\n", "dataset_path"),
        ("task: a\ndataset_path: ./loader.py\n", "dataset_path"),
        ("task: a\ninclude: ../outside.yaml\n", "outside"),
    ],
)
def test_every_way_to_code_is_refused(tmp_path, text, word):
    (tmp_path / "outside.yaml").write_text("output_type: multiple_choice\n")
    folder = task_folder(tmp_path / "t")
    (folder / "more.yaml").write_text(text)
    with pytest.raises(UsageError, match=word):
        check_task_folder(folder, False, METRICS)
    check_task_folder(folder, True, METRICS)


def test_plain_tasks_pass(tmp_path):
    check_task_folder(task_folder(tmp_path / "t"), False, METRICS)


def test_templates_run_in_a_sandbox(tmp_path, canary, tiny_folder):
    """jinja2 as lm-eval has it reaches Python's classes, and with them files."""
    reach = "{{ lipsum.__globals__['os'].makedirs('" + str(canary) + "', exist_ok=True) }}"
    folder = task_folder(tmp_path / "t", doc_to_text=reach + "{{question}}")
    options = TaskOptions(folder)
    with pytest.raises(UsageError, match="reaches into Python"):
        load_tasks([], options)
    assert not canary.exists()
    # Negative control: without the sandbox that does write the file.
    options = TaskOptions(folder, allow_code=True)
    lm_eval_scores(tiny_model(), tiny_folder, load_tasks([], options), options)
    assert canary.exists()


def test_a_metric_that_is_not_lm_evals_own_is_refused(tmp_path):
    folder = task_folder(tmp_path / "t", metric_list=[{"metric": "someones_metric"}])
    with pytest.raises(UsageError, match="someones_metric"):
        load_tasks([], TaskOptions(folder))


def test_the_code_of_a_metric_inside_a_group_is_not_run(tmp_path, canary):
    folder = task_folder(tmp_path / "t")
    metric = tmp_path / "theirs"
    metric.mkdir()
    (metric / "theirs.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\n")
    inner = yaml.safe_load((folder / "fruit.yaml").read_text()) | {"task": "inner"}
    inner["metric_list"] = [{"metric": str(metric)}]
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "g", "task": [inner]}))
    with pytest.raises(UsageError, match="none of lm-eval's own"):
        load_tasks([SuiteTask("g")], TaskOptions(folder))
    assert not canary.exists()


def test_what_is_no_task_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        check_task_folder(tmp_path / "none", False, METRICS)
    with pytest.raises(UsageError, match=r"no .yaml"):
        check_task_folder(tmp_path, False, METRICS)
    (tmp_path / "a.yaml").write_text("task: [")
    with pytest.raises(DataError, match="not valid YAML"):
        check_task_folder(tmp_path, True, METRICS)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"task": "a", "include": "b"}))
    with pytest.raises(DataError, match="includes b"):
        check_task_folder(tmp_path, True, METRICS)
