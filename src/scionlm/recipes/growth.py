"""Rounds of growth: a child, a deeper one, and so on, until one matches the source on the whole held-out text.

RUN/rounds/
    source.json         the source's loss on every held-out window
    round-01/           a child with everything a run keeps of one, and beside it
        validation.json its loss on every held-out window
        round.json      what the round was, cost and showed
RUN/rounds.json         all rounds, their sums, the reference's own cost, and what came of it

Each file is made once from those before it, so that a run goes on wherever it was stopped, and ends with the same.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scionlm.core.errors import DataError
from scionlm.core.files import remove_leftovers, staged_folder
from scionlm.core.log import say, warn
from scionlm.core.records import Record, read_json, read_jsonl, write_json, write_jsonl
from scionlm.evaluation.loss import DomainLoss, model_token_nll
from scionlm.evaluation.paired import paired_difference
from scionlm.parallel.placing import release
from scionlm.recipes.child import train_control, train_one
from scionlm.recipes.controller import Move, Shown, best_round, next_move
from scionlm.recipes.grown import Grown, first_round, next_round
from scionlm.recipes.result import write_card
from scionlm.recipes.rounds import CONTROL, rule_of
from scionlm.recipes.setting import Setting, measured, measured_once, open_model, with_recipe
from scionlm.sources import ModelFolder, open_folder

_COSTS = ("tokens", "flops", "seconds")


def run_rounds(setting: Setting, out: Path, source: Record) -> Record:
    """Run rounds until one matches the source or a limit is reached; return the result of the chosen one.

    Args:
        setting: The run; its plan is the first round's.
        out: The run folder.
        source: The source's losses and texts.
    """
    grow, ranks = setting.recipe.grow, setting.ranks
    assert grow is not None
    rule = rule_of(setting.recipe, setting.plan)
    folder = out / "rounds"
    ranks.on_main(lambda: folder.mkdir(exist_ok=True))
    theirs = _validation(setting, setting.source, folder / "source.json")
    rounds: list[Record] = []
    children: list[Grown] = []
    while True:
        move = next_move(rule, [shown(record) for record in rounds])
        ranks.on_main(partial(_write_ledger, setting, rounds, move, out))
        if move.layers is None:
            break
        say(f"round {len(rounds) + 1}: {move.why}")
        here = folder / f"round-{len(rounds) + 1:02d}"
        children.append(next_round(children[-1], move.layers, here) if children else first_round(setting, here))
        rounds.append(_round(children[-1], source, theirs, len(rounds) + 1))
    if not move.matched and grow.until == "matched":
        warn(move.why)
    best = best_round(rule, [shown(record) for record in rounds])
    chosen = children[best]
    behind = rounds[: best + 1] if grow.base == "student" else rounds[best : best + 1]  # what its weights have seen
    result = ranks.on_main(lambda: _bring_up(chosen, out, rounds, behind))
    if setting.recipe.control:
        alone = _control_setting(chosen.setting, sum(record["steps"] for record in behind))
        result = train_control(alone, out / CONTROL, source, result, chosen.folder)
    return result


def shown(record: Record) -> Shown:
    """Return what decides of a round's record."""
    difference = record["difference"]
    return Shown(record["layers"], record["tokens"], difference["mean"], difference["high"])


def _write_ledger(setting: Setting, rounds: Sequence[Record], move: Move, out: Path) -> None:
    write_json(out / "rounds.json", ledger(setting, rounds, move.why, move.layers is None))


def _round(grown: Grown, source: Record, theirs: dict[str, DomainLoss], number: int) -> Record:
    """Train a round's child, measure it beside the source, and return what the ledger says of it."""
    setting, here = grown.setting, grown.folder
    grow = setting.recipe.grow
    assert grow is not None

    def make() -> Record:
        name = "control" if setting.recipe.from_random else "child"
        result = train_one(setting, here, source, name, grown.make_model, grown.begin)
        mine = _validation(setting, open_folder(here / "model"), here / "validation.json")
        training = result["training"]
        return {
            "round": number,
            "layers": len(setting.plan.layers),
            "num_parameters": result["model"]["num_parameters"],
            "origins": grown.describe(),
            **{key: training[key] for key in _COSTS},
            "steps": training["steps"],
            "nll": sum(loss.nll for loss in mine.values()) / len(mine),
            "domains": {domain: loss.to_dict() for domain, loss in mine.items()},
            "difference": paired_difference(mine, theirs, grow.confidence).to_dict(),
        }

    record = setting.kept(here / "round.json", make)
    setting.ranks.on_main(grown.tidy)
    return record


def _validation(setting: Setting, model: ModelFolder, path: Path) -> dict[str, DomainLoss]:
    """Return a model's loss on every held-out window that decides, in float32, measured once."""
    grow = setting.recipe.grow
    assert grow is not None

    def make() -> Record:
        opened = open_model(setting, model, torch.float32)
        found = measured(setting, model_token_nll(opened), f"validating {model.name}", grow.tokens_per_domain)
        release(opened)
        return {"domains": {domain: asdict(loss) for domain, loss in found.items()}}

    def make_once() -> Record:
        return measured_once(setting, path, grow.tokens_per_domain, make) if model is setting.source else make()

    domains = setting.kept(path, make_once)["domains"]
    return {name: DomainLoss(**loss | {"windows": tuple(loss["windows"])}) for name, loss in domains.items()}


