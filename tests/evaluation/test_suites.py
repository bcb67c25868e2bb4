"""The suites as data, against what lm-eval has."""

from pathlib import Path

import pytest
import yaml

from scionlm.core.errors import UsageError
from scionlm.evaluation.suites import suite_of, suites
from scionlm.recipes.tasks import read_request


def yaml_of(task):
    """The YAML in which lm-eval defines a task or a group, found by its name alone: its own index takes seconds."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = {
        "wsc": "super_glue/wsc", "boolq": "super_glue/boolq", "wnli": "glue/wnli", "qnli": "glue/qnli",
        "mnli": "glue/mnli", "truthfulqa_mc2": "truthfulqa", "mmlu": "mmlu/default", "arc_easy": "arc",
        "arc_challenge": "arc", "lambada_openai": "lambada",
    }  # fmt: skip
    for path in sorted((root / folders.get(task, task)).glob("*.yaml")):
        config = read(path)
        if task in (config.get("task"), config.get("group")):
            return config
    raise AssertionError(f"lm-eval has no {task}")


def read(path):
    class Loader(yaml.SafeLoader):
        """Functions stay names."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    config = yaml.load(path.read_text(), Loader)
    for name in [config["include"]] if isinstance(config.get("include"), str) else config.get("include", []):
        config = read(path.parent / name) | config
    return config


@pytest.mark.parametrize("name", sorted(suites()))
def test_tasks_and_metrics_are_lm_evals_own(name):
    for one in suite_of(name).tasks:
        config = yaml_of(one.task)
        metrics = config.get("metric_list") or config.get("aggregate_metric_list")
        metric, _, kind = one.metric.partition(",")
        assert metric in [entry["metric"] for entry in metrics], one
        filters = [entry["name"] for entry in config.get("filter_list", [])]
        assert kind in filters if kind else len(filters) < 2
        if config.get("num_fewshot") == 0:  # lm-eval lets nobody change that
            assert one.num_fewshot == 0


def test_the_suites_are_those_of_the_papers():
    def rows(name):
        return {one.task: (one.num_fewshot, one.metric) for one in suite_of(name).tasks}

    assert rows("sheared") == {
        "sciq": (0, "acc"), "piqa": (0, "acc"), "winogrande": (0, "acc"), "arc_easy": (0, "acc"),
        "arc_challenge": (25, "acc_norm"), "hellaswag": (10, "acc_norm"), "logiqa": (0, "acc_norm"),
        "boolq": (32, "acc"), "lambada_openai": (0, "acc"), "nq_open": (32, "exact_match"), "mmlu": (5, "acc"),
    }  # fmt: skip
    assert len(rows("tinyllama")) == 7
    for task, (shots, metric) in rows("tinyllama").items():  # acc_norm where the task defines it
        defined = [entry["metric"] for entry in yaml_of(task)["metric_list"]]
        assert (shots, metric) == (0, "acc_norm" if "acc_norm" in defined else "acc")
    assert rows("inheritune-low-data")["wsc"] == (0, "acc")
    assert rows("inheritune-low-data")["mmlu"] == (5, "acc")
    assert rows("inheritune-fineweb")["hellaswag"] == (0, "acc_norm")
    assert rows("open-llm")["arc_challenge"] == (25, "acc_norm")


def test_an_unknown_suite_lists_them_all():
    with pytest.raises(UsageError, match=r"did you mean 'sheared'.*inheritune-fineweb.*offline"):
        suite_of("sheard")


def test_names_of_tasks_and_suites_become_one_request():
    request = read_request(["piqa", "offline"], ["sheared"])
    assert request.offline
    assert [one.task for one in request.tasks].count("piqa") == 1
    assert next(one for one in request.tasks if one.task == "piqa").metric == "acc"
    assert read_request(["tinyllama"]).suites == [suite_of("tinyllama")]
    with pytest.raises(UsageError, match=r"'hellaswag'.*one suite at a time"):
        read_request([], ["sheared", "tinyllama"])


@pytest.mark.slow
def test_every_task_is_in_lm_evals_index():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert {one.task for suite in suites().values() for one in suite.tasks} <= known
