"""The model card: README.md of the exported folder, with the front matter that the Hugging Face hub reads."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from scionlm.core.config import dump_yaml
from scionlm.core.log import format_count, format_seconds
from scionlm.core.records import stderr_key
from scionlm.sources import ModelFolder

# How a recipe that prunes chose what stays, by its method.
_CHOSEN = {
    "masks": "what stays was chosen by masks that were learned while the source was trained",
    "scores": "what stays has the highest scores",
    "first": "the first of everything stays",
    "random": "what stays was drawn by lot",
}

# How first weights were drawn.
_DRAWN = {"transformers": "its family is", "tinyllama": "TinyLlama was", "gpt_neox": "GPT-NeoX does"}

_LICENCE = """## Licence

The source's licence is {license}; its licence files, where it has any, are in this folder. A base model: it continues
text and follows no instructions.
"""


def model_card(
    result: dict[str, Any], manifest: dict[str, Any], train_tokens: dict[str, int], datasets: Sequence[str] = ()
) -> str:
    """Return the card of a trained model.

    Args:
        result: RUN/result.json.
        manifest: RUN/manifest.json.
        train_tokens: Tokens to train on in each evaluated domain that it was trained on.
        datasets: Those of the hub that the text comes from.
    """
    source, training = result["source"] or {}, result["training"]
    front = _front(result, datasets)
    made = _made(result)
    taught = training.get("distill")
    if taught:
        made += f" Learned also from `{cell(taught['teacher'])}` (licence: {taught['license'] or 'not stated'})."
    domains = result["domains"]
    theirs = {name: f"{loss['nll']:.4f}" for name, loss in source.get("domains", {}).items()}
    rows = "\n".join(
        f"| {cell(name)} | {theirs.get(name, '')} | {result['before'][name]['nll']:.4f} "
        f"| {loss['nll']:.4f} | {loss['perplexity']:.2f} | {loss['bits_per_byte']:.4f} | {loss['num_tokens']} |"
        for name, loss in domains.items()
    )
    sizes = ", ".join(f"{cell(name)} ({format_count(n)} tokens to train on)" for name, n in train_tokens.items())
    others = [cell(name) for name in domains if name not in train_tokens]
    sizes += f"; measured on alone: {', '.join(others)}" if others else ""
    title = f"{result['name']} of {source['name']}" if source else f"{manifest['model']['model_type']} from scratch"
    licence = source.get("license") or "not stated in its files"
    model, versions = result["model"], manifest["versions"]
    parameters = format_count(model["num_parameters"])
    many = f"{training['devices']} x " if training.get("devices", 1) > 1 else ""
    pruned, before = training.get("pruning") or {}, "before training"
    while_pruning = f" ({format_count(pruned['tokens'])} of them while pruning)" if pruned.get("tokens") else ""
    if result.get("prune"):
        before = "right after pruning"
    cost = f"{training['steps']} steps, {format_seconds(training['seconds'])} on {many}{training['device']}"
    return f"""---
{dump_yaml(front)}---
# {title}: {model["num_hidden_layers"]} layers, {parameters} parameters

{made}

| held-out loss | source | {before} | after training | perplexity | bits per byte | tokens |
|---|---|---|---|---|---|---|
{rows}

Losses are mean negative log-likelihoods in nats over the packed held-out stream, of the files in this folder; those
{before} were computed in {training["precision"]}, the others in float32.
{_tasks(result)}
## Training

- Data: {sizes}
- Tokens seen: {format_count(training["tokens"])}{while_pruning} in {cost}
- Precision {training["precision"]}, seed {training["seed"]}
- Command: `{shlex.join(manifest["command"])}`
- Scion {manifest["scion_version"]}, torch {versions.get("torch")}, transformers {versions.get("transformers")}

