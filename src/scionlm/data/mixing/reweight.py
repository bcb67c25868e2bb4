"""Weights that move by what training measures: from each domain's loss and a reference to its next weight.

Every rule is a pure function `(losses, references, weights, prior) -> weights` over the same domains; losses and
references in nats, weights summing to one. The sample plan rounds and carries what a rule gives; see `SamplePlan`.

Source: dynamic batch loading of LLM-Shearing (Xia et al., arXiv:2310.06694, Algorithm 1), and DoReMi (Xie et al.,
arXiv:2305.10429, Algorithm 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scionlm.core.errors import DataError
from scionlm.data.mixing.mixture import Weights

RuleName = Literal["bounded", "paper", "code", "doremi", "proportional"]
Losses = dict[str, float]


@dataclass(frozen=True)
class RuleSettings:
    """Constants of the rules.

    Attributes:
        step_size: How strongly an excess loss of one nat moves the logarithm of a weight at one update.
        smoothing: Share of equal weights that is mixed in (`code`, `doremi`, `proportional`); None is the rule's own.
        pull: Share of the way back to the prior, in logarithms, at one update (`bounded`).
        max_step: Largest move of a weight's logarithm at one update before normalization (`bounded`).
        max_ratio: How far a weight may be from its prior, as a factor either way (`bounded`).
    """

    step_size: float = 1.0
    smoothing: float | None = None
    pull: float = 0.1
    max_step: float = 0.3
    max_ratio: float = 4.0


Rule = Callable[[Losses, Losses, Weights, Weights, RuleSettings], Weights]


def reweight(
    rule: RuleName, losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings
) -> Weights:
    """Return the next weights.

    Args:
        rule: Which rule.
        losses: Held-out loss of each domain now.
        references: What each is compared with.
        weights: The weights now.
        prior: The weights that the recipe gives.
        settings: Constants.

    Raises:
        DataError: A loss or reference is missing or not finite.
    """
    for name in weights:
        for what, values in (("loss", losses), ("reference", references)):
            if not math.isfinite(values.get(name, math.nan)):
                raise DataError(f"domain {name!r} has no finite {what} ({values.get(name)}) to reweight by")
    return RULES[rule](losses, references, normalized(weights), normalized(prior), settings)


def normalized(weights: Weights) -> Weights:
    """Return weights that sum to one."""
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _times_exp(weights: Weights, exponents: dict[str, float]) -> Weights:
    """Return `weights * exp(exponents)`, normalized; the largest exponent is taken out first, so nothing overflows."""
    largest = max(exponents[name] for name, weight in weights.items() if weight > 0)
    return normalized({
        name: weight * math.exp(exponents[name] - largest) if weight > 0 else 0.0 for name, weight in weights.items()
    })  # fmt: skip


def _smoothed(weights: Weights, share: float | None, default: float) -> Weights:
    share = default if share is None else share
    return {name: (1 - share) * weight + share / len(weights) for name, weight in weights.items()}


def paper(losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings) -> Weights:
    """LLM-Shearing as published: a domain gains by what it is above its reference, and never below it."""
    excess = {name: settings.step_size * max(losses[name] - references[name], 0.0) for name in weights}
    return _times_exp(weights, excess)


def code(losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings) -> Weights:
    """LLM-Shearing as released: the difference is not clipped, and a little of equal weights is mixed in."""
    difference = {name: settings.step_size * (losses[name] - references[name]) for name in weights}
    return normalized(_smoothed(_times_exp(weights, difference), settings.smoothing, 1e-4))


def doremi(losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings) -> Weights:
    """DoReMi's update: excess loss clipped at zero, then smoothing.

    Differs: the excess is that of held-out text by domain, not of each token of the batch, and the weights act on the
    run itself, not on a proxy.
    """
    return normalized(_smoothed(paper(losses, references, weights, prior, settings), settings.smoothing, 1e-3))


def proportional(
    losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings
) -> Weights:
    """Prior times relative excess loss: no memory, so nothing accumulates; the prior where nothing is in excess."""
    excess = {name: max(losses[name] / references[name] - 1, 0.0) for name in weights}
    if not any(excess[name] * prior[name] > 0 for name in prior):
        return prior
    return normalized(_smoothed(normalized({n: prior[n] * excess[n] for n in prior}), settings.smoothing, 1e-4))


def bounded(losses: Losses, references: Losses, weights: Weights, prior: Weights, settings: RuleSettings) -> Weights:
    """Scion's own: the paper's rule that cannot run away.

    Differs from `paper`: an excess moves the logarithm of a weight by at most `max_step` an update, measured from the
    mean excess, since only differences matter; each update leads `pull` of the way back to the prior, so that a
    constant excess ends at a finite weight instead of at one; and no weight leaves `max_ratio` times or one part in
    `max_ratio` of its prior.
    """
    excess = {name: max(losses[name] - references[name], 0.0) for name in weights}
    mean = math.fsum(weights[name] * excess[name] for name in weights)
    limit = settings.max_step
    move = {name: min(max(settings.step_size * (excess[name] - mean), -limit), limit) for name in weights}
    back = {
        name: settings.pull * math.log(prior[name] / weight) if weight > 0 and prior[name] > 0 else 0.0
        for name, weight in weights.items()
    }
    moved = _times_exp(weights, {name: move[name] + back[name] for name in weights})
    low = {name: share / settings.max_ratio for name, share in prior.items()}
    high = {name: min(share * settings.max_ratio, 1.0) for name, share in prior.items()}
    return _within(moved, low, high)


def _within(weights: Weights, low: Weights, high: Weights) -> Weights:
    """Return weights between bounds that sum to one and keep the proportions of those that no bound holds."""
    scale_low, scale_high = 0.0, 1.0

    def clipped(scale: float) -> Weights:
        return {name: min(max(scale * weight, low[name]), high[name]) for name, weight in weights.items()}

    while math.fsum(clipped(scale_high).values()) < 1 and scale_high < 2**64:
        scale_high *= 2
    for _ in range(200):  # the sum rises with the scale: halve until floating point has no more to give
        middle = (scale_low + scale_high) / 2
        if middle in (scale_low, scale_high):
            break
        if math.fsum(clipped(middle).values()) < 1:
            scale_low = middle
        else:
            scale_high = middle
    return normalized(clipped(scale_high))


RULES: dict[RuleName, Rule] = {
    "bounded": bounded,
    "paper": paper,
    "code": code,
    "doremi": doremi,
    "proportional": proportional,
}
