"""The Python interface: what `import scionlm as scion` offers, in terms of the floors below."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from scionlm.core.errors import ScionError, UsageError
from scionlm.core.records import Record

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from scionlm.evaluation.loss import DomainLoss
    from scionlm.recipes.analyze import Analysis
    from scionlm.recipes.config_sweep import Sweep
    from scionlm.recipes.evaluate import EvaluateOptions, Evaluation
    from scionlm.surgery.request import InheritOptions


def inherit(source: str, **options: "Unpack[InheritOptions]") -> "PreTrainedModel":
    """Return a smaller transformers model made of parts of a larger one, after it has proven itself.

    Args:
        source: A model folder, hub id, `.gguf` file or built-in name, or a YAML file with mergekit's slices.
        options: What to keep; see `scionlm.surgery.request.InheritOptions`. `layers=15` keeps the first fifteen.

    Raises:
        UsageError: What is asked for is not there, or contradicts itself.
        DataError: The source is broken or of an unknown family.
    """
    from scionlm.recipes.inherit import inherit_model

    return inherit_model(source, options)[0]


def prepare(corpora: str | Path, out: str | Path, workers: int | None = None) -> Record:
    """Make a data folder from a CORPORA.yaml, or go on with it, and write its page; return its index."""
    from scionlm.data import load_corpora
    from scionlm.data import prepare as prepare_data
    from scionlm.data.preparing.prepare import warn_of_split
    from scionlm.parallel.ranks import tells_the_user
    from scionlm.report.data_page import write_data_page

    path = Path(corpora)
    asked = load_corpora(path)
    index = prepare_data(asked, path.parent, Path(out), workers)
    if tells_the_user():
        warn_of_split(asked, index)
    if (Path(out) / "statistics.json").exists():  # folders of earlier versions have none
        write_data_page(Path(out))
    return index


def train_tokenizer(
    corpora: str | Path,
    out: str | Path,
    vocab_size: int,
    special: tuple[str, ...] = (),
    max_bytes: int = 10**8,
) -> int:
    """Train a byte-level BPE tokenizer on the domains of a CORPORA.yaml; return its size.

    Args:
        corpora: The CORPORA.yaml; it needs no tokenizer.
        out: Folder for the tokenizer.
        vocab_size: Tokens, bytes and special tokens included.
        special: Special tokens beside the end of text.
        max_bytes: Text taken from each domain at most.

    Raises:
        UsageError: The size leaves no room beyond the bytes.
        DataError: The files hold no text, or a document cannot be used.
    """
    from scionlm.data import load_corpora
    from scionlm.data.preparing.train_tokenizer import train_tokenizer as train

    path = Path(corpora)
    return train(load_corpora(path), path.parent, Path(out), vocab_size, special, max_bytes)


def run(
    recipe: str,
    overrides: dict[str, Any] | list[str] | None = None,
    *,
    out: str | Path,
    allow_change: bool = False,
) -> Record:
    """Run a recipe, preset or YAML file into a run folder, or go on with it; return its result.

    Args:
        recipe: Path of a YAML file, name of a preset or of a recipe.
        overrides: Dotted keys to values.
        out: The run folder.
        allow_change: Go on with a run although settings differ.

    Returns:
        What result.json holds; of a sweep `runs`, how each ended, and what its compare.json holds.
    """
    from scionlm.parallel.ranks import leave_to_main, tells_the_user
    from scionlm.recipes.config_sweep import Sweep, load_request
    from scionlm.recipes.rounding import warn_of_rounding
    from scionlm.recipes.run import run_recipe
    from scionlm.report import write_report

    try:
        loaded = load_request(recipe, overrides or {})
    except ScionError as error:
        leave_to_main(error)
        raise
    if tells_the_user():
        warn_of_rounding([run.recipe for run in loaded.chosen] if isinstance(loaded, Sweep) else [loaded])
    if isinstance(loaded, Sweep):
        return _run_sweep(loaded, Path(out), allow_change)
    result = run_recipe(loaded, Path(out), allow_change)
    if tells_the_user():
        write_report(Path(out))
    return result


def _run_sweep(sweep: "Sweep", out: Path, allow_change: bool) -> Record:
    """Make a sweep's runs, drawing each and the comparison of all so far."""
    from scionlm.parallel.ranks import tells_the_user
    from scionlm.recipes.sweep import run_sweep
    from scionlm.report import write_comparison, write_report

    def draw(run: Path) -> None:
        write_report(run)
        write_comparison([out], out)

    result = run_sweep(sweep, out, allow_change, draw)
    if not tells_the_user():
        return result
    for folder in (Path(run["folder"]) for run in result["runs"]):
        if (folder / "config.yaml").exists() and not (folder / "report.html").exists():  # killed before it was drawn
            write_report(folder)
    return result | write_comparison([out], out)