{_LICENCE.format(license=licence) if source else ""}"""


def _tasks(result: dict[str, Any]) -> str:
    """Return the scores on tasks as a table; empty where there are none."""
    tasks, theirs = _whole_tasks(result), (result.get("source") or {}).get("tasks") or {}
    if not tasks:
        return ""

    def shown(record: dict[str, Any], metric: str) -> str:
        value, error = record.get(metric), record.get(stderr_key(metric))
        return "" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = "\n".join(
        f"| {cell(name)} | {record['metric']} | {shown(theirs.get(name, {}), record['metric'])} "
        f"| {shown(record, record['metric'])} | {record.get('num_items', '')} |"
        for name, record in tasks.items()
    )
    return f"\n| task | metric | source | this model | items |\n|---|---|---|---|---|\n{rows}\n"


def _whole_tasks(result: dict[str, Any]) -> dict[str, Any]:
    """Return the scores on what was asked for, without the single tasks of groups."""
    return {name: record for name, record in (result.get("tasks") or {}).items() if not record.get("group")}


def front_matter(license_name: str | None, base_model: str | None) -> dict[str, Any]:
    """Return what every card begins with.

    Args:
        license_name: The licence, where one is known.
        base_model: Hub id of what it was made from, where there is one.
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["scion"]}
    named = {"license": license_name, "base_model": base_model}
    return front | {key: value for key, value in named.items() if value}


def _front(result: dict[str, Any], datasets: Sequence[str]) -> dict[str, Any]:
    """Return the front matter, which the hub shows; `model-index` has the held-out losses."""
    source = result["source"] or {}
    front = front_matter(source.get("license"), source.get("base_model"))
    if datasets:
        front["datasets"] = list(datasets)
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{name}, held out", "type": name},
            "metrics": [
                {"type": "perplexity", "value": round(loss["perplexity"], 4)},
                {"type": "bits_per_byte", "value": round(loss["bits_per_byte"], 4)},
            ],
        }
        for name, loss in result["domains"].items()
        if math.isfinite(loss["perplexity"])
    ]
    results += [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task},
            "metrics": [{"type": record["metric"], "value": round(record[record["metric"]], 4)}],
        }
        for task, record in _whole_tasks(result).items()
        if record.get(record["metric"]) is not None
    ]
    name = f"{result['name']} of {source['name']}" if source else result["name"]
    metrics = list(dict.fromkeys(one["type"] for entry in results for one in entry["metrics"]))
    return front | {"metrics": metrics, "model-index": [{"name": name, "results": results}]}


def _made(result: dict[str, Any]) -> str:
    """Return the sentence that says what a model was made from."""
    source, inherit = result["source"], result["inherit"]
    if source is None:
        how = _DRAWN[result.get("initialization") or "transformers"]
        return f"Initialized at random as {how}, and trained from scratch."
    if inherit["init"] == "random":
        return (
            f"A control: the shape of {len(inherit['keep'])} layers of **{source['name']}**, initialized at random; "
            "then trained."
        )
    if result.get("prune"):
        return f"{_pruned(result)}; then trained."
    kept = ", ".join(map(str, inherit["keep"]))
    return (
        f"Layers {kept} of **{source['name']}** ({source['num_hidden_layers']} layers, "
        f"{format_count(source['num_parameters'])} parameters), chosen by `{inherit['strategy']}` "
        f"({inherit['strategy_reason']}), {_rest(inherit)}; then trained."
    )


def _pruned(result: dict[str, Any]) -> str:
    """Return what a source was pruned to, and how."""
    source, inherit, prune = result["source"], result["inherit"], result["prune"]
    sizes = (inherit.get("width") or {}).get("sizes", {})
    cuts = [f"{name} {size['child']} of {size['source']}" for name, size in sizes.items()]
    kept = ", ".join(map(str, inherit["keep"]))
    return (
        f"**{source['name']}** ({source['num_hidden_layers']} layers, {format_count(source['num_parameters'])} "
        f"parameters), pruned to {_and([f'its layers {kept}', *cuts])}: {chosen_words(prune)}"
    )


