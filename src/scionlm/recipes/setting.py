"""A run's inputs together with the machine it runs on, and what recipes measure with them."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from scionlm.core.devices import this_machine
from scionlm.core.log import Progress
from scionlm.core.records import write_json
from scionlm.core.signals import StopRequest
from scionlm.evaluation.generate import write_samples
from scionlm.evaluation.loss import TokenNll, domain_losses
from scionlm.parallel.runtime import Runtime, resolve_compile, start_runtime
from scionlm.recipes.inputs import Inputs
from scionlm.recipes.planning import plan_model, run_flops, teaching_of
from scionlm.recipes.run import write_config, write_manifest
from scionlm.sources import ModelFolder, load_tokenizer
from scionlm.surgery.target import target_config


@dataclass(frozen=True, kw_only=True)
class Setting(Inputs):
    """Inputs that are ready to run.

    Attributes:
        runtime: The device.
        stop: Asked between pieces of work.
        folder: The run folder.
        allow_change: Go on with a checkpoint although what it was made with has changed.
    """

    runtime: Runtime
    stop: StopRequest
    folder: Path
    allow_change: bool = False


def settle(inputs: Inputs, out: Path, stop: StopRequest, allow_change: bool = False) -> Setting:
    """Choose the device, resolve what the recipe leaves to `auto`, and write config and manifest into `out`."""
    recipe, source = inputs.recipe, inputs.source
    runtime = start_runtime(recipe.train.precision)
    target = target_config([source.config], inputs.plan)
    teacher = inputs.teacher and inputs.teacher.config
    flops = run_flops(recipe, target, teacher)
    train = {"precision": runtime.precision, "compile": resolve_compile(recipe.train.compile, runtime, flops)}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    origin = _origin(source)
    data = inputs.data
    facts = {
        "source": origin,
        "data": {"dir": str(data.path), "fingerprint": data.fingerprint, "tokenizer": data.tokenizer.sha256},
        "stages": {
            inputs.stage.name: {
                "data": inputs.data.fingerprint,
                "replay": inputs.sampling.replay,
                "replayed": inputs.sampling.replayed(),
            }
            for inputs in inputs.stages
        },
        "replay": inputs.stages[0].sampling.replay,
        "branch": inputs.branched,
        "device": runtime.to_dict(),
    }
    if inputs.teacher is not None:
        facts["teacher"] = origin if inputs.teacher is source else _origin(inputs.teacher)
    write_manifest(out, recipe, facts, allow_change)
    write_config(recipe, out)
    if not (out / "plan.json").exists():
        teaching = teaching_of(recipe, teacher, len(inputs.taught_layers))
        write_json(out / "plan.json", plan_model(recipe, source.config, target, this_machine(), teaching))
    stop.check()
    return Setting(
        recipe,
        source,
        inputs.stages,
        inputs.held_out,
        inputs.plan,
        inputs.branched,
        inputs.teacher,
        inputs.taught_layers,
        runtime=runtime,
        stop=stop,
        folder=out,
        allow_change=allow_change,
    )


def _origin(model: ModelFolder) -> dict[str, Any]:
    return {"name": model.name, "revision": model.revision, "sha256": model.weights_fingerprint()} | model.facts


def losses_of(
    setting: Setting,
    token_nll: TokenNll,
    title: str,
    budget: int | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the held-out losses of each domain within a budget of tokens, the recipe's where none is given.

    Args:
        setting: The run.
        token_nll: The model.
        title: For the progress bar.
        budget: Tokens a domain.
        names: Which of `setting.held_out`; None takes all.
    """
    budget = budget or setting.recipe.evaluate.tokens_per_domain
    places = {name: setting.held_out[name] for name in names or setting.held_out}
    total = sum(min(budget, data.num_tokens(domain, "held_out")) for data, domain in places.values())
    losses: dict[str, dict[str, Any]] = {}
    with Progress(title, total) as progress:
        before = 0

        def report(tokens: int) -> None:
            progress.update(before + tokens)
            setting.stop.check()

        for name, (data, domain) in places.items():
            found = domain_losses(token_nll, data, [domain], setting.recipe.data.seq_len, budget, on_progress=report)
            losses[name] = found[domain].to_dict()
            before += found[domain].num_tokens
    return losses


def samples_of(setting: Setting, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return what a model writes after the start of a held-out document of each domain."""
    tokenizer = load_tokenizer(setting.data.tokenizer_folder)
    return write_samples(model, tokenizer, setting.held_out.values(), setting.recipe.seed)


def release(model: PreTrainedModel) -> None:
    """Give a model's memory back now: the next one needs it."""
    cast("Any", model).to("meta")
    gc.collect()
