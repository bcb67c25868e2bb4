"""Tasks of lm-eval, on a model that is loaded already: the only module that imports lm-eval.

Prompts, metrics and data are lm-eval's; log-likelihoods are Scion's own (`choices.score`), which are the same to 1e-4
and share contexts, find their batch size, and are computed by all ranks together.

Source: Gao et al., the LM Evaluation Harness (lm-eval), 0.4.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import io
import json
import logging
import random
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from scionlm.core.errors import DataError, ScionError, StorageError, UsageError
from scionlm.core.records import Record, stderr_key
from scionlm.evaluation.choices import Request, score
from scionlm.evaluation.suites import OFFLINE, SuiteTask, suites
from scionlm.evaluation.task_folders import check_task_folder
from scionlm.evaluation.task_record import TaskResults, item_record
from scionlm.parallel.placing import lies_in_parts
from scionlm.parallel.ranks import ALONE, Ranks

_GENERATED = {"cuda": "auto", "cpu": 8}  # texts written at once
_UNREACHABLE = ("Connection", "Offline", "LocalEntryNotFound", "ConnectError", "Timeout", "MaxRetry", "HfHubHTTP")


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are evaluated.

    Attributes:
        folder: Folder with tasks of the user's own.
        allow_code: Let them run code.
        limit: Items of each task, from its start; None takes all.
        num_fewshot: Examples before each question; None is the task's or suite's own number.
        batch_size: Inputs in one pass; None finds one.
        seed: Of the examples' choice; None takes lm-eval's own seeds, as published numbers do.
    """

    folder: Path | None = None
    allow_code: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    seed: int | None = None

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds by lm-eval's names for them."""
        first, others = (0, 1234) if self.seed is None else (self.seed, self.seed)
        return {"random_seed": first, "numpy_seed": others, "torch_seed": others, "fewshot_seed": others}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        wanted: What was asked for.
        found: lm-eval's own: `{tasks, groups, group_map}`.
    """

    wanted: list[SuiteTask]
    found: Any


def require_lm_eval() -> str:
    """Return lm-eval's version.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError("tasks need lm-eval; install it with: pip install 'scionlm[eval]'") from error
    return importlib.metadata.version("lm_eval")


def load_tasks(wanted: Sequence[SuiteTask], options: TaskOptions) -> LoadedTasks:
    """Return tasks with their data, downloaded where it is not in the cache.

    Args:
        wanted: Which; none stands for all of the user's folder.
        options: How.

    Raises:
        UsageError: lm-eval is not installed, a task is not known, or one runs code that is not allowed to.
        DataError: A task is broken.
        StorageError: Its data is neither in the cache nor to be had.
    """
    require_lm_eval()
    if options.folder is not None:
        import lm_eval.api.metrics  # noqa: F401 - fills the registry
        from lm_eval.api.registry import METRIC_REGISTRY

        check_task_folder(options.folder, options.allow_code, METRIC_REGISTRY)
    with _quietly(options), _seeded(options.seeds):
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=None if options.folder is None else str(options.folder), include_defaults=False)
        wanted = list(wanted) or [SuiteTask(name) for name in own.all_subtasks]
        if not all(one.task in own.task_index for one in wanted) or own.all_groups:
            own = TaskManager(include_path=own.include_path)
        wanted = [each for one in wanted for each in _expanded(one, own)]
        for one in wanted:
            _check_task(one.task, (own.task_index[one.task].cfg or {}).get("unsafe_code"), options)
        found: Any = {"tasks": {}, "groups": {}, "group_map": {}}
        for one in wanted:
            loaded = _load(own, one.task)
            for name, task in loaded["tasks"].items():
                _check_task(name, getattr(task, "UNSAFE_CODE", False), options)  # of a group
                _set_shots(task, options.num_fewshot if options.num_fewshot is not None else one.num_fewshot)
                task.set_fewshot_seed(seed=options.seeds["fewshot_seed"])
            found = {part: found[part] | (loaded.get(part) or {}) for part in found}
    return LoadedTasks(wanted, found)