def chosen_words(prune: dict[str, Any]) -> str:
    """Return how what stays of a pruned source was chosen, and on how many tokens.

    Args:
        prune: `prune` of result.json.
    """
    method, plan, tokens = prune["method"], prune["plan"], prune["training"]["tokens"]
    words = _CHOSEN.get(method, f"method {method}")
    if method == "scores":
        width, steps = plan.get("width"), len(prune.get("pruning_steps") or [])
        of_width = f", heads and channels by `{width}`" if width else ""
        words += f" (layers by `{plan['strategy']}`{of_width}{f', in {steps} steps' if steps > 1 else ''})"
    words += f", on {format_count(tokens)} tokens" if tokens else ""
    fidelity = prune.get("fidelity", "recommended")
    return words + (f" (`fidelity: {fidelity}`)" if method == "masks" and fidelity != "recommended" else "")


def _rest(inherit: dict[str, Any]) -> str:
    """Return what is said of everything but the choice of layers; results of before say nothing of it."""
    fresh, width = inherit.get("fresh") or [], inherit.get("width")
    outside = {"embedding": "embeddings", "final_norm": "final norm", "head": "head"}
    taken = [word for part, word in outside.items() if part not in fresh]
    words = f"with its {_and(taken)}" if taken else "without what is outside of them"
    if fresh:
        words += f"; not inherited but initialized anew: {_and([part.replace('_', ' ') for part in fresh])}"
        fidelity = inherit.get("fidelity", "recommended")
        words += f" (`fidelity: {fidelity}`)" if fidelity != "recommended" else ""
    if width:
        sizes = _and([f"{name} {size['child']} of {size['source']}" for name, size in width["sizes"].items()])
        hows = {"first": "the first ones", "masks": "those that masks keep"}
        how = hows.get(width["importance"], f"the most important by {width['importance']}")
        words += f"; cut in width to {sizes} ({how})"
    return words


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def inherit_card(folders: Sequence[ModelFolder], facts: dict[str, Any], command: list[str]) -> str:
    """Return the card of a model that was cut and not trained.

    Args:
        folders: The donors, in the plan's order.
        facts: What `recipes.inherit.describe_request` found.
        command: The command that made it.
    """
    plan, before, after = facts["plan"], facts["source_shape"], facts["target_shape"]
    changed = {key: (before[key], value) for key, value in after.items() if before[key] != value}
    sizes = "".join(f"| {key} | {old} | {new} |\n" for key, (old, new) in changed.items())
    kinds = ", ".join(f"{counts['tensors']} tensors {kind}" for kind, counts in facts["tensors"].items())
    used = [folders[k] for k in dict.fromkeys([0, *(layer.get("donor", 0) for layer in plan["layers"])])]
    licences = {one.license for one in used}
    license_ = licences.pop() if len(licences) == 1 else "other"
    stated = used[0].license
    if len(used) > 1:
        stated = _and([f"{one.license or 'not stated'} of {one.name}" for one in used])
    return f"""---
{dump_yaml(front_matter(license_, used[0].base_model))}---
# {len(plan["keep"])} layers of {_and([one.name for one in used])}: {format_count(facts["num_parameters"])} parameters

Layers {_layers_of(plan["layers"], folders)} ({plan["num_source_layers"]} layers), chosen by
`{plan["strategy"]}`: {kinds}. Not trained since: it needs training before it is of use. `provenance.json` holds the
plan, the hashes of the weight files and the checks that they passed.

| size | source | here |
|---|---|---|
{sizes}| parameters | {facts["source_parameters"]} | {facts["num_parameters"]} |

- Command: `{shlex.join(command)}`

{_LICENCE.format(license=stated or "not stated in its files")}"""


def _layers_of(layers: Sequence[dict[str, Any]], folders: Sequence[ModelFolder]) -> str:
    """Return the layers in order, each stretch with the donor that it is from."""
    stretches: list[tuple[int, list[str]]] = []
    for layer in layers:
        donor = layer.get("donor", 0)
        if not stretches or stretches[-1][0] != donor:
            stretches.append((donor, []))
        stretches[-1][1].append(str(layer["index"]))
    return ", ".join(f"{', '.join(indices)} of **{folders[donor].name}**" for donor, indices in stretches)


def cell(text: str) -> str:
    """Return text that cannot break out of a Markdown table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("`", "\\`").replace("<", "&lt;")