def compare(
    items: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    max_tokens: int | None = None,
    seq_len: int | None = None,
    scores: "EvaluateOptions | None" = None,
) -> Record:
    """Set runs, sweeps and models side by side: `compare.html`, `.json` and `.md` in `out`; return what the JSON holds.

    Args:
        items: Run folders, finished or not; sweep folders, which stand for all their runs; models.
        out: Folder for the comparison; what was measured of models is kept there.
        data: Data folder that models are measured on, in the way of `evaluate`.
        max_tokens: Budget a domain for models; None takes that of the runs.
        seq_len: Tokens predicted in one window for models; None takes that of the runs, else 1024.
        scores: Tasks, suites and speed that results of runs and models are measured on beside; kept there too.

    Raises:
        UsageError: One of them is neither; a model comes without data; `out` is a file, or holds something else.
        DataError: A file is broken, or model and data do not fit.
    """
    from scionlm.report import comparable_setup, is_run, scored_models, write_comparison

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} exists and is not a folder; choose another path")
    ours = {"models", "compare.html", "compare.md"}  # a kill may have kept the document from being written
    if out.exists() and not (out / "compare.json").exists() and {path.name for path in out.iterdir()} - ours:
        raise UsageError(f"output {out} holds something else than a comparison; choose another path")
    runs = [Path(item) for item in items if is_run(Path(item))]
    models = [str(item) for item in items if not is_run(Path(item))]
    if models and data is None:
        raise UsageError(f"{models[0]} is no run folder; to compare a model give --data, which it is measured on")
    found: list[Record] = []
    if models:
        from scionlm.recipes.compared_model import measured_model

        usual = comparable_setup(runs)
        budget = max((count for _, count in usual.num_tokens or ()), default=None)
        for model in dict.fromkeys(models):
            how = {"seq_len": seq_len or usual.seq_len or 1024, "max_tokens": max_tokens or budget}
            measured = measured_model(model, Path(str(data)), out, evaluate, **how, domains=sorted(usual.domains))
            found.append(measured)
    if scores is None:
        return write_comparison(runs, out, found)
    from scionlm.recipes.compared_scores import measured_scores

    given = list(zip(dict.fromkeys(models), found, strict=True))
    return write_comparison(runs, out, found, measured_scores(scored_models(runs, given), data, out, scores))


def demo(out: str | Path = "runs/demo", overrides: dict[str, Any] | None = None) -> Record:
    """Run the demo and write its report; return its result."""
    from scionlm.recipes.demo import demo as run_demo
    from scionlm.report import write_report

    result = run_demo(Path(out), overrides)
    write_report(Path(out))
    return result


