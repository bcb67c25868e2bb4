"""The Python interface: what `import scionlm as scion` offers, in terms of the floors below."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scionlm.core.errors import UsageError
from scionlm.core.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scionlm.evaluation.loss import DomainLoss


def inherit(
    source: str, *, layers: int | None = None, keep: list[int] | str | None = None, strategy: str | None = None
) -> "PreTrainedModel":
    """Return a smaller transformers model made of layers of a larger one, after it has proven itself.

    Args:
        source: A model folder, hub id, `.gguf` file or built-in name.
        layers: How many layers.
        keep: Which layers, as a list or as `0-7,12`.
        strategy: How to choose `layers` of them.

    Raises:
        UsageError: The layers asked for are not there.
        DataError: The source is broken or of an unknown family.
    """
    return inherit_proven(source, layers, keep, strategy)[0]


def inherit_proven(
    source: str, layers: int | None, keep: list[int] | str | None, strategy: str | None
) -> tuple["PreTrainedModel", Any, Any, Any]:
    """Return (target, plan, proof, source folder)."""
    from scionlm.families import ModelShape, family_of
    from scionlm.sources import load_hf_model, resolve
    from scionlm.surgery.depth import parse_keep, plan_depth

    folder = resolve(source)
    family_of(folder.config)
    indices = parse_keep(keep) if isinstance(keep, str) else keep
    plan = plan_depth(ModelShape.of(folder.config).num_hidden_layers, layers, indices, strategy)

    import torch  # only once the request is sound

    from scionlm.sources.folder import stored_dtype
    from scionlm.surgery.apply import inherit_model
    from scionlm.surgery.verify import verify_inheritance

    model = load_hf_model(folder, torch.float32)
    target: Any = inherit_model(model, plan)
    proof = verify_inheritance(model, target, plan)
    return target.to(stored_dtype(folder.path)), plan, proof, folder  # exact: it came from that type


def prepare(corpora: str | Path, out: str | Path, workers: int | None = None) -> Record:
    """Make a data folder from a CORPORA.yaml, or go on with it; return its index."""
    from scionlm.data import load_corpora
    from scionlm.data import prepare as prepare_data

    path = Path(corpora)
    return prepare_data(load_corpora(path), path.parent, Path(out), workers)


def run(recipe: str, overrides: dict[str, Any] | None = None, *, out: str | Path, allow_change: bool = False) -> Record:
    """Run a recipe, preset or YAML file into a run folder, or go on with it; return its result.

    Args:
        recipe: Path of a YAML file, name of a preset or of a recipe.
        overrides: Dotted keys to values.
        out: The run folder.
        allow_change: Go on with a run although settings differ.
    """
    from scionlm.recipes.presets import load_recipe
    from scionlm.recipes.run import run_recipe
    from scionlm.report import write_report

    result = run_recipe(load_recipe(recipe, overrides or {}), Path(out), allow_change)
    write_report(Path(out))
    return result


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

    Raises:
        UsageError: A wrong argument.
        DataError: Model and data do not fit.
    """
    from scionlm.core.log import Progress
    from scionlm.data import DataFolder
    from scionlm.recipes.inputs import check_tokenizer
    from scionlm.sources import load_hf_model, resolve

    if seq_len < 2 or (max_tokens is not None and max_tokens < 1):
        raise UsageError(f"seq_len {seq_len} must be at least 2 and max_tokens {max_tokens} at least 1")
    folder = resolve(model)
    opened = DataFolder(Path(data))
    check_tokenizer(folder, opened)
    names = domains or opened.domains
    for name in names:
        opened.stream(name, "held_out", verify=True)
    if precision not in ("fp32", "bf16", "auto"):
        raise UsageError(f"precision {precision!r} must be fp32, bf16 or auto")

    from scionlm.evaluation.loss import domain_losses, model_token_nll
    from scionlm.evaluation.rolling import rolling_losses
    from scionlm.parallel.runtime import start_runtime

    runtime = start_runtime(precision)
    loaded: Any = load_hf_model(folder, runtime.compute_dtype).to(runtime.device)  # pyright: ignore[reportArgumentType]
    total = sum(min(max_tokens or 2**62, opened.num_tokens(name, "held_out")) for name in names)
    measure = rolling_losses if per_document else domain_losses
    with Progress(f"evaluating {folder.name}", total) as progress:
        return measure(model_token_nll(loaded), opened, names, seq_len, max_tokens, on_progress=progress.update)
