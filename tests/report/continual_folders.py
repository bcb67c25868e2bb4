"""Run folders of models that continue on new text, with a loss of the old text that leaps and comes back."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from report.run_folders import training, write_json, write_metrics

OLD = {"literature": 3.1, "reference": 2.7}
NEW = {"law": 3.4, "medicine": 3.0}
TOKENS_PER_STEP = 1_024
SOURCE = {
    "name": "org/base-30m", "model_type": "llama", "num_hidden_layers": 12, "num_parameters": 29_400_000,
    "license": "apache-2.0",
}  # fmt: skip
SHAPE = {"num_parameters": 29_400_000, "num_hidden_layers": 12, "hidden_size": 384, "vocab_size": 49_152}


def mean(losses: dict[str, float], names: Any = None) -> float:
    """Return the plain mean over some of the domains."""
    chosen = list(names or losses)
    return sum(losses[name] for name in chosen) / len(chosen)


def records(losses: dict[str, float], num_tokens: int = 4_096) -> dict[str, dict[str, float]]:
    """Return losses as a result has them."""
    return {
        name: {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / 3.1, "num_tokens": num_tokens}
        for name, nll in losses.items()
    }


def evaluated_steps(starts: list[int], end: int, every: int) -> list[int]:
    """Return where held-out losses are measured: evenly, and after each start at 1, 2, 4, ... steps."""
    dense = [start + 2**k for start in starts for k in range(12)]
    return sorted({0, end, *range(0, end + 1, every), *(step for step in dense if step <= end)})


def leap(since: float, height: float) -> float:
    """Return what is forgotten for a while after a change of text: up within ten steps, then slowly back."""
    return height * (1 - math.exp(-since / 4)) * math.exp(-since / 60) if since > 0 else 0.0


def course(*, steps: int = 400, gap: float = 0.5, kept: float = 0.1, gain: float = 0.6, every: int = 40) -> list[dict]:
    """Return the metrics of one stage: old text leaps by about `gap` and ends `kept` higher, new falls by `gain`."""
    lines: list[dict[str, Any]] = []
    for step in evaluated_steps([0], steps, every):
        done = (1 - math.exp(-4 * step / steps)) / (1 - math.exp(-4))
        old = {name: nll + kept * done + leap(step, gap) * (step < steps) for name, nll in OLD.items()}
        new = {name: nll - gain * done + leap(step, gap / 4) * (step < steps) for name, nll in NEW.items()}
        place = {"step": step, "tokens": step * TOKENS_PER_STEP}
        lines.append(place | {f"eval/{name}/nll_nats": nll for name, nll in {**old, **new}.items()})
    for step in range(2, steps + 1, 2):
        wobble = 0.1 * math.sin(2.7 * step) * math.cos(step)
        loss = mean(NEW) - gain * (1 - math.exp(-4 * step / steps)) + wobble
        lines.append({"step": step, "tokens": step * TOKENS_PER_STEP, "train/nll_nats": loss, "optim/lr": 3e-4})
    return lines


def losses_at(lines: list[dict], step: int) -> dict[str, float]:
    """Return what was measured at a step."""
    line = next(line for line in lines if line["step"] == step and any(key.startswith("eval/") for key in line))
    return {key.split("/")[1]: value for key, value in line.items() if key.startswith("eval/")}


def side(lines: list[dict], names: Any, gains: bool) -> dict[str, Any]:
    """Return one side of the record of forgetting, from the metrics."""
    names = list(names)
    at = {line["step"]: line for line in lines if any(key.startswith("eval/") for key in line)}
    means = {step: mean({n: line[f"eval/{n}/nll_nats"] for n in names}) for step, line in sorted(at.items())}
    before, after = means[0], means[max(means)]
    step = max(means, key=lambda one: means[one])
    peak = {"nll": means[step], "step": step, "tokens": at[step]["tokens"]}
    change = {"adaptation": before - after} if gains else {"forgetting": after - before}
    return {"domains": names, "before": before, "after": after, "peak": peak, **change}


def config(**changes: Any) -> dict[str, Any]:
    """Return the recipe of such a run."""
    return {
        "recipe": "continual", "source": "org/base-30m", "data": {"dir": "data/new", "seq_len": 256},
        "upstream": {"dir": "data/old", "domains": list(OLD)}, "replay": {"fraction": 0.05, "data": "data/old"},
        "train": {"steps": 400, "global_batch_tokens": TOKENS_PER_STEP}, "optimizer": {"lr": 3e-4},
        "schedule": {"name": "cosine", "warmup": 0.01}, "seed": 0,
    } | changes  # fmt: skip


def continual_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    *,
    state: str = "done",
    recipe: dict[str, Any] | None = None,
    stages: list[dict[str, Any]] | None = None,
    upstream: Any = tuple(OLD),
    **changes: Any,
) -> Path:
    """Write the folder of a run; `changes` replace keys of its result.

    Args:
        folder: Where.
        lines: Its metrics, of which the result is made.
        state: Without `done` there is no result.
        recipe: config.yaml.
        stages: As plan.json and the record of forgetting have them: name, steps, tokens; domains and losses.
        upstream: Names of what it knew, as its manifest has them, and its result; None leaves it out of the former.
    """
    lines = course() if lines is None else lines
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe or config()), encoding="utf-8")
    write_metrics(folder / "metrics.jsonl", lines)
    status = {"format_version": 1, "state": state, "exit_code": 0, "step": lines[-1]["step"], "message": ""}
    write_json(folder / "status.json", status)
    write_json(folder / "manifest.json", _manifest("abc", upstream))
    plan = [{key: one[key] for key in ("name", "steps", "tokens")} for one in stages or []]
    write_json(folder / "plan.json", {"format_version": 1, "stages": plan})
    before = losses_at(lines, 0)
    write_json(folder / "source.json", {"format_version": 1, "domains": records(before)})
    if state != "done":
        return folder
    last = max(line["step"] for line in lines)
    after = losses_at(lines, last)
    up, down = side(lines, OLD, False), side(lines, [name for name in after if name not in OLD], True)
    told = [
        {"name": one["name"]} | {key: one[key] for key in ("domains", "before", "at_its_end", "after")}
        for one in stages or []
    ]
    spent = training(300.0) | {"steps": last, "tokens": last * TOKENS_PER_STEP}
    result = {
        "format_version": 1, "recipe": "continual", "name": "continued", "inherit": None, "model": SHAPE,
        "source": SOURCE | {"domains": records(before)}, "before": records(before), "domains": records(after),
        "best": {name: {"nll": nll, "step": last} for name, nll in after.items()}, "training": spent,
        "upstream": list(upstream),
        "forgetting": {
            "upstream": up, "downstream": down, "net": down["adaptation"] - up["forgetting"], "stages": told,
        },
    }  # fmt: skip
    write_json(folder / "result.json", result | changes)
    return folder


def _manifest(source: str, upstream: Any) -> dict[str, Any]:
    known = (
        {} if upstream is None else {"upstream_domains": list(upstream) if isinstance(upstream, tuple) else upstream}
    )
    return {"format_version": 1, "source": {"sha256": source}, "data": {"fingerprint": "d"}} | known


def staged(
    names: tuple[str, ...] = ("law", "medicine", "poetry"), steps: int = 300, worst: int = 2
) -> tuple[list[dict], list[dict]]:
    """Return the metrics of a stage a domain, each forgotten again after its own, and the stages as recorded.

    In the stage `worst` the old text leaps highest.
    """
    starts = [k * steps for k in range(len(names))]
    lines: list[dict[str, Any]] = []
    for step in evaluated_steps(starts, len(names) * steps, 50):
        height = 0.7 if worst * steps < step < (worst + 1) * steps else 0.4
        told = {n: nll + 0.12 * (1 - math.exp(-step / 200)) + leap(step % steps, height) for n, nll in OLD.items()}
        for start, name in zip(starts, names, strict=True):
            since = step - start
            learned = 0.7 * (1 - math.exp(-min(max(since, 0), steps) / 80))
            told[name] = 3.5 - learned + 0.25 * (1 - math.exp(-max(since - steps, 0) / 100))
        lines.append(
            {"step": step, "tokens": step * TOKENS_PER_STEP} | {f"eval/{n}/nll_nats": v for n, v in told.items()}
        )
    last = len(names) * steps
    stages = [
        {
            "name": f"on-{name}", "steps": steps, "tokens": steps * TOKENS_PER_STEP, "domains": [name],
            "before": losses_at(lines, 0)[name], "at_its_end": losses_at(lines, start + steps)[name],
            "after": losses_at(lines, last)[name],
        }
        for start, name in zip(starts, names, strict=True)
    ]  # fmt: skip
    return lines, stages


def compared_continual(
    folder: Path,
    kept: float,
    gain: float,
    *,
    seed: int = 0,
    kind: str = "continual",
    source: str = "org/base-30m",
    key: str = "abc",
    raised: float = 0.0,
    upstream: Any = tuple(OLD),
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run that ends `kept` nats higher on old text and `gain` lower on new, to be compared with others.

    Args:
        folder: Where.
        kept: Nats forgotten.
        gain: Nats learned.
        seed: Of the run.
        kind: Its recipe; any other than continual has no source.
        source: Name of the source.
        key: Hash of it.
        raised: By how much the source's losses are higher than those of others.
        upstream: What the result names as known before; None leaves the key out.
        recipe: Other keys of config.yaml.
        **changes: As for `continual_run`.
    """
    every = config(seed=seed, recipe=kind, source=source) | (recipe or {})
    if kind != "continual":
        every |= {"source": None, "replay": None}
    lines = course(kept=kept, gain=gain, gap=0.05)
    if raised:
        lines = [{k: v + raised if k.startswith("eval/") else v for k, v in line.items()} for line in lines]
    continual_run(folder, lines, recipe=every, **changes)
    write_json(folder / "manifest.json", _manifest(key, upstream))
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        result |= {"recipe": kind, "upstream": None if upstream is None else list(upstream)}
        result["training"]["seed"] = seed
        if kind == "continual":
            result["source"]["name"] = source
        else:
            result |= {"source": None, "forgetting": None}
        write_json(folder / "result.json", result)
    return folder
