"""`scion analyze`: what is measured on a model, in which order, and what is written down of it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scionlm.core.errors import DataError, StoppedError
from scionlm.core.log import Progress, say
from scionlm.core.records import Record
from scionlm.core.signals import StopRequest
from scionlm.families import ModelShape, count_parameters
from scionlm.recipes.analysis_against import beside, is_analysis, read_other
from scionlm.recipes.analysis_options import AnalyzeOptions
from scionlm.recipes.analysis_store import Arrays, Store, flatten
from scionlm.sources import ModelFolder, resolve
from scionlm.surgery.lineage import origins

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from scionlm.analysis.walk import Walk
    from scionlm.parallel.runtime import Runtime
    from scionlm.recipes.sample import Sample

# A model of more than this share of the memory, the GPU's where there is one, is read from the disk layer by layer.
_STREAM_FROM = 0.6


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        record: What `analysis.json` holds; `record["layers"]` is the table, a mapping for each layer.
        arrays: The raw numbers by part: `forward`, `gradients`, `removal`, `lens`, `greedy`.
    """

    record: Record
    arrays: dict[str, Arrays]


def analyze_tokens(
    model: "str | PreTrainedModel", tokens: "torch.Tensor | NDArray[Any]", options: AnalyzeOptions, allow_pickle: bool
) -> Analysis:
    """Return the analysis of a model on token ids; nothing is written.

    Args:
        model: A model in memory, on any device, which is left as it was; or a MODEL.
        tokens: `[sequences, length]`, without padding.
        options: What is measured; the sizes of the sample are those of `tokens`.
        allow_pickle: Convert foreign `.bin` weights.

    Raises:
        UsageError: A number is out of range.
        DataError: The tokens cannot be used, or the model is broken.
    """
    from scionlm.analysis.walk import Walk, check_tokens
    from scionlm.parallel.runtime import start_runtime
    from scionlm.recipes.analysis_record import analysis_record

    folder = resolve(model, allow_pickle=allow_pickle) if isinstance(model, str) else None
    config: dict[str, Any] = model.config.to_dict() if folder is None else folder.config  # pyright: ignore[reportAttributeAccessIssue]
    ids = _token_ids(tokens)
    check_tokens(
        ids, ModelShape.of(config, "config.json" if folder is None else folder.path / "config.json").vocab_size
    )
    options = options.model_copy(update={"num_sequences": len(ids), "seq_len": ids.shape[1]})
    options.check(config)
    store = Store(None, {})
    if folder is None:
        name = getattr(model.config, "name_or_path", "") or config["model_type"]  # pyright: ignore[reportAttributeAccessIssue]
        with _evaluating(model):  # pyright: ignore[reportArgumentType]
            arrays = _measure(lambda: nullcontext(Walk(model)), ids, options, store)  # pyright: ignore[reportArgumentType]
    else:
        name, runtime = folder.name, start_runtime(options.precision)
        arrays = _measure(partial(_open_walk, folder, runtime, options.stream), ids, options, store)
    return Analysis(analysis_record(config, {"name": name}, arrays, options, ["text"] * len(ids)), arrays)


def _token_ids(tokens: Any) -> "torch.Tensor":
    """Return tokens, in whatever form of integers, as int64.

    Raises:
        DataError: They are no rectangle of integers.
    """
    import torch

    try:
        found = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    except (TypeError, ValueError) as error:
        raise DataError(f"tokens are no token ids [sequences, length]: {error}") from error
    if found.dtype.kind not in "iu":
        raise DataError(f"tokens are {found.dtype} {list(found.shape)}, not token ids [sequences, length]")
    return torch.from_numpy(found.astype(np.int64))


@contextmanager
def _evaluating(model: "PreTrainedModel") -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def analyze_folder(
    name: str,
    data: str,
    out: Path | None,
    options: AnalyzeOptions,
    against: str | None = None,
    allow_pickle: bool = False,
) -> Analysis:
    """Analyse a model on prepared data into the folder `out`, or go on with it.

    Args:
        name: A MODEL.
        data: Data folder made by `scion prepare`.
        out: Folder for the analysis; None keeps it in memory.
        options: What is measured.
        against: Another MODEL, which is analysed the same way, or a folder with its analysis.
        allow_pickle: Convert foreign `.bin` weights.

    Raises:
        UsageError: A number is out of range, `out` holds something else, or `against` was made otherwise.
        DataError: Model and data do not fit, a domain is too short, or the model is broken.
        StoppedError: A signal came; the parts that are done are kept.
    """
    request = _open_request(name, data, options, allow_pickle)
    # Whatever is wrong is said before anything is measured, of the other model too.
    other, other_out = None, None if out is None else out / "against"
    if against is not None and is_analysis(against):
        other = read_other(against, request.settings)
    elif against is not None:
        rest = options.model_copy(update={"greedy": 0, "layers": None})
        other = _open_request(against, data, rest, allow_pickle)
        Store(other_out, other.settings)
    store = Store(out, request.settings)
    with store.held():
        found = _carry_out(request, store)
        if isinstance(other, _Request):
            theirs = _carry_out(other, Store(other_out, other.settings))
            other = beside(theirs.record)
            _write(theirs, other_out)
        found.record["against"] = other
        _write(found, out)
    return found


def _write(analysis: Analysis, out: Path | None) -> None:
    if out is not None:
        from scionlm.recipes.analysis_record import write_analysis

        write_analysis(analysis.record, analysis.arrays["forward"], out)


