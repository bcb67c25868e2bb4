"""A run's inputs together with the machine it runs on, and what recipes measure with them."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from scionlm.core.log import Progress
from scionlm.core.signals import StopRequest
from scionlm.evaluation.generate import write_samples
from scionlm.evaluation.loss import TokenNll, domain_losses
from scionlm.families import family_of, flops_per_token
from scionlm.parallel.runtime import Runtime, resolve_compile, start_runtime
from scionlm.recipes.inputs import Inputs
from scionlm.recipes.run import write_config, write_manifest
from scionlm.sources import load_tokenizer
from scionlm.surgery.target import target_config


@dataclass(frozen=True)
class Setting(Inputs):
    """Inputs that are ready to run.

    Attributes:
        runtime: The device.
        stop: Asked between pieces of work.
        folder: The run folder.
    """

    runtime: Runtime
    stop: StopRequest
    folder: Path


def settle(inputs: Inputs, out: Path, stop: StopRequest) -> Setting:
    """Choose the device, resolve what the recipe leaves to `auto`, and write config and manifest into `out`."""
    recipe, source = inputs.recipe, inputs.source
    runtime = start_runtime(recipe.train.precision)
    target = target_config([source.config], inputs.plan)
    tokens = recipe.total_steps * recipe.train.global_batch_tokens
    flops = tokens * flops_per_token(family_of(target), target, recipe.data.seq_len)
    train = {"precision": runtime.precision, "compile": resolve_compile(recipe.train.compile, runtime, flops)}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    origin = {"name": source.name, "revision": source.revision, "sha256": source.weights_fingerprint()}
    data = inputs.data
    facts = {
        "source": origin | source.facts,
        "data": {"dir": recipe.data.dir, "fingerprint": data.fingerprint, "tokenizer": data.tokenizer.sha256},
        "replay": inputs.sampling.replay,
        "device": runtime.to_dict(),
    }
    write_manifest(out, recipe, facts)
    write_config(recipe, out)
    stop.check()
    return Setting(recipe, source, data, inputs.sampling, inputs.plan, runtime, stop, out)


def losses_of(
    setting: Setting, token_nll: TokenNll, title: str, budget: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return the held-out losses of each domain within a budget of tokens, the recipe's where none is given."""
    budget = budget or setting.recipe.evaluate.tokens_per_domain
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
