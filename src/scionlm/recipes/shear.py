"""Shear: prune the source to an exact shape, by learned masks or in one shot, and train what is left.

Source: Xia et al. (Sheared LLaMA), arXiv:2310.06694.
Differs: grouped key/value heads; the constraint is calibrated and the last steps have hard masks (`prune.gates`); the
    recovery may learn from the source, and it goes on in the data where pruning stopped.
"""

from dataclasses import replace
from pathlib import Path

from scionlm.core.records import Record, read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.child import evaluate_source, train_control, train_one
from scionlm.recipes.inputs import Inputs, match_layers
from scionlm.recipes.pruned import PRUNE, Pruned, learn_masks, prune_by_scores, with_weights
from scionlm.recipes.result import write_card
from scionlm.recipes.rounds import CONTROL
from scionlm.recipes.setting import Setting, settle, with_recipe

_COSTS = ("tokens", "flops", "seconds", "steps")


def run_shear(inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False) -> Record:
    """Run the recipe into `out`; each finished phase is kept, so that the same call goes on after a stop.

    Raises:
        ScionError: Whatever a phase raises; `learn_masks` and `train_one` say what.
    """
    setting = settle(inputs, out, stop, ranks, allow_change)
    recipe = setting.recipe
    assert recipe.prune is not None
    source = evaluate_source(setting, out)
    by_masks = recipe.prune.method == "masks"
    pruned = learn_masks(setting, out / PRUNE) if by_masks else prune_by_scores(setting, out / PRUNE, source)
    recovery = _recovering(setting, pruned)
    result = train_one(recovery, out, source, "child", pruned.make_model, pruned.begin)
    result = ranks.on_main(lambda: _with_pruning(result, pruned))
    ranks.on_main(lambda: write_card(recovery, out / "model", result))
    ranks.on_main(lambda: write_json(out / "result.json", result))
    if recipe.control:  # which may take hours: until it is done the child's own result stands
        result = train_control(_control(recovery, pruned), out / CONTROL, source, result, out)
        ranks.on_main(lambda: write_json(out / "result.json", result))
    return ranks.on_main(lambda: read_json(out / "result.json"))


def _recovering(setting: Setting, pruned: Pruned) -> Setting:
    """Return the setting of the recovery: of what is left, with the weights of domains that pruning ended with."""
    layers = match_layers(setting.recipe, setting.source, setting.teacher, pruned.plan)
    first, *later = setting.stages
    stages = [first if first.stage.reweight is None else with_weights(first, pruned.weights), *later]
    return replace(setting, plan=pruned.plan, taught_layers=layers, stages=stages)


def _with_pruning(result: Record, pruned: Pruned) -> Record:
    """Return the recovery's result with what pruning was and cost; sums count both."""
    if "prune" in result:
        return result
    recovery = {key: result["training"][key] for key in _COSTS}
    costs = pruned.record["training"]
    spent = {key: recovery[key] + costs[key] for key in _COSTS}
    training = result["training"] | spent | {"recovery": recovery, "pruning": {key: costs[key] for key in _COSTS}}
    return result | {"training": training, "prune": pruned.record}


def _control(recovery: Setting, pruned: Pruned) -> Setting:
    """Return the setting of a control: the same shape from random weights, for as many tokens as both phases have."""
    recipe = recovery.recipe
    steps = recipe.total_steps + -(-pruned.record["training"]["tokens"] // recipe.train.global_batch_tokens)
    train = recipe.train.model_copy(update={"steps": steps, "tokens": None, "time": None})
    return with_recipe(recovery, recipe.model_copy(update={"train": train}))
