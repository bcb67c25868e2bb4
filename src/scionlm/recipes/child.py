"""One model from its first weights to its result: inherited or random, trained, exported, read back, measured."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.errors import UsageError
from scionlm.core.log import say
from scionlm.core.records import Record, read_json, read_jsonl
from scionlm.evaluation.loss import model_token_nll
from scionlm.families.models import assemble, random_model
from scionlm.parallel.placing import release
from scionlm.recipes.config import Recipe
from scionlm.recipes.result import add_control, best_losses, describe, write_card
from scionlm.recipes.setting import Setting, losses_of, measured_once, open_model, samples_of
from scionlm.recipes.tasks import tasks_of
from scionlm.recipes.training import Beginning, export_type, open_metrics, train_model
from scionlm.sources import ModelFolder, open_folder
from scionlm.sources.tensors import stored_dtype
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config

NO_SOURCE: Record = {"domains": {}, "samples": []}
"""What is known of the source of a model that has none."""


def evaluate_source(setting: Setting, out: Path) -> Record:
    """Return the source's losses and sample texts, in float32, evaluated once and kept in RUN/source.json."""
    path, title = out / "source.json", f"evaluating {setting.source.name}"

    def evaluate() -> Record:
        model = open_model(setting, setting.source, torch.float32)

        def measure() -> Record:
            domains = losses_of(setting, model_token_nll(model), title)
            return {"domains": domains} | tasks_of(setting, model, setting.source.path, title)

        found = measured_once(setting, path, setting.recipe.evaluate.tokens_per_domain, measure)
        found |= {"samples": samples_of(setting, model)}  # which the seed decides
        release(model)
        return found

    return setting.kept(path, evaluate)


def make_model(setting: Setting) -> PreTrainedModel:
    """Return the model to train, with float32 weights: inherited and proven, or the control.

    The main rank makes it; that of the others has the same shape, and gets its weights when it is placed.
    """
    recipe, source = setting.recipe, setting.source
    if not setting.ranks.is_main:
        return assemble(target_config([source.config], setting.plan), {}, torch.float32)
    if recipe.from_random:
        return random_model(target_config([source.config], setting.plan), recipe.seed, init=recipe.initialization)
    with open_surgery([source], setting.plan) as surgery:
        child = surgery.build(torch.float32)
        proof = surgery.prove(child)
    plan = setting.plan
    if recipe.recipe == "continual":
        say(f"going on with {source.name}; {len(proof.checks)} proofs hold")
        return child
    kept = ", ".join(map(str, plan.keep))
    but = f" but its {', '.join(plan.fresh)}" if plan.fresh else ""
    say(f"inherited layers {kept} of {source.name}{but}; {len(proof.checks)} proofs hold")
    return child


def train_one(
    setting: Setting,
    out: Path,
    source: Record,
    name: str,
    make: Callable[[Setting], PreTrainedModel] | None = None,
    begin: Beginning | None = None,
) -> Record:
    """Train one model into `out` and return its result; a finished one is read back.

    Args:
        setting: The run.
        out: Folder for the model and all that comes with it.
        source: What is known of the source.
        name: Of the model in what is said of it.
        make: Gives its first weights; None takes what the setting inherits.
        begin: Called before the first step, with what learns and where it is.
    """

    def train_and_measure() -> Record:
        if not setting.ranks.on_main(partial(_is_trained, setting, out)):
            train_model(setting, make or make_model, out, name, begin)
        exported = open_model(setting, open_folder(out / "model"), torch.float32)
        domains = losses_of(setting, model_token_nll(exported), f"evaluating {name}")
        samples = samples_of(setting, exported)
        tasks = tasks_of(setting, exported, out / "model", f"evaluating {name}")
        release(exported)
        return setting.ranks.on_main(lambda: _result_of(setting, out, source, name, domains, samples, tasks))

    setting.ranks.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
    return setting.kept(out / "result.json", train_and_measure)


def _is_trained(setting: Setting, out: Path) -> bool:
    """Return whether a model is there already.

    Raises:
        UsageError: It was made by another number of steps, or in another type, than are asked for now.
    """
    if not (out / "model").exists():
        return False
    steps, dtype = read_json(out / "training.json")["steps"], stored_dtype(out / "model")
    asked = (setting.recipe.total_steps, export_type(setting.recipe, setting.source))
    if (steps, dtype) != asked:
        raise UsageError(
            f"{out / 'model'} was written after {steps} steps in {dtype}, not after {asked[0]} in {asked[1]}; "
            "remove it to go on from the last checkpoint, or use the settings it was made with"
        )
    return True


def _result_of(
    setting: Setting, out: Path, source: Record, name: str, domains: Record, samples: list[Record], tasks: Record
) -> Record:
    """Return the result of a trained model, after writing its card and the last of its metrics."""
    lines = read_jsonl(out / "metrics.jsonl")
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    final_line = {f"eval/{d}/nll_nats": loss["nll"] for d, loss in domains.items()}
    training = read_json(out / "training.json")
    if not evaluations or evaluations[-1]["step"] != training["steps"]:
        with contextlib.closing(open_metrics(setting, out)) as metrics:
            tokens = max((line["tokens"] for line in lines if "tokens" in line), default=training["tokens"])
            metrics.write({"step": training["steps"], "tokens": tokens} | final_line)
        evaluations.append({"step": training["steps"]} | final_line)
    result = describe(setting, name, source, training)
    result["before"] = training["before"]
    result["domains"] = domains
    result["best"] = best_losses(evaluations, setting.domains)
    theirs = [{"source": sample["text"]} for sample in source["samples"]] or [{}] * len(samples)
    result["samples"] = [
        {"prompt": own["prompt"], "texts": other | {name: own["text"]}}
        for other, own in zip(theirs, samples, strict=True)
    ]
    result |= tasks
    write_card(setting, out / "model", result)
    return result


def train_control(setting: Setting, out: Path, source: Record, result: Record, beside: Path) -> Record:
    """Train the randomly initialised control of a model and return the model's result with the control's beside it.

    Args:
        setting: The model's run.
        out: Folder for the control.
        source: What is known of the source.
        result: The model's.
        beside: Folder of the model.
    """
    alone = control_recipe(setting.recipe, setting.source)
    control = train_one(replace(setting, recipe=alone, followed=beside), out, source, name="control")
    keys = ("name", "before", "domains", "best", "training", "tasks", "items")
    return add_control(
        result, {key: control[key] for key in keys if key in control} | {"num_seeds": 1}, control["samples"]
    )


def control_recipe(recipe: Recipe, source: ModelFolder) -> Recipe:
    """Return the recipe of a model's control: of its own it has the shape alone, and is trained in the same way."""
    others: dict[str, Any] = {"control": False, "prune": None, "target": None, "grow": None}
    if recipe.average is not None and recipe.average.method == "start":
        others["average"] = None  # half of random weights is no model
    if recipe.recipe == "continual":
        others["model"] = source.config
    else:
        others |= {"recipe": "inheritune", "inherit": recipe.inherits.model_copy(update={"init": "random"})}
    return recipe.model_copy(update=others)
