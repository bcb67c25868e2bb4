"""Moving the weights of domains while a run trains: measure, compare with references, set the plan's weights."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from scionlm.core.records import Record, read_json, read_jsonl, write_json
from scionlm.data import SamplePlan
from scionlm.data.mixing.reweight import Losses, RuleSettings, normalized, reweight
from scionlm.evaluation.loss import TokenNll, model_token_nll
from scionlm.recipes.config_data import ReweightConfig
from scionlm.recipes.references import given_references
from scionlm.recipes.setting import Setting, losses_of, release
from scionlm.sources import load_hf_model

EVALUATION_S = "time/evaluation_s"
"""Metric: what a held-out measurement cost."""


class Reweighter:
    """Sets the weights of a plan by the rule of a recipe.

    Args:
        config: The recipe's section.
        every: Steps between two updates.
        plan: Whose weights move.
        sequences_per_step: How many slots a step has.
        references: What losses are compared with; None takes the best so far.
        prior: The weights that the run began with.
        measure: Returns the held-out loss of each domain.
    """

    def __init__(
        self,
        config: ReweightConfig,
        every: int,
        plan: SamplePlan,
        sequences_per_step: int,
        references: Losses | None,
        prior: Losses,
        measure: Callable[[], Losses],
    ) -> None:
        self.every = every
        self._config, self._plan, self._measure = config, plan, measure
        self._slots = every * sequences_per_step
        self._references = references
        self._prior = self._weights = normalized(prior)
        self._best: Losses = {}
        names = RuleSettings.__dataclass_fields__
        self._settings = RuleSettings(**{name: getattr(config, name) for name in names})
        if plan.slot == 0:  # from the start in whole sequences of a period, so that each ends even
            plan.set_weights(self._prior, self._slots)

    def update(self) -> Record:
        """Measure, move the weights from the next slot on, and return what goes to the metrics."""
        started = time.monotonic()
        losses = self._measure()
        self._best = {name: min(loss, self._best.get(name, loss)) for name, loss in losses.items()}
        references = self._references or self._best
        self._weights = reweight(self._config.rule, losses, references, self._weights, self._prior, self._settings)
        self._plan.set_weights(self._weights, self._slots)
        record = {EVALUATION_S: time.monotonic() - started}
        for name in losses:
            record[f"reweight/{name}/nll_nats"] = losses[name]
            record[f"reweight/{name}/reference_nats"] = references[name]
            record[f"reweight/{name}/weight"] = self._weights[name]
        return record

    def state(self) -> Record:
        """Return what is needed to go on."""
        return {"weights": self._weights, "best": self._best}

    def restore(self, state: Record) -> None:
        """Go on from a state."""
        self._weights, self._best = dict(state["weights"]), dict(state["best"])


class Follower:
    """Sets the weights that another run had at the same steps: a control sees the very batches of its child.

    Args:
        metrics: The other run's metrics.jsonl.
        every: Steps between two updates.
        plan: Whose weights move.
        sequences_per_step: How many slots a step has.
        prior: The weights that the run began with.
    """

    def __init__(self, metrics: Path, every: int, plan: SamplePlan, sequences_per_step: int, prior: Losses) -> None:
        self.every = every
        self._plan, self._sequences, self._slots = plan, sequences_per_step, every * sequences_per_step
        weight = {name: f"reweight/{name}/weight" for name in prior}
        lines = [line for line in read_jsonl(metrics) if all(key in line for key in weight.values())]
        self._weights = {line["step"]: {name: line[key] for name, key in weight.items()} for line in lines}
        if plan.slot == 0:
            plan.set_weights(normalized(prior), self._slots)

    def update(self) -> Record:
        """Set the weights that the other run had from here on."""
        weights = self._weights[self._plan.slot // self._sequences]
        self._plan.set_weights(weights, self._slots)
        return {f"reweight/{name}/weight": weight for name, weight in weights.items()}

    def state(self) -> Record:
        """Nothing: the other run remembers."""
        return {}

    def restore(self, state: Record) -> None:
        """Go on."""


def open_reweighting(
    setting: Setting, plan: SamplePlan, token_nll: TokenNll, name: str, out: Path
) -> Reweighter | Follower | None:
    """Return what moves the weights of a run; None where they stay.

    Raises:
        DataError: A reference is missing.
    """
    recipe, config = setting.recipe, setting.recipe.reweight
    if config is None:
        return None
    prior = setting.sampling.mixture.shares
    every = max(recipe.steps(config.every), 1)
    if out != setting.folder:
        return Follower(setting.folder / "metrics.jsonl", every, plan, recipe.sequences_per_step, prior)
    budget = config.tokens_per_domain

    def measure() -> Losses:
        losses = losses_of(setting, token_nll, f"weighing the domains of {name}", budget)
        return {domain: loss["nll"] for domain, loss in losses.items()}

    return Reweighter(config, every, plan, recipe.sequences_per_step, _references(setting, config), prior, measure)


def _references(setting: Setting, config: ReweightConfig) -> Losses | None:
    if config.reference == "best":
        return None
    if config.reference == "source":
        return source_losses(setting, config.tokens_per_domain)
    return given_references(config, setting.domains)


def source_losses(setting: Setting, budget: int) -> Losses:
    """Return the source's own losses within a budget, measured once and kept in RUN/references.json."""
    same = budget == setting.recipe.evaluate.tokens_per_domain  # then it was measured when the run began
    path = setting.folder / ("source.json" if same else "references.json")
    if not path.exists():
        model = load_hf_model(setting.source, torch.float32)
        losses = losses_of(setting, model_token_nll(model), f"evaluating {setting.source.name}", budget)
        release(model)
        write_json(path, {"of": setting.source.name, "domains": losses})
    return {name: loss["nll"] for name, loss in read_json(path)["domains"].items()}
