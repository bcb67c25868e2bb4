"""Which tasks a request names, and the scores of a model on them: suites of papers, lm-eval's, and the offline one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.data import DataFolder
from scionlm.evaluation.passages import make_passages, require_items
from scionlm.evaluation.suites import OFFLINE, Suite, SuiteTask, suite_of, suites
from scionlm.sources import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scionlm.evaluation.lm_eval_tasks import LoadedTasks, TaskOptions
    from scionlm.evaluation.task_record import TaskResults
    from scionlm.parallel.ranks import Ranks
    from scionlm.recipes.setting import Setting


@dataclass(frozen=True)
class TaskRequest:
    """What is to be evaluated.

    Attributes:
        tasks: lm-eval's and the user's own, each once.
        suites: Those of papers whose tasks are among them.
        offline: Also the offline suite.
    """

    tasks: list[SuiteTask] = field(default_factory=list)
    suites: list[Suite] = field(default_factory=list)
    offline: bool = False


def read_request(names: Sequence[str], suite_names: Sequence[str] = ()) -> TaskRequest:
    """Return what names of tasks and suites stand for.

    Args:
        names: Tasks; suites are known among them, too.
        suite_names: Suites.

    Raises:
        UsageError: There is no such suite, or a task is asked for twice in different ways.
    """
    chosen: dict[str, SuiteTask] = {}
    known: list[Suite] = []
    wanted = [*names, *suite_names]
    for name in wanted:
        if name == OFFLINE:
            continue
        is_suite = name in suite_names or name in suites()
        suite = suite_of(name) if is_suite else None
        known += [suite] if suite else []
        for task in suite.tasks if suite else (SuiteTask(name),):
            before = chosen.setdefault(task.task, task)
            if suite and before.num_fewshot is None and before.metric is None:
                chosen[task.task] = task
            elif suite and (before.num_fewshot, before.metric) != (task.num_fewshot, task.metric):
                raise UsageError(
                    f"task {task.task!r} is asked for with {before.num_fewshot} shots and {before.metric}, and with "
                    f"{task.num_fewshot} and {task.metric}; evaluate one suite at a time"
                )
    return TaskRequest(list(chosen.values()), known, OFFLINE in wanted)


def open_tasks(request: TaskRequest, options: "TaskOptions") -> "LoadedTasks | None":
    """Return lm-eval's tasks with their data; None where none of them are asked for.

    Raises:
        UsageError: One is not known, runs code, or lm-eval is not installed.
        StorageError: Its data is not to be had.
    """
    if not request.tasks and options.folder is None:
        return None
    from scionlm.evaluation.lm_eval_tasks import load_tasks

    return load_tasks(request.tasks, options)


@dataclass(frozen=True)
class TaskInputs:
    """What tasks need beside a model.

    Attributes:
        request: Which tasks.
        options: How.
        places: Data folder and domain of the offline suite's text, by name.
        tokenizer: A Hugging Face folder with the model's tokenizer.
        seed: Of the offline suite's items.
    """

    request: TaskRequest
    options: "TaskOptions"
    places: dict[str, tuple[DataFolder, str]]
    tokenizer: Path
    seed: int = 0


def task_scores(
    model: "PreTrainedModel",
    inputs: TaskInputs,
    loaded: "LoadedTasks | None",
    title: str,
    ranks: "Ranks",
    check: Callable[[], None] = lambda: None,
) -> "TaskResults":
    """Return the scores of a model; all ranks have to call.

    Args:
        model: The model.
        inputs: What is evaluated, with what.
        loaded: lm-eval's tasks.
        title: For the progress bar.
        ranks: The processes that share the work.
        check: Called between batches, to stop where that is asked for.
    """
    from scionlm.core.log import Progress
    from scionlm.evaluation.lm_eval_tasks import lm_eval_scores
    from scionlm.evaluation.task_record import TaskResults

    results = TaskResults()
    with Progress(f"{title}: tasks", 1.0) as progress:

        def report(share: float) -> None:
            progress.update(share)
            check()

        if inputs.request.offline:
            results.add(_offline(model, inputs, report, ranks))
        if loaded is not None:
            results.add(lm_eval_scores(model, inputs.tokenizer, loaded, inputs.options, report, ranks))
    results.about["suites"] = {one.name: _summary(one, results.tasks, inputs.options) for one in inputs.request.suites}
    return results


def _offline(
    model: "PreTrainedModel", inputs: TaskInputs, report: Callable[[float], None], ranks: "Ranks"
) -> "TaskResults":
    from scionlm.evaluation.choices import max_length
    from scionlm.evaluation.offline import NUM_ITEMS, offline_scores

    if not inputs.places:
        raise UsageError("suite offline asks about the held-out part of a data folder; give --data")
    data = next(iter(inputs.places.values()))[0]
    tokenizer = load_tokenizer(data.tokenizer_folder)
    tokenizer.encode_special_tokens = True  # as when the data was made: words that look like a special token are words
    passages = make_passages(inputs.places, tokenizer, inputs.options.limit or NUM_ITEMS, inputs.seed)
    number = sum(len(item.choices) for items in passages.tasks.values() for item in items)
    found = offline_scores(
        model,
        passages,
        tokenizer,
        data.tokenizer.bos_id,
        max_length(model.config),
        inputs.options.batch_size,
        lambda done: report(done / number),
        ranks,
    )
    found.about[OFFLINE] = {"seed": inputs.seed, "data": data.fingerprint, "lines": passages.lines}
    return found


def _summary(suite: Suite, tasks: Record, options: "TaskOptions") -> Record:
    """Return a suite's table: the metric of each task, their mean where all are there, and what is not as published."""
    row = {task.name or task.task: tasks[task.task][str(task.metric)] for task in suite.tasks}
    values = [value for value in row.values() if value is not None]
    mean = sum(values) / len(values) if len(values) == len(row) else None
    unlike = [f"the first {options.limit} items of each task alone"] if options.limit is not None else []
    unlike += [f"{options.num_fewshot} examples before each question"] if options.num_fewshot is not None else []
    return {"source": suite.source, "note": suite.note, "scores": row, "mean": mean, "unlike": unlike}


