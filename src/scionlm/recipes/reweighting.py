"""Moving the weights of domains while a run trains: measure, compare with references, set the plan's weights."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from scionlm.core.records import Record, read_jsonl
from scionlm.data import SamplePlan
from scionlm.data.mixing.reweight import Losses, RuleSettings, normalized, reweight
from scionlm.evaluation.loss import TokenNll, model_token_nll
from scionlm.parallel.placing import release
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.config_data import ReweightConfig
from scionlm.recipes.inputs import StageInputs
from scionlm.recipes.references import given_references
from scionlm.recipes.setting import Setting, losses_of, measured_once, open_model

EVALUATION_S = "time/evaluation_s"
"""Metric: what a held-out measurement cost."""


class Reweighter:
    """Sets the weights of a plan by the rule of a recipe; all ranks take those that the main one finds.

    Args:
        config: The recipe's section.
        every: Steps between two updates.
        plan: Whose weights move, from those that it has.
        sequences_per_step: How many slots a step has.
        references: What losses are compared with; None takes the best so far.
        prior: The weights that they are led back to.
        measure: Returns the held-out loss of each domain.
        ranks: The processes of the run.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.every, self._ranks = every, ranks
        self._config, self._plan, self._measure = config, plan, measure
        self._slots = every * sequences_per_step
        self._references = references
        self._weights, self._prior = normalized(plan.shares), normalized(prior)
        self._best: Losses = {}
        names = RuleSettings.__dataclass_fields__
        self._settings = RuleSettings(**{name: getattr(config, name) for name in names})
        if plan.slot == 0:  # from the start in whole sequences of a period, so that each ends even
            plan.set_weights(self._weights, self._slots)

    def update(self) -> Record:
        """Measure, move the weights from the next slot on, and return what goes to the metrics."""
        started = time.monotonic()
        losses = self._ranks.share(self._measure())
        self._best = {name: min(loss, self._best.get(name, loss)) for name, loss in losses.items()}
        references = self._references or self._best
        before, prior = self._weights, self._prior
        self._weights = self._ranks.on_main(
            lambda: reweight(self._config.rule, losses, references, before, prior, self._settings)
        )
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
        start: The weights that the stage begins with.
        first_step: Steps before the plan's first.
        ranks: The processes of the run; the main one reads.
    """

    def __init__(
        self,
        metrics: Path,
        every: int,
        plan: SamplePlan,
        sequences_per_step: int,
        start: Losses,
        first_step: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.every = every
        self._plan, self._sequences, self._slots = plan, sequences_per_step, every * sequences_per_step
        self._first_step = first_step
        weight = {name: f"reweight/{name}/weight" for name in start}

        def read() -> list[tuple[int, Losses]]:
            lines = [line for line in read_jsonl(metrics) if all(key in line for key in weight.values())]
            return [(line["step"], {name: line[key] for name, key in weight.items()}) for line in lines]

        self._weights = dict(ranks.on_main(read))
        if plan.slot == 0:
            plan.set_weights(normalized(start), self._slots)

    def update(self) -> Record:
        """Set the weights that the other run had from here on."""
        weights = self._weights[self._first_step + self._plan.slot // self._sequences]
        self._plan.set_weights(weights, self._slots)
        return {f"reweight/{name}/weight": weight for name, weight in weights.items()}

    def state(self) -> Record:
        """Nothing: the other run remembers."""
        return {}

    def restore(self, state: Record) -> None:
        """Go on."""


def open_reweighting(
    setting: Setting, inputs: StageInputs, plan: SamplePlan, token_nll: TokenNll, name: str, first_step: int
) -> Reweighter | Follower | None:
    """Return what moves the weights of a stage; None where they stay.

    Args:
        setting: The run.
        inputs: The stage.
        plan: Its samples.
        token_nll: The model.
        name: Of the model, for progress bars.
        first_step: Steps before the stage.

    Raises:
        DataError: A reference is missing.
    """
    stage, config = inputs.stage, inputs.stage.reweight
    if config is None:
        return None
    start = inputs.sampling.mixture.shares
    every = max(stage.steps(config.every), 1)
    sequences = stage.sequences_per_step
    if setting.followed is not None:
        return Follower(setting.followed / "metrics.jsonl", every, plan, sequences, start, first_step, setting.ranks)
    budget = config.tokens_per_domain
    names = _evaluated_names(setting, inputs)

    def measure() -> Losses:
        losses = losses_of(setting, token_nll, f"weighing the domains of {name}", budget, list(names.values()))
        return {domain: losses[named]["nll"] for domain, named in names.items()}

    references = _references(setting, inputs, config)
    prior = dict(inputs.prior or start)
    return Reweighter(config, every, plan, sequences, references, prior, measure, setting.ranks)


def _evaluated_names(setting: Setting, inputs: StageInputs) -> dict[str, str]:
    """Return the name of each of a stage's domains among what the run evaluates."""
    named = {(data.fingerprint, domain): name for name, (data, domain) in setting.held_out.items()}
    return {domain: named[inputs.data.fingerprint, domain] for domain in inputs.sampling.domains}


def _references(setting: Setting, inputs: StageInputs, config: ReweightConfig) -> Losses | None:
    if config.reference == "best":
        return None
    if config.reference == "source":
        losses = source_losses(setting, config.tokens_per_domain)
        return {domain: losses[name] for domain, name in _evaluated_names(setting, inputs).items()}
    return setting.ranks.on_main(lambda: given_references(config, inputs.sampling.domains))


def source_losses(setting: Setting, budget: int) -> Losses:
    """Return the source's own losses within a budget, measured once and kept in RUN/references.json."""
    same = budget == setting.recipe.evaluate.tokens_per_domain  # then it was measured when the run began
    path = setting.folder / ("source.json" if same else f"references-{budget}.json")

    def measure() -> Record:
        model = open_model(setting, setting.source, torch.float32)
        losses = losses_of(setting, model_token_nll(model), f"evaluating {setting.source.name}", budget)
        release(model)
        return {"of": setting.source.name, "domains": losses}

    record = setting.kept(path, lambda: measured_once(setting, path, budget, measure))
    return {name: loss["nll"] for name, loss in record["domains"].items()}
