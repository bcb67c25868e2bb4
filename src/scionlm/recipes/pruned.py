"""The first half of shearing: what is left of the source, before it is trained as what it is.

RUN/prune/
    model/          what is left, in float32: an ordinary Hugging Face folder
    result.json     how it was chosen, its losses, and what it cost
    masks.json      which units each mask keeps, and how far the masks were from a choice
    checkpoints/ ...  of the stretch of training in which masks were learned
    step-01/ ...    method scores in several steps: what each left, with everything a run keeps of a model
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from scionlm.core.files import remove_leftovers, staged_folder
from scionlm.core.log import say
from scionlm.core.records import Record, read_json, read_jsonl
from scionlm.data import DataFolder, Mixture
from scionlm.evaluation.loss import model_token_nll
from scionlm.families import ModelShape, count_parameters
from scionlm.families.models import assemble
from scionlm.parallel.placing import release
from scionlm.recipes.beginning import Beginning, behind
from scionlm.recipes.child import train_one
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import StageInputs, match_layers
from scionlm.recipes.order import sampling_of
from scionlm.recipes.pruning import RECORD, Pruning
from scionlm.recipes.selection import selected
from scionlm.recipes.setting import Setting, losses_of, open_model
from scionlm.recipes.shear_steps import pruning_recipe, shrinking
from scionlm.recipes.training import train_model
from scionlm.sources import ModelFolder, load_hf_model, open_folder
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.export import save_model
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.plan import SurgeryPlan, compose
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config

PRUNE = "prune"
"""Folder of this in RUN."""
_NOTHING = {"steps": 0, "tokens": 0, "flops": 0, "seconds": 0.0}


@dataclass(frozen=True)
class Pruned:
    """What is left of a source.

    Attributes:
        plan: It, in terms of the source.
        folder: RUN/prune.
        record: RUN/prune/result.json.
        trained: Folder of the checkpoints of the last stretch of training; None where there was none.
    """

    plan: SurgeryPlan
    folder: Path
    record: Record
    trained: Path | None

    @property
    def weights(self) -> dict[str, float] | None:
        """The weights of the domains that pruning ended with; None where they did not move."""
        return self.record.get("weights")

    def make_model(self, setting: Setting) -> PreTrainedModel:
        """Return it, in float32; on other ranks than the main one without its weights."""
        if setting.ranks.is_main:
            return load_hf_model(open_folder(self.folder / "model"), torch.float32)
        return assemble(target_config([setting.source.config], self.plan), {}, torch.float32)

    @property
    def begin(self) -> Beginning | None:
        """How its training begins beside weights: behind the pruning in the data."""
        return None if self.trained is None else behind(self.trained)


def learn_masks(setting: Setting, out: Path) -> Pruned:
    """Train the source under masks, and cut it to what they keep.

    Args:
        setting: The run; its plan has the target's shape.
        out: RUN/prune.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergenceError: Loss or gradient was not finite too many times in a row.
        ScionError: What was cut is not what was masked.
    """
    layers = ModelShape.of(setting.source.config).num_hidden_layers
    whole = plan_depth(layers, layers, name=setting.source.name)
    alone = _stretch(setting, pruning_recipe(setting.recipe), out, whole)
    pruning = Pruning(setting.recipe, setting.plan, setting.folder)

    def make() -> Record:
        if not setting.ranks.on_main((out / "model").exists):
            train_model(alone, _load_source, out, f"masks of {setting.source.name}", pruning=pruning)
        training = setting.ranks.on_main(lambda: read_json(out / "training.json"))
        masks = setting.ranks.on_main(lambda: read_json(out / RECORD))
        found = {"axes": masks["axes"], "masked": training["masked"], "checks": masks["checks"]}
        found["weights"] = _last_weights(alone, out)
        return _record(setting, out, SurgeryPlan.from_dict(masks["plan"]), training) | found

    setting.ranks.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
    record = setting.kept(out / "result.json", make)
    return Pruned(SurgeryPlan.from_dict(record["plan"]), out, record, out)


def prune_by_scores(setting: Setting, out: Path, source: Record) -> Pruned:
    """Cut the source to what a score keeps, in one go or in steps, each trained where there is a budget for it.

    Args:
        setting: The run; its plan has the target's shape.
        out: RUN/prune.
        source: What is known of the source.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergenceError: Loss or gradient was not finite too many times in a row.
        ScionError: What was cut is not the model under masks.
    """
    setting.ranks.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
    recipes = shrinking(setting.recipe, setting.source.config)
    record = setting.kept(out / "result.json", lambda: _cut_step_by_step(setting, recipes, out, source))
    trained = out / f"step-{len(recipes):02d}" if recipes[-1].pruning_stage else None
    return Pruned(SurgeryPlan.from_dict(record["plan"]), out, record, trained)


def _cut_step_by_step(setting: Setting, recipes: Sequence[Recipe], out: Path, source: Record) -> Record:
    """Prune in as many steps as there are recipes, each kept once it is done; return what is written down of it."""
    folder, plan = setting.source, None
    steps: list[Record] = []
    weights: dict[str, float] | None = None
    for number, step in enumerate(recipes, 1):
        # What is measured for a step is what the one before left.
        recipe = step if number == 1 else step.model_copy(update={"source": str(folder.path)})
        here = out / f"step-{number:02d}"
        text = setting.stages[0]
        where = (text.data, text.sampling.domains, here if number > 1 else setting.folder, setting.stop, setting.ranks)
        own = selected(recipe, folder, *where)
        plan = own if plan is None else compose(plan, own)
        before = out / f"step-{number - 1:02d}" if number > 1 else None
        steps.append(_one_step(replace(setting, source=folder), recipe, own, here, source, before, weights))
        if recipe.pruning_stage is not None and recipe.pruning_stage.reweight is not None:
            weights = _last_weights(setting, here) or weights
        folder = open_folder(here / "model", f"step {number} of {setting.source.name}")
        say(f"pruning, step {number} of {len(recipes)}: {_shape_words(folder)}")
    assert plan is not None
    setting.ranks.on_main(lambda: _bring_up(out / f"step-{len(recipes):02d}" / "model", out / "model"))
    costs = {key: sum(step[key] for step in steps) for key in _NOTHING}
    return _record(setting, out, plan, costs) | {"pruning_steps": steps, "weights": weights}


def _last_weights(setting: Setting, folder: Path) -> dict[str, float] | None:
    """Return the weights of the domains that a stretch of training ended with; None where they did not move.

    Its metrics have them, of which a stop after the last checkpoint takes nothing.
    """
    start, end = "reweight/", "/weight"

    def read() -> dict[str, float] | None:
        found: dict[str, float] = {}
        for line in read_jsonl(folder / "metrics.jsonl"):
            moved = [key for key in line if key.startswith(start) and key.endswith(end)]
            found |= {key.removeprefix(start).removesuffix(end): line[key] for key in moved}
        return found or None

    return setting.ranks.on_main(read)


def with_weights(inputs: StageInputs, weights: Mapping[str, float] | None) -> StageInputs:
    """Return a stage that begins with the weights of domains that one before it ended with, where these moved.

    Its own stay what moving weights are led back to, so that bounds hold over all stretches together.
    """
    if weights is None:
        return inputs
    prior = inputs.sampling.mixture.shares
    moved = replace(inputs.sampling, mixture=Mixture(moved_shares(prior, weights)))
    return replace(inputs, sampling=moved, prior=prior)


def moved_shares(shares: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return shares of domains of which some get weights that moved before: what these have between them they keep."""
    known = [name for name in shares if name in weights]
    old, new = (sum(some[name] for name in known) for some in (shares, weights))
    return {name: weights[name] * old / new if name in known and new else share for name, share in shares.items()}


