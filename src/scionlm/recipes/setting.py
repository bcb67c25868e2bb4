"""What every recipe starts from: source and data opened, checked against each other and against the recipe."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import Progress
from scionlm.core.signals import StopRequest
from scionlm.data import DataFolder, SamplePlan
from scionlm.evaluation import TokenNll, domain_losses, write_samples
from scionlm.families import ModelShape, family_of, flops_per_token
from scionlm.parallel import Runtime, resolve_compile, start_runtime
from scionlm.recipes.config import Recipe
from scionlm.recipes.demo_data import prepare_demo_data
from scionlm.recipes.run import write_config, write_manifest
from scionlm.sources import ModelFolder, load_tokenizer, resolve
from scionlm.surgery import DepthPlan, parse_keep, plan_depth


@dataclass(frozen=True)
class Setting:
    """What child and control share: the run's inputs, opened and checked."""

    recipe: Recipe
    source: ModelFolder
    data: DataFolder
    domains: list[str]
    plan: DepthPlan
    runtime: Runtime
    stop: StopRequest
    command_folder: Path


def open_inputs(recipe: Recipe, out: Path, stop: StopRequest) -> Setting:
    """Open source and data, check that they fit the recipe and each other, and write config and manifest.

    Raises:
        UsageError: The layers or domains asked for are not there.
        DataError: Source and data were made with different tokenizers.
    """
    source = resolve(recipe.source)
    family = family_of(source.config)
    num_layers = ModelShape.of(source.config).num_hidden_layers
    inherit = recipe.inherit
    keep = parse_keep(inherit.keep) if isinstance(inherit.keep, str) else inherit.keep
    plan = plan_depth(num_layers, inherit.layers, keep, inherit.strategy)
    if recipe.data.dir is None:
        prepare_demo_data(source.name, out / "data")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(out / "data")})})
    assert recipe.data.dir is not None
    data = DataFolder(Path(recipe.data.dir))
    domains = check_domains(recipe, data)
    check_tokenizer(source, data)
    runtime = start_runtime(recipe.train.precision)
    flops = (
        recipe.total_steps
        * recipe.train.global_batch_tokens
        * flops_per_token(family, source.config | {"num_hidden_layers": len(plan.keep)}, recipe.data.seq_len)
    )
    train = {"precision": runtime.precision, "compile": resolve_compile(recipe.train.compile, runtime, flops)}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    SamplePlan({d: data.stream(d, "train") for d in domains}, dict.fromkeys(domains, 1.0), recipe.data.seq_len, 0)
    write_config(recipe, out)
    facts = {
        "source": {"name": source.name, "revision": source.revision, "sha256": source.weights_fingerprint()}
        | source.facts,
        "data": {"dir": recipe.data.dir, "fingerprint": data.fingerprint, "tokenizer": data.tokenizer.sha256},
        "device": runtime.to_dict(),
    }
    write_manifest(out, recipe, **facts)
    stop.check()
    return Setting(recipe, source, data, domains, plan, runtime, stop, out)


def check_domains(recipe: Recipe, data: DataFolder) -> list[str]:
    """Return the domains of the mixture (all of the data's where there is none)."""
    if recipe.data.mixture is None:
        return data.domains
    for name in recipe.data.mixture:
        if name not in data.domains:
            raise UsageError(
                f"data.mixture: domain {name!r} is not in {data.path}{nearest(name, data.domains)} "
                f"(has: {', '.join(data.domains)})"
            )
    return list(recipe.data.mixture)


def check_tokenizer(source: ModelFolder, data: DataFolder) -> None:
    """Check that the data's ids mean to the source what they meant to the tokenizer that made them."""
    mine, theirs = load_tokenizer(source.path).get_vocab(), load_tokenizer(data.tokenizer_folder).get_vocab()
    if mine != theirs:
        raise DataError(
            f"the data in {data.path} was made with the tokenizer of {data.tokenizer.name!r}, which is not that of "
            f"{source.name!r}; prepare it again with tokenizer: {source.name}"
        )
    if data.tokenizer.vocab_size > int(source.config["vocab_size"]):
        raise DataError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the source only {source.config['vocab_size']}"
        )


def losses_of(setting: Setting, token_nll: TokenNll, title: str) -> dict[str, dict[str, Any]]:
    """Return the held-out losses of each domain within the recipe's budget."""
    budget = setting.recipe.evaluate.tokens_per_domain
    total = sum(min(budget, setting.data.num_tokens(d, "held_out")) for d in setting.domains)
    with Progress(title, total) as progress:

        def report(tokens: int) -> None:
            progress.update(tokens)
            setting.stop.check()

        losses = domain_losses(
            token_nll, setting.data, setting.domains, setting.recipe.data.seq_len, budget, on_progress=report
        )
    return {name: loss.to_dict() for name, loss in losses.items()}


def samples_of(setting: Setting, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return what a model writes after the start of a held-out document of each domain."""
    tokenizer = load_tokenizer(setting.data.tokenizer_folder)
    return write_samples(model, tokenizer, setting.data, setting.domains, setting.recipe.seed)


def release(model: PreTrainedModel) -> None:
    """Give a model's memory back now: the next one needs it."""
    cast("Any", model).to("meta")
    gc.collect()