def ledger(setting: Setting, rounds: Sequence[Record], why: str, ended: bool) -> Record:
    """Return what is written down of all rounds: what each was and cost, what they cost in all, and what came of it.

    Args:
        setting: The run.
        rounds: Their records.
        why: What comes next, or why nothing does.
        ended: Whether there is no further round.
    """
    grow = setting.recipe.grow
    assert grow is not None
    rule = rule_of(setting.recipe, setting.plan)
    sums: dict[str, Any] = dict.fromkeys(_COSTS, 0)
    listed: list[Record] = []
    for record in rounds:
        sums = {key: sums[key] + record[key] for key in _COSTS}
        listed.append(record | {"matched": rule.matches(shown(record)), "cumulative": sums})
    chosen = best_round(rule, [shown(record) for record in rounds]) + 1 if ended else None
    outcome = "running" if chosen is None else "matched" if listed[chosen - 1]["matched"] else "not matched"
    return {
        "reference": _reference(setting),
        "settings": grow.model_dump(mode="json"),
        "rounds": listed,
        "total": sums,
        "outcome": outcome,
        "why": why,
        "result_round": chosen,
    }


def _reference(setting: Setting) -> Record:
    """Return what is known of the model that is to be matched, its own cost where a run of Scion made it."""
    found = read_json(setting.folder / "rounds" / "source.json")["domains"]
    losses = {name: loss["nll_sum"] / loss["num_tokens"] for name, loss in found.items()}
    costs = _costs_of(setting.source)
    return {
        "name": setting.source.name,
        "layers": setting.plan.num_source_layers,
        "nll": sum(losses.values()) / len(losses),
        "domains": losses,
        "num_tokens": {name: loss["num_tokens"] for name, loss in found.items()},
        "num_sequences": sum(len(loss["windows"]) for loss in found.values()),
        **{key: costs.get(key) for key in _COSTS},
    }


def _costs_of(source: ModelFolder) -> Record:
    """Return what a model cost that a run of Scion made, all rounds of it where it grew; nothing of others."""
    made = source.path.parent / "result.json"
    if source.path.name != "model" or not made.is_file():
        return {}
    try:
        result = read_json(made)
        return (result.get("growth") or {}).get("total") or result["training"]
    except (DataError, KeyError, AttributeError):
        return {}  # somebody else's file


def _bring_up(chosen: Grown, out: Path, rounds: Sequence[Record], behind: Sequence[Record]) -> Record:
    """Put the chosen round's model, and the metrics of all rounds, where a run has its own; return its result.

    Args:
        chosen: The round.
        out: The run folder.
        rounds: The records of all rounds.
        behind: Those of the rounds that its weights went through: what it was trained on.
    """
    result = read_json(chosen.folder / "result.json")
    spent = {key: sum(record[key] for record in behind) for key in (*_COSTS, "steps")}
    result |= {"rounds": len(rounds), "growth": read_json(out / "rounds.json")}
    result["training"] |= spent | _beside(out, behind, result["training"])
    earlier = sum(record["steps"] for record in behind[:-1])  # steps are counted through all that it went through
    result["best"] = {name: best | {"step": best["step"] + earlier} for name, best in result["best"].items()}
    if not (out / "model").exists():
        remove_leftovers(out, "model.")
        with staged_folder(out / "model") as stage:
            shutil.copytree(chosen.folder / "model", stage, dirs_exist_ok=True)
            write_card(chosen.setting, stage, result)
    lines: list[Record] = []
    steps = tokens = 0
    for record in rounds:
        for line in read_jsonl(_round_folder(out, record) / "metrics.jsonl"):
            at = {key: line[key] + before for key, before in (("step", steps), ("tokens", tokens)) if key in line}
            lines.append(line | at | {"round": record["round"]})
        steps, tokens = steps + record["steps"], tokens + record["tokens"]
    write_jsonl(out / "metrics.jsonl", "metrics", lines)
    return result


def _beside(out: Path, behind: Sequence[Record], training: Record) -> Record:
    """Return what saving and the teacher took in all the rounds that a child's weights went through."""
    every = [read_json(_round_folder(out, record) / "result.json")["training"] for record in behind]
    found: Record = {"checkpoint_seconds": sum(one["checkpoint_seconds"] for one in every)}
    if training["distill"]:
        taught = {key: sum(one["distill"][key] for one in every) for key in ("teacher_seconds", "teacher_steps")}
        found |= {"distill": training["distill"] | taught}
    return found


def _round_folder(out: Path, record: Record) -> Path:
    return out / "rounds" / f"round-{record['round']:02d}"


def _control_setting(setting: Setting, steps: int) -> Setting:
    """Return the setting of a control that takes as many steps as the child's weights have."""
    recipe = setting.recipe
    if steps == recipe.total_steps:
        return setting
    train = {"steps": steps, "tokens": None, "time": None}
    return with_recipe(setting, recipe.model_copy(update={"train": recipe.train.model_copy(update=train)}))