def _one_step(
    setting: Setting,
    recipe: Recipe,
    plan: SurgeryPlan,
    out: Path,
    source: Record,
    before: Path | None,
    weights: Mapping[str, float] | None,
) -> Record:
    """Cut a model and, where there is a budget, train what is left into `out`/model; return what it cost."""
    if recipe.pruning_stage is not None:
        alone = _stretch(setting, pruning_recipe(recipe), out, plan)
        alone = replace(alone, stages=[with_weights(one, weights) for one in alone.stages])
        exported = alone.recipe.export.model_copy(update={"dtype": "float32"})
        alone = replace(alone, recipe=alone.recipe.model_copy(update={"export": exported}))
        begin = behind(before) if before is not None else None
        training = train_one(alone, out, source, "child", begin=begin)["training"]
        shape = _shape_of(setting, plan)
        return {key: training[key] for key in _NOTHING} | {"shape": shape}

    def cut() -> Record:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "model").exists():
            remove_leftovers(out, "model.")
            with open_surgery([setting.source], plan) as surgery:
                small = surgery.build(torch.float32)
                proof = surgery.prove(small)
            provenance = {
                "plan": plan.to_dict(),
                "origins": plan_origins([setting.source], plan),
                "checks": proof.checks,
            }
            with staged_folder(out / "model") as stage:
                save_model(small, stage, setting.source, plan, "", provenance, torch.float32)
        return _NOTHING | {"shape": _shape_of(setting, plan)}

    return setting.ranks.on_main(cut)


