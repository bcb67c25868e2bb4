"""Inheritune: inherit layers from the source, train, compare with source and control, and grow until it is matched.

Source: Sanyal, Sanghavi and Dimakis, arXiv:2404.08634.
Differs: embeddings and final norm are inherited too (`fidelity` leaves them out as the paper does), and which layers,
parts and width are kept is a choice (`inherit`).
"""

from dataclasses import replace
from pathlib import Path

from scionlm.core.records import Record, read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.child import evaluate_source, train_control, train_one
from scionlm.recipes.growth import run_rounds
from scionlm.recipes.inputs import Inputs, from_source, match_layers
from scionlm.recipes.origin import REFERENCE, open_source
from scionlm.recipes.reference import reference_recipe
from scionlm.recipes.rounds import CONTROL, check_growth
from scionlm.recipes.run import run_within
from scionlm.recipes.selection import selected
from scionlm.recipes.setting import Setting, settle


def run_inheritune(
    inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False
) -> Record:
    """Run the recipe into `out`; each finished phase is kept, so that the same call goes on after a stop."""
    if inputs.recipe.reference is not None:
        # Once the child's settings are written down the reference is done; what they settled is not for it.
        if not ranks.on_main((out / "config.yaml").exists):
            run_within(reference_recipe(inputs.recipe), out / REFERENCE, stop, ranks, allow_change)
        inputs = from_source(inputs, open_source(inputs.recipe, out))
    inputs = with_selection(inputs, out, stop, ranks)
    setting = settle(inputs, out, stop, ranks, allow_change)
    source = evaluate_source(setting, out)
    result = _one_round(setting, out, source) if setting.recipe.grow is None else run_rounds(setting, out, source)
    ranks.on_main(lambda: write_json(out / "result.json", result))
    return ranks.on_main(lambda: read_json(out / "result.json"))


def with_selection(inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks) -> Inputs:
    """Return the inputs with the plan that is carried out, in the place of the one that stood in for it."""
    recipe, source, first = inputs.recipe, inputs.source, inputs.stages[0]
    plan = selected(recipe, source, first.data, first.sampling.domains, out, stop, ranks)
    check_growth(recipe, plan, source)
    return replace(inputs, plan=plan, taught_layers=match_layers(recipe, source, inputs.teacher, plan))


def _one_round(setting: Setting, out: Path, source: Record) -> Record:
    recipe = setting.recipe
    result = train_one(setting, out, source, name="control" if recipe.from_random else "child")
    return train_control(setting, out / CONTROL, source, result, out) if recipe.control else result