def _expanded(one: SuiteTask, manager: Any) -> list[SuiteTask]:
    """Return a task or group as it is, and a tag as the tasks that bear it."""
    if one.task not in manager.task_index:
        known = manager.all_tasks
        near = difflib.get_close_matches(one.task, [*suites(), OFFLINE, *known], n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(f"unknown task {one.task!r}{hint} (there are {len(known):,}; suites are given with --suite)")
    entry = manager.task_index[one.task]
    if entry.kind.name != "TAG":
        return [one]
    return [replace(one, task=name) for name in sorted(entry.tags)]


def _check_task(name: str, unsafe: Any, options: TaskOptions) -> None:
    """Refuse a task that runs what the model writes."""
    if unsafe and not options.allow_code:
        raise UsageError(f"task {name!r} runs code that the model writes; add --allow-task-code if this machine may")


def _load(manager: Any, name: str) -> Any:
    """Return a task with its data, its failures as ours."""
    try:
        return manager.load([name])
    except ScionError:
        raise
    except Exception as error:
        raise _explained(error, f"task {name!r}", "cannot be loaded") from error


def _explained(error: Exception, what: str, how: str) -> ScionError:
    """Return a failure of lm-eval as ours, by what is behind it."""
    seen: list[BaseException] = [error]
    while (cause := seen[-1].__cause__ or seen[-1].__context__) is not None and cause not in seen:
        seen.append(cause)
    words = " ".join(str(error).split())[:200]
    kinds = {kind.__name__ for one in seen for kind in type(one).__mro__}
    if "SecurityError" in kinds:
        return UsageError(f"{what} has a template that reaches into Python ({words}); see --allow-task-code")
    if any(word in kind for kind in kinds for word in _UNREACHABLE):
        return StorageError(
            f"{what}: its data is not in the cache and cannot be downloaded ({words}); run this once with a network "
            "(HF_HUB_OFFLINE unset) and take its cache along (HF_HOME), or use --suite offline"
        )
    return DataError(f"{what} {how}: {type(error).__name__}: {words}")


def _set_shots(task: Any, number: int | None) -> None:
    """Set how many examples stand before a question; a task that sets none itself keeps to that, as in lm-eval."""
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config(key="num_fewshot", value=number)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def lm_eval_scores(
    model: PreTrainedModel,
    tokenizer_folder: Path,
    loaded: LoadedTasks,
    options: TaskOptions,
    on_progress: Callable[[float], None] = lambda share: None,
    ranks: Ranks = ALONE,
) -> TaskResults:
    """Return a model's scores on tasks.

    Args:
        model: The model.
        tokenizer_folder: A Hugging Face folder with its tokenizer.
        loaded: The tasks.
        options: How.
        on_progress: Told the share of the requests done of the kind that is being worked on.
        ranks: The processes that share the work; all have to call.

    Raises:
        DataError: A task fails on the model.
    """
    from lm_eval.evaluator import evaluate

    version, seeds = require_lm_eval(), options.seeds
    with _quietly(options) as screen, _seeded(seeds):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
        wrapped = _wrapped(model, tokenizer, options, lambda share: _on(screen, on_progress, share), ranks)
        try:
            found: Any = evaluate(
                wrapped,
                loaded.found,
                limit=options.limit,
                log_samples=True,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=options.allow_code,
            )
        except (ScionError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _explained(error, "a task", "fails") from error
    results = TaskResults(about={"lm_eval": {"version": version, "limit": options.limit} | seeds})
    for one in loaded.wanted:
        for name in _leaves(one.task, loaded.found)[1:]:  # of a group
            record = _figures(name, found, loaded.found)
            metric = one.metric if one.metric in record else None
            record |= {"metric": _headline(SuiteTask(name, metric=metric), record), "group": one.task}
            results.tasks.setdefault(name, record)
    for one in loaded.wanted:
        results.tasks[one.task] = record = _figures(one.task, found, loaded.found)
        record["metric"] = metric = _headline(one, record)
        results.items[one.task] = _items(one.task, metric, found, loaded.found)
    return results


def _on(screen: Any, on_progress: Callable[[float], None], share: float) -> None:
    with contextlib.redirect_stderr(screen):
        on_progress(share)


def _wrapped(
    model: PreTrainedModel, tokenizer: Any, options: TaskOptions, on_progress: Callable[[float], None], ranks: Ranks
) -> Any:
    """Return the model as lm-eval's, with log-likelihoods of our own."""
    from lm_eval.models import huggingface

    backend: Any = huggingface.HFLM

    class Scored(backend):
        """lm-eval's Hugging Face backend; its tokens and its texts, our scores."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            pairs = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]

            def report(done: int) -> None:
                on_progress(done / len(pairs))

            scores = score(model, pairs, self.max_length, options.batch_size, report, ranks)
            return [(-one.nll, one.greedy) for one in scores]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows, owners = [], list[int]()
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                pieces = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
                for piece in map(make_disjoint_window, pieces):
                    windows.append((None, *piece))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                sums[owner] += value
            return sums

        def _model_generate(self, *arguments: Any, **settings: Any) -> Any:
            return super()._model_generate(*arguments, **settings | ({"synced_gpus": True} if shared else {}))

    # lm-eval would try sizes on each device by itself.
    shared, kind = lies_in_parts(model), model.device.type
    size = options.batch_size or (_GENERATED["cpu"] if shared else _GENERATED.get(kind, _GENERATED["cpu"]))
    return Scored(pretrained=model, tokenizer=tokenizer, batch_size=size)


def _leaves(name: str, found: Any) -> list[str]:
    """Return a task's name, that of a group and all in it."""
    children = found["group_map"].get(name, [])
    return [name, *(leaf for child in children for leaf in _leaves(child, found))]


def _figures(name: str, found: Any, loaded: Any) -> Record:
    """Return the record of a task or a group: metrics, errors, and what they were measured on."""
    entries = {key: value for key, value in found["results"][name].items() if "," in key}
    filters = {key.split(",", 1)[1] for key in entries}
    record: Record = {}
    for key, value in entries.items():
        metric = key.split(",", 1)[0] if len(filters) == 1 else key
        record[metric] = float(value) if _is_number(value) else None
    leaves = [leaf for leaf in _leaves(name, loaded) if leaf in found["configs"]]
    config = {leaf: dict(found["configs"][leaf]) for leaf in leaves}
    for each in config.values():  # where the file lies says nothing about the task
        each["metadata"] = {k: v for k, v in (each.get("metadata") or {}).items() if k != "config_source"}
    record["num_items"] = sum(found["n-samples"][leaf]["effective"] for leaf in leaves)
    record["num_fewshot"] = max((int(config[leaf].get("num_fewshot") or 0) for leaf in leaves), default=0)
    record["version"] = found["versions"].get(name)
    record["higher_is_better"] = dict(found["higher_is_better"].get(name) or {})
    text = json.dumps(config, sort_keys=True, default=_plain)
    record["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _plain(value: Any) -> str:
    """Return something's name, which does not depend on where it lies in memory."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _headline(one: SuiteTask, record: Record) -> str:
    """Return the metric that a task is judged by: the suite's, else acc_norm where there is one, else the first."""
    known = [key for key in record if stderr_key(key) in record]
    if one.metric in record:
        return one.metric
    if one.metric is not None:
        raise DataError(f"task {one.task!r} has no metric {one.metric!r} in this lm-eval (has: {', '.join(known)})")
    return next((name for name in ("acc_norm", "acc", "exact_match") if name in known), known[0] if known else "")


def _items(name: str, metric: str, found: Any, loaded: Any) -> Record:
    """Return the scores of the single items of a task, of a group those of all in it."""
    wanted, _, kind = metric.partition(",")
    scores: list[float] = []
    digest = hashlib.sha256()
    for leaf in sorted(set(_leaves(name, loaded))):
        for sample in sorted(found["samples"].get(leaf, []), key=lambda sample: sample["doc_id"]):
            value = sample.get(wanted)
            if kind not in ("", sample["filter"]) or not _is_number(value):
                continue
            scores.append(float(value))
            hashes = (sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
            digest.update(f"{leaf} {sample['doc_id']} {' '.join(hashes)}\n".encode())
    return item_record(wanted, scores, digest.hexdigest())


@contextlib.contextmanager
def _seeded(seeds: dict[str, int]) -> Generator[None, None, None]:
    """Seed every generator that lm-eval draws from, and give them back as they were."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - lm-eval's
    with torch.random.fork_rng():
        random.seed(seeds["random_seed"])
        np.random.seed(seeds["numpy_seed"] % 2**32)  # noqa: NPY002
        torch.manual_seed(seeds["torch_seed"])
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


@contextlib.contextmanager
def _quietly(options: TaskOptions) -> Generator[Any, None, None]:
    """Keep lm-eval's notes and bars off the screen, and templates of the user's tasks in a sandbox; yield stderr."""
    import datasets
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    screen, plain = sys.stderr, lm_eval.utils.env
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    if options.folder is not None and not options.allow_code:
        sandbox = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=True)
        sandbox.filters |= {"regex_replace": plain.filters["regex_replace"]}
        lm_eval.utils.env = sandbox
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield screen
    finally:
        lm_eval.utils.env = plain
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
