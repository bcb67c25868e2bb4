"""Inheritune, one round: inherit layers from the source, train, export, and compare with source and control.

Source: Sanyal, Sanghavi and Dimakis, arXiv:2404.08634.
Differs: embeddings and final norm are inherited too, and which layers are kept is a choice (`inherit.strategy`).
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from scionlm.core.log import say
from scionlm.core.records import JsonlWriter, Record, read_json, read_jsonl, write_json
from scionlm.core.signals import StopRequest
from scionlm.evaluation.loss import model_token_nll
from scionlm.families.models import assemble, random_model
from scionlm.parallel.placing import release
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.inputs import Inputs
from scionlm.recipes.result import add_control, best_losses, describe, write_card
from scionlm.recipes.setting import Setting, losses_of, open_model, samples_of, settle
from scionlm.recipes.training import train_model
from scionlm.sources import open_folder
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config


def run_inheritune(
    inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False
) -> Record:
    """Run one round into `out`; each finished phase is kept, so that the same call goes on after a stop."""
    setting = settle(inputs, out, stop, ranks, allow_change)
    recipe = setting.recipe
    source_losses = evaluate_source(setting, out)
    result = train_one(setting, out, source_losses, name="control" if recipe.inherit.init == "random" else "child")
    if recipe.control:
        inherit = recipe.inherit.model_copy(update={"init": "random"})
        control_recipe = recipe.model_copy(update={"inherit": inherit, "control": False})
        control_setting = replace(setting, recipe=control_recipe)
        control = train_one(control_setting, out / "control", source_losses, name="control")
        keys = ("name", "before", "domains", "best", "training")
        result = add_control(result, {key: control[key] for key in keys} | {"num_seeds": 1}, control["samples"])
        ranks.on_main(lambda: write_json(out / "result.json", result))
    return ranks.on_main(lambda: read_json(out / "result.json"))


def evaluate_source(setting: Setting, out: Path) -> Record:
    """Return the source's losses and sample texts, in float32, evaluated once and kept in RUN/source.json."""

    def evaluate() -> Record:
        model = open_model(setting, setting.source, torch.float32)
        domains = losses_of(setting, model_token_nll(model), f"evaluating {setting.source.name}")
        found = {"domains": domains, "samples": samples_of(setting, model)}
        release(model)
        return found

    return setting.kept(out / "source.json", evaluate)


def make_model(setting: Setting) -> PreTrainedModel:
    """Return the model to train, with float32 weights: inherited and proven, or the control.

    The main rank makes it; that of the others has the same shape, and gets its weights when it is placed.
    """
    recipe, source = setting.recipe, setting.source
    if not setting.ranks.is_main:
        return assemble(target_config([source.config], setting.plan), {}, torch.float32)
    if recipe.inherit.init == "random":
        return random_model(target_config([source.config], setting.plan), recipe.seed)
    with open_surgery([source], setting.plan) as surgery:
        child = surgery.build(torch.float32)
        proof = surgery.prove(child)
    kept = ", ".join(map(str, setting.plan.keep))
    say(f"inherited layers {kept} of {source.name}; {len(proof.checks)} proofs hold")
    return child


def train_one(setting: Setting, out: Path, source: Record, name: str) -> Record:
    """Train one model into `out` and return its result; a finished one is read back."""

    def train_and_measure() -> Record:
        if not setting.ranks.on_main((out / "model").exists):
            train_model(setting, make_model, out, name)
        exported = open_model(setting, open_folder(out / "model"), torch.float32)
        domains = losses_of(setting, model_token_nll(exported), f"evaluating {name}")
        samples = samples_of(setting, exported)
        release(exported)
        return setting.ranks.on_main(lambda: _result_of(setting, out, source, name, domains, samples))

    setting.ranks.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
    return setting.kept(out / "result.json", train_and_measure)


def _result_of(
    setting: Setting, out: Path, source: Record, name: str, domains: Record, samples: list[Record]
) -> Record:
    """Return the result of a trained model, after writing its card and the last of its metrics."""
    lines = read_jsonl(out / "metrics.jsonl")
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    final_line = {f"eval/{d}/nll_nats": loss["nll"] for d, loss in domains.items()}
    training = read_json(out / "training.json")
    if not evaluations or evaluations[-1]["step"] != training["steps"]:
        writer = JsonlWriter(out / "metrics.jsonl", "metrics")
        writer.write({"step": training["steps"], "tokens": training["tokens"]} | final_line)
        writer.close()
        evaluations.append({"step": training["steps"]} | final_line)
    result = describe(setting, name, source, training)
    result["before"] = training["before"]
    result["domains"] = domains
    result["best"] = best_losses(evaluations, setting.domains)
    texts = zip(source["samples"], samples, strict=True)
    result["samples"] = [{"prompt": s["prompt"], "texts": {"source": s["text"], name: own["text"]}} for s, own in texts]
    write_card(setting, out, result)
    return result