def require_tasks(names: Sequence[str], places: Mapping[str, tuple[DataFolder, str]]) -> None:
    """Look whether tasks that a run ends with are to be had, before it begins.

    Args:
        names: The tasks and suites.
        places: Data folder and domain of the text that suite `offline` is made of, by name.

    Raises:
        UsageError: One is not known, or lm-eval is not installed.
        DataError: The text is too short for suite `offline`.
        StorageError: Their data is neither in the cache nor to be had.
    """
    request = read_request(names)
    if request.offline:
        from scionlm.evaluation.offline import NUM_ITEMS

        data = next(iter(places.values()))[0]
        require_items(make_passages(places, load_tokenizer(data.tokenizer_folder), NUM_ITEMS, seed=0))
    if request.tasks:
        from scionlm.evaluation.lm_eval_tasks import TaskOptions

        open_tasks(request, TaskOptions())


def tasks_of(setting: "Setting", model: "PreTrainedModel", tokenizer: Path, title: str) -> Record:
    """Return what a run's result says of a model's scores: `tasks` and `items`; nothing where none are asked for.

    Args:
        setting: The run; all its ranks have to call.
        model: The model, placed on its devices.
        tokenizer: A Hugging Face folder with its tokenizer.
        title: For the progress bar.
    """
    names = setting.recipe.evaluate.tasks
    if not names:
        return {}
    from scionlm.evaluation.lm_eval_tasks import TaskOptions

    inputs = TaskInputs(read_request(names), TaskOptions(), setting.held_out, tokenizer)
    loaded = setting.ranks.together(lambda: open_tasks(inputs.request, inputs.options))
    found = task_scores(model, inputs, loaded, title, setting.ranks, setting.stop.check)
    return {"tasks": found.tasks, "items": found.items, "tasks_with": found.about}
