"""Learned masks of a run: opened by its recipe, and at the end cut out of the source, proven, and written down."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.duration import Duration
from scionlm.core.files import staged_folder
from scionlm.core.log import say
from scionlm.core.records import Record, write_json
from scionlm.families import ModelShape
from scionlm.families.shape import context_length
from scionlm.recipes.config import Recipe
from scionlm.recipes.masks_plan import plan_of_masks
from scionlm.recipes.measured import MASKS
from scionlm.recipes.selection import importance_scores
from scionlm.recipes.setting import Setting
from scionlm.surgery.export import save_model
from scionlm.surgery.indices import format_indices
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.proof import Proof
from scionlm.surgery.surgery import surgery_of
from scionlm.surgery.target import target_config
from scionlm.surgery.verify import random_tokens, tolerance, verify_export
from scionlm.surgery.width import Scores
from scionlm.train.gates.axes import Axis, axes_of
from scionlm.train.gates.constraint import ConstraintSettings
from scionlm.train.gates.fold import fold_gates
from scionlm.train.gates.gates import Gates, start_from_scores
from scionlm.train.gates.masks import Masks, Values
from scionlm.train.gates.pruner import Pruner, PruneSettings, axis_facts

RECORD = "masks.json"
"""In RUN/prune: what the masks came to."""


@dataclass(frozen=True)
class Pruning:
    """The masks of a recipe.

    Attributes:
        recipe: Of the whole run: it says how they are learned.
        plan: What stands in for the result: its shape is the target's.
        folder: The run folder, where importance scores are kept.
    """

    recipe: Recipe
    plan: SurgeryPlan
    folder: Path

    @property
    def _how(self) -> Any:
        assert self.recipe.prune is not None
        return self.recipe.prune.gate_settings(self.recipe.fidelity)  # pyright: ignore[reportArgumentType]

    def opening(self, setting: Setting) -> Callable[[PreTrainedModel], Pruner]:
        """Return how gates are put on a model, after measuring what they begin by; all ranks have to ask.

        It is measured before the model is made: the source would lie in memory twice.

        Args:
            setting: Of the stretch of training in which masks are learned.

        Raises:
            DataError: A domain is too short, or the source is broken.
        """
        scores = self._scores(setting)
        return lambda model: self._open(setting, model, scores)

    def _scores(self, setting: Setting) -> Scores | None:
        """Return importance scores, measured by the main rank and read by all; None where gates begin open."""
        rule, text = self._how["start"], setting.stages[0]
        if rule == "open":
            return None
        where = text.data, text.sampling.domains, self.folder

        def measure() -> str:
            sha256 = setting.source.fingerprint()
            importance_scores(rule, setting.source, sha256, *where)
            return sha256

        sha256 = setting.ranks.on_main(measure)
        return setting.ranks.together(lambda: importance_scores(rule, setting.source, sha256, *where, measured=True))

    def _open(self, setting: Setting, model: PreTrainedModel, scores: Scores | None) -> Pruner:
        how = self._how
        source = setting.source
        shape = ModelShape.of(source.config)
        axes = axes_of(shape, ModelShape.of(target_config([source.config], self.plan)), how["depth"])
        steps = setting.recipe.total_steps
        batch = setting.recipe.total_tokens // steps
        finish = steps - Duration.parse(how["finish"]).in_steps(steps, batch)
        warmup = Duration.parse(how["warmup"]).in_steps(steps, batch)
        settings = PruneSettings(
            lr=how["lr"],
            multiplier_lr=how["multiplier_lr"],
            schedule=setting.stages[0].stage.build_schedule(),
            finish=finish,
            ascent=how["ascent"],
            sharpen=how["sharpen"],
            cap=how["cap"],
            constraint=ConstraintSettings(how["constraint"] == "calibrated", self.recipe.fidelity == "paper", warmup),
            by_code=self.recipe.fidelity != "recommended",
        )
        start = None if scores is None else _start(scores, how["spread"], axes)
        gates = Gates(axes, how["temperature"], setting.recipe.seed, setting.runtime.device, start)
        return Pruner(model, gates, settings)

    def export(self, setting: Setting, out: Path, model: PreTrainedModel, pruner: Pruner) -> None:
        """Cut what the last masks close, prove that nothing else changed, and write `out`/model and `out`/masks.json.

        Args:
            setting: Of the stretch of training in which the masks were learned.
            out: Its folder.
            model: What was trained, whole, in float32 and without gates.
            pruner: The masks.

        Raises:
            ScionError: The cut model is not the masked one.
        """
        source, gates = setting.source, pruner.gates
        kept = {name: rows.tolist() for name, rows in gates.kept().items()}
        plan = plan_of_masks(kept, ModelShape.of(source.config), source.name, MASKS)
        values = {name: value.detach().cpu() for name, value in pruner.last().items()}
        proof = Proof()
        tokens = _tokens(source.config)
        expected = _masked(model, values, tokens)
        fold_gates(model, values)
        surgery = surgery_of(model, source, plan)
        small = surgery.build(torch.float32)
        proof.checks += surgery.prove(small).checks
        worst = _distance(expected, small, tokens)
        bound = tolerance(source.config)
        proof.require(f"logits equal those of the masked source within {bound:g} of the largest", worst <= bound)
        provenance = {
            "source": {"name": source.name, "revision": source.revision},
            "plan": plan.to_dict(),
            "origins": plan_origins([source], plan),
            "init": "source",
            "checks": proof.checks,
        }
        with staged_folder(out / "model") as stage:
            save_model(small, stage, source, plan, "", provenance, torch.float32)
            verify_export(small, stage, proof, torch.float32)
            # The model's folder, once it is in place, says that all of this is done.
            write_json(out / RECORD, _record(pruner, plan, values, proof))
        say(f"pruned to {len(plan.layers)} layers; {len(proof.checks)} proofs hold")


def _start(scores: Scores, spread: float, axes: list[Axis]) -> dict[str, torch.Tensor]:
    """Return where gates begin: in the order of importance."""
    found: dict[str, torch.Tensor] = {}
    given = {name: torch.from_numpy(rows) for name, rows in scores.items()}
    for axis in axes:
        if axis.name in ("attention", "mlp") and "layers" in given:
            found[axis.name] = given["layers"]
        elif axis.name == "groups":
            found["groups"] = given["heads"].view(axis.rows, axis.units, -1).sum(-1)
        elif axis.name in given:
            found[axis.name] = given[axis.name]
    return start_from_scores(axes, found, spread)


def _record(pruner: Pruner, plan: SurgeryPlan, values: Values, proof: Proof) -> Record:
    gates, listed = pruner.gates, list[Record]()
    for axis in gates.axes:
        rows = gates.kept()[axis.name].tolist()
        soft = values[axis.name]
        listed.append({
            "name": axis.name,
            "rows": axis.rows,
            "units": axis.units,
            "target": axis.target,
            "kept": [format_indices([i for i, stays in enumerate(row) if stays]) for row in rows],
            **axis_facts(gates, axis, pruner.settings),
            "folded": bool(((soft != 0) & (soft != 1)).any()),
        })  # fmt: skip
    return {"axes": listed, "plan": plan.to_dict(), "checks": proof.checks}


def _tokens(config: Record) -> torch.Tensor:
    longest = context_length(config)
    tokens = random_tokens(ModelShape.of(config).vocab_size)
    return tokens if longest is None else tokens[:, :longest]


@torch.no_grad()
def _masked(model: PreTrainedModel, values: Values, tokens: torch.Tensor) -> torch.Tensor:
    masks = Masks(model)
    try:
        masks.set(values)
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        masks.remove()


@torch.no_grad()
def _distance(expected: torch.Tensor, model: PreTrainedModel, tokens: torch.Tensor) -> float:
    found = model(input_ids=tokens, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())
