"""RUN/result.json and the model card: what was made from what, and how good it is."""

from pathlib import Path
from typing import Any

from scionlm.core.files import write_text_atomic
from scionlm.core.records import Record, read_json
from scionlm.data import DataFolder
from scionlm.families import ModelShape, count_parameters
from scionlm.recipes.card import model_card
from scionlm.recipes.config_inherit import SIZES
from scionlm.recipes.measured import strategy_reason
from scionlm.recipes.order import replayed_data
from scionlm.recipes.setting import Setting
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.target import target_config


def describe(setting: Setting, name: str, source: Record, training: Record) -> Record:
    """Return the part of result.json that says what was made from what."""
    recipe, folder = setting.recipe, setting.source
    config = target_config([folder.config], setting.plan)
    return {
        "recipe": recipe.recipe,
        "name": name,
        "source": None if recipe.recipe == "scratch" else _describe_source(setting, source),
        "inherit": None if recipe.recipe == "scratch" else _describe_inheritance(setting),
        "upstream": list(setting.upstream),
        "model": {"num_parameters": count_parameters(config)["total"]} | ModelShape.of(config).to_dict(),
        "initialization": recipe.initialization if recipe.from_random else None,
        "rounds": 1,
        "training": {k: v for k, v in training.items() if k not in ("format_version", "before")},
    }


def _describe_source(setting: Setting, source: Record) -> Record:
    folder = setting.source
    return {
        "name": folder.name,
        "revision": folder.revision,
        "base_model": folder.base_model,
        "model_type": folder.config["model_type"],
        "num_hidden_layers": setting.plan.num_source_layers,
        "num_parameters": count_parameters(folder.config)["total"],
        "license": folder.license,
        "domains": source["domains"],
    } | {key: source[key] for key in ("tasks", "items") if key in source}


def _describe_inheritance(setting: Setting) -> Record:
    plan, source = setting.plan, setting.source.config
    return {
        "init": "random" if setting.recipe.from_random else "source",
        "strategy": plan.strategy,
        "strategy_reason": strategy_reason(plan.strategy),
        "keep": list(plan.keep),
        "fresh": list(plan.fresh),
        "fidelity": setting.recipe.fidelity,
        "width": _width(plan, ModelShape.of(source), ModelShape.of(target_config([source], plan))),
    }


def _width(plan: SurgeryPlan, source: ModelShape, child: ModelShape) -> Record | None:
    """Return what was cut of the width, and how it was chosen; None where nothing was."""
    if not plan.cuts_width:
        return None
    sizes = {name: (getattr(source, name), getattr(child, name)) for name in SIZES}
    cut = {name: {"source": was, "child": now} for name, (was, now) in sizes.items() if was != now}
    return {"importance": plan.width, "sizes": cut}


def best_losses(evaluations: list[Record], domains: list[str]) -> Record:
    """Return the lowest held-out loss of each domain and the step it was seen at."""
    best: Record = {}
    for domain in domains:
        key = f"eval/{domain}/nll_nats"
        line = min((e for e in evaluations if e.get(key) is not None), key=lambda e: e[key])
        best[domain] = {"nll": line[key], "step": line["step"]}
    return best


def add_control(result: Record, control: Record, samples: list[dict[str, Any]]) -> Record:
    """Return the child's result with the control's beside it."""
    joined = [
        mine | {"texts": mine["texts"] | {"control": theirs["texts"]["control"]}}
        for mine, theirs in zip(result["samples"], samples, strict=True)
    ]
    return result | {"control": control, "samples": joined}


def write_card(setting: Setting, model: Path, result: Record) -> None:
    """Write the model card into the folder of a model."""
    manifest = read_json(setting.folder / "manifest.json")
    trained = _trained_on(setting)
    tokens = {
        name: data.num_tokens(domain, "train")
        for name, (data, domain) in setting.held_out.items()
        if (data.fingerprint, domain) in trained
    }
    datasets = sorted({one for (_, domain), data in trained.items() for one in data.hub_datasets(domain)})
    write_text_atomic(model / "README.md", model_card(result, manifest, tokens, datasets))


def _trained_on(setting: Setting) -> dict[tuple[str, str], DataFolder]:
    """Return the data folder of every domain that weights have seen, new or replayed, by its fingerprint and name.

    What a model knew before and is only measured on is none of them.
    """
    upstream = {setting.held_out[name] for name in setting.upstream}
    found = {(d.fingerprint, name): d for d, name in setting.held_out.values() if (d, name) not in upstream}
    for inputs in setting.stages:
        earlier = replayed_data(inputs.sampling)
        for name in inputs.sampling.domains:
            found[inputs.data.fingerprint, name] = inputs.data
        if earlier is not None:
            found |= {(earlier.fingerprint, name): earlier for name in inputs.sampling.replayed_domains()}
    return found
