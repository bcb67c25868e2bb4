"""The child of one round of growth: which layers it has, what they begin with, and what was trained of them before."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.files import remove_leftovers, staged_folder
from scionlm.core.log import say
from scionlm.core.records import Record
from scionlm.families import family_of
from scionlm.families.models import assemble
from scionlm.families.shape import expected_tensors
from scionlm.recipes.beginning import Beginning, growing
from scionlm.recipes.child import make_model
from scionlm.recipes.config_grow import GrowConfig
from scionlm.recipes.inputs import match_layers
from scionlm.recipes.rounds import STUDENT, chooses_anew, growth_of, in_terms_of_source
from scionlm.recipes.selection import selected
from scionlm.recipes.setting import Setting, trained_in
from scionlm.recipes.training import average_in
from scionlm.sources import ModelFolder, open_folder
from scionlm.sources.folder import read_json_object
from scionlm.surgery.export import save_model
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config
from scionlm.train.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Grown:
    """The child of a round.

    Attributes:
        setting: The run, with the layers of this child in terms of the source.
        folder: The round's.
        before: The round before.
        growth: How its layers come out of the trained child before it; None where it begins with the source's alone.
    """

    setting: Setting
    folder: Path
    before: "Grown | None" = None
    growth: SurgeryPlan | None = None

    def make_model(self, setting: Setting) -> PreTrainedModel:
        """Return the child with its first weights, in float32, proven where they are inherited."""
        if self.growth is None:
            return make_model(setting)
        if not setting.ranks.is_main:
            return assemble(target_config([setting.source.config], setting.plan), {}, torch.float32)
        folders = [self._student(), setting.source][: len(self.growth.donors)]
        with open_surgery(folders, self.growth) as surgery:
            child = surgery.build(torch.float32)
            proof = surgery.prove(child)
        say(f"grown to {len(self.growth.layers)} layers; {len(proof.checks)} proofs hold")
        return child

    @property
    def begin(self) -> Beginning | None:
        """What it goes on with beside weights; None where it begins anew."""
        if self.growth is None or self.before is None:
            return None
        return growing(self.before.folder, self._trained_names(), _grow(self.setting).optimizer_state == "keep")

    def _trained_names(self) -> dict[str, str]:
        """Return each weight that was trained before, by its name here; copies of a layer begin without a past."""
        assert self.growth is not None
        config = target_config([self.setting.source.config], self.setting.plan)
        family, first = family_of(config), dict[int, int]()
        for place, layer in enumerate(self.growth.layers):
            if layer.donor == 0 and layer.init == "source":
                first.setdefault(layer.index, place)
        old = {place: index for index, place in first.items()}
        names: dict[str, str] = {}
        for tensor in expected_tensors(config):
            if tensor.layer is None:
                names[tensor.name] = tensor.name
            elif tensor.layer in old:
                here, there = (f"{family.layers}.{index}." for index in (tensor.layer, old[tensor.layer]))
                names[tensor.name] = there + tensor.name.removeprefix(here)
        return names

    def _student(self) -> ModelFolder:
        """Return the trained child before this one as it was trained, not as it was rounded for its export."""
        assert self.before is not None
        path = self.folder / STUDENT
        if not path.exists():
            checkpoint = find_checkpoint(self.before.folder)
            config = read_json_object(self.before.folder / "model" / "config.json")
            # What was measured, and is handed out, is the average where one is kept: that is what grows.
            weights = average_in(self.setting.recipe, checkpoint) or checkpoint.tensors("weights")
            model = assemble(config, weights, torch.float32)
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, f"{STUDENT}.")
            with staged_folder(path) as stage:
                made = {"round": self.before.folder.name}
                save_model(model, stage, self.setting.source, self.setting.plan, "", made, torch.float32)
        return open_folder(path, STUDENT)

    def tidy(self) -> None:
        """Take away what only the beginning of the round needed."""
        shutil.rmtree(self.folder / STUDENT, ignore_errors=True)

    def describe(self) -> list[Record]:
        """Return where each layer comes from: a layer of the source, or fresh; and whether it was trained before."""
        plan, found = self.setting.plan, list[Record]()
        random = self.setting.recipe.from_random
        for place, layer in enumerate(plan.layers):
            entry: dict[str, Any] = {"init": "random" if random and layer.init == "source" else layer.init}
            if entry["init"] == "source":
                entry["source_layer"] = layer.index
            if self.growth is not None:
                mine = self.growth.layers[place]
                if mine.donor == 0 and mine.init == "source":
                    entry["student_layer"] = mine.index
            found.append(entry)
        return found


def _grow(setting: Setting) -> GrowConfig:
    assert setting.recipe.grow is not None
    return setting.recipe.grow


def first_round(setting: Setting, folder: Path) -> Grown:
    """Return the first round's child: what the recipe inherits."""
    return Grown(trained_in(setting, folder), folder)


def next_round(before: Grown, layers: int, folder: Path) -> Grown:
    """Return the child of the round after `before`.

    Args:
        before: The round before.
        layers: How many layers it is to have.
        folder: The round's.

    Raises:
        UsageError: It cannot be grown in the way asked for.
    """
    setting, grow = before.setting, _grow(before.setting)
    if grow.base == "student":
        growth = growth_of(setting.recipe, setting.plan, layers, setting.source.name)
        plan = in_terms_of_source(setting.plan, growth)
        return Grown(_with_plan(setting, plan, folder), folder, before, growth)
    base = before
    while base.before is not None:
        base = base.before
    return Grown(_with_plan(setting, deeper(setting, base.setting.plan, layers), folder), folder, before)


def deeper(setting: Setting, first: SurgeryPlan, layers: int) -> SurgeryPlan:
    """Return the plan of a child with more layers that begins with the source's alone.

    Args:
        setting: The run.
        first: The first round's plan.
        layers: How many it is to have.
    """
    inherit = setting.recipe.inherits
    if chooses_anew(setting.recipe):
        more = setting.recipe.model_copy(update={"inherit": inherit.model_copy(update={"layers": layers})})
        text = setting.stages[0]
        where = setting.folder, setting.stop, setting.ranks
        return selected(more, setting.source, text.data, text.sampling.domains, *where)
    return in_terms_of_source(first, growth_of(setting.recipe, first, layers, setting.source.name))


def _with_plan(setting: Setting, plan: SurgeryPlan, folder: Path) -> Setting:
    layers = match_layers(setting.recipe, setting.source, setting.teacher, plan)
    return trained_in(replace(setting, plan=plan, taught_layers=layers), folder)