@dataclass(frozen=True)
class _Request:
    """What is to be analysed, opened and checked.

    Attributes:
        folder: The model.
        model: What is written down of it.
        data: What is written down of the text.
        sample: The text.
        options: What is measured.
    """

    folder: ModelFolder
    model: Record
    data: Record
    sample: "Sample"
    options: AnalyzeOptions

    @property
    def settings(self) -> Record:
        """What decides the numbers."""
        domains = list(dict.fromkeys(self.sample.domains))
        text = {"data": self.data["fingerprint"], "domains": domains}
        model = {"model": self.model["weights_sha256"], "config": self.model["config_sha256"]}
        return {**model, **text, **self.options.decisive()}


def _open_request(name: str, data: str, options: AnalyzeOptions, allow_pickle: bool) -> _Request:
    from scionlm.data import DataFolder
    from scionlm.recipes.inputs import check_tokenizer
    from scionlm.recipes.sample import draw_sample

    folder = resolve(name, allow_pickle=allow_pickle, weights=False)
    ModelShape.of(folder.config, folder.path / "config.json")
    options.check(folder.config)
    opened = DataFolder(Path(data))
    check_tokenizer(folder, opened)
    sample = draw_sample(opened, options.split, options.domains, options.num_sequences, options.seq_len, options.seed)
    folder.fetch()
    model = {
        "name": folder.name,
        "revision": folder.revision,
        "license": folder.license,
        "weights_sha256": folder.weights_fingerprint(),
        "config_sha256": folder.config_fingerprint(),
        "origins": origins(folder),
    }
    text = {"path": str(opened.path), "fingerprint": opened.fingerprint, "split": options.split}
    return _Request(folder, model, text, sample, options)


def _carry_out(request: _Request, store: Store) -> Analysis:
    import torch

    from scionlm.parallel.runtime import start_runtime
    from scionlm.recipes.analysis_record import analysis_record

    folder, options, sample = request.folder, request.options, request.sample
    say(f"{folder.name}: {len(sample.ids)} x {options.seq_len} tokens from {request.data['path']}")
    runtime = start_runtime(options.precision)
    arrays = _measure(
        partial(_open_walk, folder, runtime, options.stream), torch.from_numpy(sample.ids), options, store
    )
    record = analysis_record(folder.config, request.model, arrays, options, sample.domains)
    record |= {"data": request.data, "device": runtime.to_dict(), "seconds": store.seconds, "against": None}
    return Analysis(record, arrays)


@contextmanager
def _open_walk(folder: ModelFolder, runtime: "Runtime", stream: bool | None) -> "Iterator[Walk]":
    from scionlm.analysis.walk import Walk, streamed
    from scionlm.families.weights import FolderWeights
    from scionlm.sources import load_hf_model
    from scionlm.sources.tensors import FolderTensors

    config, dtype = folder.config, runtime.compute_dtype
    size = count_parameters(config)["total"] * dtype.itemsize
    memory = runtime.memory()
    if stream is None:
        stream = memory is not None and size > _STREAM_FROM * memory
    if not stream:
        model: Any = load_hf_model(folder, dtype)
        yield Walk(model.to(runtime.device))
        return
    say(f"{folder.name}: its weights are read layer by layer")
    with FolderTensors(folder.path) as tensors:
        yield streamed(config, FolderWeights(config, tensors, folder.path), dtype, runtime.device)


def _measure(
    open_walk: "Callable[[], AbstractContextManager[Walk]]", ids: "torch.Tensor", options: AnalyzeOptions, store: Store
) -> dict[str, Arrays]:
    """Return the arrays of every part; the model is loaded only where one is missing."""
    opened: list[Walk] = []
    found: dict[str, Arrays] = {}
    with StopRequest() as stop, ExitStack() as stack:

        def check() -> None:
            if stop.requested:
                raise StoppedError("stopped; the parts that were done are kept, and the same command goes on")

        for part in _parts(ids, options):

            def measure(part: _Part = part) -> Arrays:
                if not opened:
                    opened.append(stack.enter_context(open_walk()))
                with opened[0] as walk, Progress(part.title, part.steps or part.passes * walk.num_layers) as progress:

                    def on_progress(done: float) -> None:
                        progress.update(done)
                        check()

                    return flatten(part.run(walk, on_progress))

            check()
            found[part.name.partition("-")[0]] = store.get(part.name, measure)
    return found


@dataclass(frozen=True)
class _Part:
    """Something that is measured in one go: `run` tells its progress, in layers over `passes`, or else in `steps`."""

    name: str
    title: str
    run: "Callable[[Walk, Callable[[float], None]], Any]"
    passes: int = 1
    steps: int | None = None


def _parts(ids: "torch.Tensor", options: AnalyzeOptions) -> list[_Part]:
    from scionlm.analysis.forward import forward_pass
    from scionlm.analysis.gradients import gradient_pass
    from scionlm.analysis.removal import greedy_removal, lens_losses, removal_losses
    from scionlm.recipes.analysis_record import collapse_settings

    few, settings = ids[: options.num_loss_sequences], collapse_settings(options)
    parts = [
        _Part("forward", "attention and layers", lambda w, tell: forward_pass(w, ids, settings, options.seed, tell)),
        _Part("gradients", "gradients", lambda w, tell: gradient_pass(w, few, tell), passes=2),
        _Part("removal", "loss without each layer", lambda w, tell: removal_losses(w, few, (), tell)),
        _Part("lens", "loss after each layer", lambda w, tell: lens_losses(w, few, tell)),
    ]
    if options.greedy:
        steps = options.greedy
        title = f"greedy removal of {steps} layers"
        parts.append(_Part(f"greedy-{steps}", title, lambda w, tell: greedy_removal(w, few, steps, tell), steps=steps))
    return parts