def _stretch(setting: Setting, recipe: Recipe, out: Path, plan: SurgeryPlan) -> Setting:
    """Return the setting of a stretch of training before the recovery."""
    (stage,) = recipe.resolved_stages
    first = setting.stages[0]
    data = first.data if stage.data.dir == first.stage.data.dir else DataFolder(Path(str(stage.data.dir)))
    stages = [StageInputs(stage, data, sampling_of(stage, data, recipe.seed, out), hands_on=True)]
    teacher = setting.teacher if recipe.has_teacher else None
    layers = match_layers(recipe, setting.source, teacher, plan)
    return replace(setting, recipe=recipe, stages=stages, plan=plan, teacher=teacher, taught_layers=layers)


def _load_source(setting: Setting) -> PreTrainedModel:
    """Return the source in float32; on other ranks than the main one without its weights."""
    if setting.ranks.is_main:
        return load_hf_model(setting.source, torch.float32)
    return assemble(setting.source.config, {}, torch.float32)


def _record(setting: Setting, out: Path, plan: SurgeryPlan, costs: Record) -> Record:
    """Return what is written down of what is left: how it was chosen, its losses before the recovery, its cost."""
    exported = open_model(setting, open_folder(out / "model"), torch.float32)
    domains = losses_of(setting, model_token_nll(exported), "evaluating what is left")
    release(exported)
    prune = setting.recipe.prune
    assert prune is not None
    return {
        "method": prune.method,
        "fidelity": setting.recipe.fidelity,
        "settings": prune.gate_settings(setting.recipe.fidelity) if prune.method == "masks" else None,  # pyright: ignore[reportArgumentType]
        "plan": plan.to_dict(),
        "shape": _shape_of(setting, plan),
        "domains": domains,
        "training": {key: costs[key] for key in _NOTHING},
    }


def _shape_of(setting: Setting, plan: SurgeryPlan) -> Record:
    config = target_config([setting.source.config], plan)
    return {"num_parameters": count_parameters(config)["total"]} | ModelShape.of(config).to_dict()


def _shape_words(folder: ModelFolder) -> str:
    shape = ModelShape.of(folder.config)
    return (
        f"{shape.num_hidden_layers} layers, hidden_size {shape.hidden_size}, intermediate_size "
        f"{shape.intermediate_size}, heads {shape.num_attention_heads}/{shape.num_key_value_heads}"
    )


def _bring_up(made: Path, to: Path) -> None:
    """Put the last step's model where what is left is looked for."""
    remove_leftovers(to.parent, f"{to.name}.")
    if not to.exists():
        with staged_folder(to) as stage:
            shutil.copytree(made, stage, dirs_exist_ok=True)