def evaluate(
    model: str,
    data: str | Path,
    *,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    per_document: bool = False,
    precision: str = "fp32",
    domains: list[str] | None = None,
    allow_pickle: bool = False,
) -> dict[str, "DomainLoss"]:
    """Return the held-out loss of a model on each domain of a data folder.

    Args:
        model: A model folder, hub id, `.gguf` file or built-in name.
        data: A data folder made by `prepare`.
        seq_len: Tokens predicted in one window.
        max_tokens: Budget a domain, from the start of its held-out stream; None takes all.
        per_document: The rolling form of lm-eval instead of the packed stream.
        precision: `fp32` or `bf16`.
        domains: Which domains; None takes all.
        allow_pickle: Convert foreign `.bin` weights.

    Raises:
        UsageError: A wrong argument.
        DataError: Model and data do not fit.
    """
    from scionlm.recipes.evaluate import EvaluateOptions
    from scionlm.recipes.evaluate import evaluate_model as measure

    options = EvaluateOptions(
        seq_len=seq_len, max_tokens=max_tokens, per_document=per_document, precision=precision, domains=domains,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    return measure(model, data, options).losses


def evaluate_model(model: str, data: str | Path | None = None, **options: Any) -> "Evaluation":
    """Return losses of a model, its scores on tasks, and how fast it is, as far as they are asked for.

    Args:
        model: A model folder, hub id, `.gguf` file or built-in name.
        data: A data folder made by `prepare`; losses and the suite `offline` need it.
        options: What and how: fields of `scionlm.recipes.evaluate.EvaluateOptions`, as `suites=["offline"]`.

    Raises:
        UsageError: A wrong argument, an unknown task or suite, or nothing to measure.
        DataError: Model and data do not fit, or a task is broken.
        StorageError: A task's data is neither in the cache nor to be had.
    """
    from scionlm.recipes.evaluate import EvaluateOptions
    from scionlm.recipes.evaluate import evaluate_model as measure

    try:
        chosen = EvaluateOptions(**options)
    except TypeError as error:
        raise UsageError(f"evaluate_model: {error}") from error
    return measure(model, data, chosen)


def analyze(
    model: "str | Path | PreTrainedModel",
    tokens: "torch.Tensor | NDArray[Any] | None" = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    against: str | None = None,
    plots: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> "Analysis":
    """Return what attention and layers of a model look like, and what each layer is worth.

    Args:
        model: A transformers model, or a model folder, hub id, `.gguf` file or built-in name.
        tokens: Token ids `[sequences, length]`, without padding; or else
        data: a data folder made by `prepare`, from which sequences are drawn.
        out: Folder for the analysis, with `data`; there it can be stopped and goes on. None keeps it in memory.
        against: With `data`: another MODEL, or a folder with its analysis, to set beside.
        plots: With `out`: also write figures, SVG and PNG, into `out/figures`; they need the extra `plots`.
        allow_pickle: Convert foreign `.bin` weights.
        options: How; see `scionlm.recipes.analysis_options.AnalyzeOptions`.

    Returns:
        `record` (what `analysis.json` holds; `record["layers"]` is the table) and `arrays`, the raw numbers.

    Raises:
        UsageError: A wrong argument.
        DataError: Model and data do not fit, a domain is too short, or the model is broken.
    """
    from scionlm.recipes.analysis_options import options_of
    from scionlm.recipes.analyze import analyze_folder, analyze_tokens

    chosen = options_of(options)
    model = str(model) if isinstance(model, Path) else model
    if (tokens is None) == (data is None):
        raise UsageError("give either tokens, or data, the folder that they are drawn from")
    if tokens is not None:
        if out is not None or against is not None:
            raise UsageError("out and against are for data folders; what is measured on tokens stays in memory")
        return analyze_tokens(model, tokens, chosen, allow_pickle)
    if not isinstance(model, str):
        raise UsageError("a model in memory is analysed on tokens; name a model to have them drawn from data")
    from scionlm.report.analysis_figures import require_matplotlib, write_figures
    from scionlm.report.analysis_page import write_analysis_page

    if plots:
        require_matplotlib()
    found = analyze_folder(model, str(data), None if out is None else Path(out), chosen, against, allow_pickle)
    if out is not None:
        write_analysis_page(Path(out))
        if plots:
            write_figures(Path(out))
    return found


def plan(
    recipe: str,
    overrides: dict[str, Any] | list[str] | None = None,
    *,
    device: str | None = None,
    devices: int = 1,
    per_node: int | None = None,
    calibrate: bool = False,
    find_lr: bool = False,
    price: float | None = None,
) -> Record:
    """Return what a recipe will take: parameters, operations, memory, time; of a sweep also each run's, under `runs`.

    Args:
        recipe: Path of a YAML file, name of a preset or of a recipe.
        overrides: Dotted keys to values.
        device: Name of one in the table; None takes this machine's.
        devices: How many of them.
        per_node: How many in one machine; None puts all into one, up to eight.
        calibrate: Measure a few steps here instead of looking the speed up.
        find_lr: Train for a few dozen steps here, at a rate that rises, and suggest a peak: `lr_range_test`, which
            `scionlm.recipes.range_test.range_test` describes. The model is thrown away.
        price: Of a device's hour, in any currency.

    Raises:
        UsageError: The recipe does not validate, or the device is not known; there is nothing to try rates on.
        DataError: The source is broken or of an unknown family.
    """
    from scionlm.recipes.bill import with_price
    from scionlm.recipes.config_sweep import Sweep, load_request
    from scionlm.recipes.planning import plan_recipe
    from scionlm.recipes.rounding import warn_of_rounding

    loaded = load_request(recipe, overrides or {})
    warn_of_rounding([run.recipe for run in loaded.chosen] if isinstance(loaded, Sweep) else [loaded])
    measured = "--find-lr" if find_lr else "--calibrate" if calibrate else None
    if isinstance(loaded, Sweep):
        if measured:
            raise UsageError(f"{measured} measures one recipe, not a sweep; leave it out, or name a recipe")
        from scionlm.recipes.sweep_plan import plan_sweep

        return with_price(plan_sweep(loaded, device, devices, per_node), price)
    if measured and (device is not None or devices > 1):
        raise UsageError(f"{measured} measures one device of this machine; leave --device and --devices out")
    found: Record = {}
    if find_lr:
        from scionlm.recipes.range_test import range_test

        found["lr_range_test"] = range_test(loaded)
    if not calibrate:
        return with_price(plan_recipe(loaded, device, devices, per_node), price) | found
    from scionlm.recipes.calibrate import calibrated

    return with_price(calibrated(loaded), price) | found


def export(run: str | Path, out: str | Path, *, step: int | None = None, last: int = 1, averaged: bool = False) -> Path:
    """Write a checkpoint of a run as a plain Hugging Face model folder; return the folder.

    Args:
        run: Run folder, or the folder of a checkpoint.
        out: Where the model goes; absent or empty.
        step: Of the checkpoint; None takes the newest.
        last: Average the weights of so many checkpoints, that one the last.
        averaged: Take the run's own average of the weights instead.

    Raises:
        UsageError: There is no such checkpoint, or no average in it.
        DataError: The checkpoint is damaged.
    """
    from scionlm.recipes.export import export_checkpoint

    return export_checkpoint(Path(run), Path(out), step, last, averaged)
