"""One model, measured on request: held-out losses, tasks, and what it costs to run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scionlm.core.errors import UsageError
from scionlm.core.machine import versions
from scionlm.core.records import Record
from scionlm.data import DataFolder
from scionlm.recipes.inputs import check_length, check_tokenizer
from scionlm.recipes.tasks import TaskInputs, TaskRequest, open_tasks, read_request, task_scores
from scionlm.sources import ModelFolder, load_hf_model, resolve

if TYPE_CHECKING:
    from scionlm.evaluation.loss import DomainLoss

_PRECISIONS = ("fp32", "bf16", "auto")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What of a model is measured, and how.

    Attributes:
        seq_len: Tokens predicted in one window.
        max_tokens: Budget a domain; None takes all.
        per_document: The rolling form of lm-eval instead of the packed stream.
        precision: `fp32`, `bf16` or `auto`.
        domains: Which domains; None takes all.
        losses: Whether losses are measured where there is data.
        tasks: Names of lm-eval's tasks, or of the user's own.
        suites: Names of suites.
        tasks_dir: Folder with tasks of the user's own.
        allow_task_code: Let tasks run code.
        limit: Items of each task; None takes all, of the offline suite its usual number.
        num_fewshot: Examples before each question; None is the task's or suite's own number.
        batch_size: Inputs in one pass; None finds one.
        seed: Of the examples' choice and the offline items; None takes lm-eval's own, and 0.
        speed: Whether to measure how fast it reads and writes.
        allow_pickle: Convert foreign `.bin` weights.
    """

    seq_len: int = 1024
    max_tokens: int | None = None
    per_document: bool = False
    precision: str = "fp32"
    domains: list[str] | None = None
    losses: bool = True
    tasks: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    tasks_dir: str | Path | None = None
    allow_task_code: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    speed: bool = False
    allow_pickle: bool = False


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        losses: Held-out loss by domain.
        record: What was measured and with what; `tasks`, `items`, `suites` and `inference`, as far as they were asked
            for.
    """

    losses: "dict[str, DomainLoss]"
    record: Record


def evaluate_model(model: str, data: str | Path | None, options: EvaluateOptions) -> Evaluation:
    """Measure a model; under torchrun all processes have to call, and share the work.

    Args:
        model: A model folder, hub id, `.gguf` file or built-in name.
        data: A data folder made by `prepare`; None measures no losses.
        options: What and how.

    Raises:
        UsageError: A wrong argument, or nothing to measure.
        DataError: Model and data do not fit, or a task is broken.
        StorageError: A task's data is not to be had.
    """
    request = _checked(data, options)
    folder = resolve(model, allow_pickle=options.allow_pickle)
    opened = None if data is None else _opened(Path(data), folder, options)
    from scionlm.evaluation.lm_eval_tasks import TaskOptions
    from scionlm.parallel.ranks import joined
    from scionlm.parallel.runtime import start_runtime

    how = TaskOptions(
        None if options.tasks_dir is None else Path(options.tasks_dir),
        options.allow_task_code,
        options.limit,
        options.num_fewshot,
        options.batch_size,
        options.seed,
    )
    with joined() as ranks:
        loaded = ranks.together(lambda: open_tasks(request, how))
        runtime = start_runtime(options.precision, ranks)
        opened_model: Any = load_hf_model(folder, runtime.compute_dtype)
        opened_model.to(runtime.device)
        losses = _losses(opened_model, opened, folder.name, options, ranks) if opened and options.losses else {}
        record = _identity(folder, opened, options, runtime.name) | {"tasks": {}}
        if request.offline or loaded is not None:
            names = (options.domains or opened.domains) if opened else []
            places = {name: (opened, name) for name in names} if opened else {}
            inputs = TaskInputs(request, how, places, folder.path, options.seed or 0)
            found = task_scores(opened_model, inputs, loaded, f"evaluating {folder.name}", ranks)
            record |= {"tasks": found.tasks, "items": found.items} | found.about
        if options.speed:
            from scionlm.evaluation.inference import inference_speed

            record["inference"] = inference_speed(opened_model, device_name=runtime.name)
    return Evaluation(losses, record)


def _identity(folder: ModelFolder, data: DataFolder | None, options: EvaluateOptions, device: str) -> Record:
    """Return what was measured, with what and how: with it, figures can be told from others of the same name."""
    how = {name: getattr(options, name) for name in ("max_tokens", "limit", "num_fewshot", "batch_size", "seed")}
    return {
        "revision": folder.revision,
        "sha256": folder.weights_fingerprint(),
        "config_sha256": folder.config_fingerprint(),
        "data": None if data is None else data.fingerprint,
        "versions": versions("lm_eval"),
        "device": device,
        "settings": {name: value for name, value in how.items() if value is not None},
    }


def _checked(data: str | Path | None, options: EvaluateOptions) -> TaskRequest:
    """Return which tasks are asked for, after a look at everything that can be wrong without opening anything."""
    if options.seq_len < 2 or (options.max_tokens is not None and options.max_tokens < 1):
        raise UsageError(f"seq_len {options.seq_len} must be at least 2 and max_tokens {options.max_tokens} at least 1")
    if options.precision not in _PRECISIONS:
        raise UsageError(f"precision {options.precision!r} must be fp32, bf16 or auto")
    for name in ("limit", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"num_fewshot {options.num_fewshot} must not be negative")
    request = read_request(options.tasks, options.suites)
    if request.offline and data is None:
        raise UsageError("suite offline asks about the held-out part of a data folder; give --data")
    if data is None and not (request.tasks or options.tasks_dir or options.speed):
        raise UsageError("nothing to measure: give --data, --tasks, --suite, --tasks-dir or --speed")
    if options.allow_task_code and not (request.tasks or options.tasks_dir):
        raise UsageError("--allow-task-code is for tasks; give --tasks or --tasks-dir")
    return request


def _opened(path: Path, folder: ModelFolder, options: EvaluateOptions) -> DataFolder:
    opened = DataFolder(path)
    check_tokenizer(folder, opened)
    if options.losses:
        check_length(options.seq_len, folder, "--seq-len")
    for name in options.domains or opened.domains:
        opened.stream(name, "held_out", verify=True)
    return opened


def _losses(model: Any, data: DataFolder, title: str, options: EvaluateOptions, ranks: Any) -> "dict[str, DomainLoss]":
    from scionlm.core.log import Progress
    from scionlm.evaluation.loss import domain_losses, model_token_nll
    from scionlm.evaluation.rolling import rolling_losses

    names = options.domains or data.domains
    total = sum(min(options.max_tokens or 2**62, data.num_tokens(name, "held_out")) for name in names)
    with Progress(f"evaluating {title}", total) as progress:
        given = (data, names, options.seq_len, options.max_tokens, progress.update, ranks)
        if options.per_document:
            return rolling_losses(model, *given)
        return domain_losses(model_token_nll(model), *given)
