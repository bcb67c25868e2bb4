"""What comes after a round of growth: another, deeper one, or the end. A pure function of what rounds have shown.

Source: Sanyal et al., arXiv:2404.08634, algorithm 1, lines 5 to 8.
Differs: It ends with a reason also where the reference cannot be matched; the paper's loop would not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shown:
    """What a finished round has shown.

    Attributes:
        layers: Of its child.
        tokens: That it was trained on.
        difference: The child's held-out loss less the reference's, nats.
        upper: Upper end of the confidence interval of the difference; None where there is none.
    """

    layers: int
    tokens: int
    difference: float
    upper: float | None


@dataclass(frozen=True)
class Rule:
    """When to grow, and when to stop.

    Attributes:
        first: Layers of the first round.
        by: Layers that each further round adds.
        most: Most layers: the last round has as many, also where the step would lead beyond.
        round_tokens: Tokens of one round; 0 while its length is a time that has not been measured yet.
        most_rounds: Most rounds; None has no limit.
        most_tokens: Most tokens over all rounds; None has no limit.
        until: `matched` stops with the first match, `end` does not.
        tolerance: How far above the reference is a match, nats.
        criterion: What has to be within the tolerance, `mean` or `upper`.
    """

    first: int
    by: int
    most: int
    round_tokens: int
    most_rounds: int | None = None
    most_tokens: int | None = None
    until: Literal["matched", "end"] = "matched"
    tolerance: float = 0.0
    criterion: Literal["mean", "upper"] = "mean"

    def matches(self, shown: Shown) -> bool:
        """Return whether a round has matched the reference."""
        value = shown.difference if self.criterion == "mean" else shown.upper
        return value is not None and value <= self.tolerance

    @property
    def layers(self) -> list[int]:
        """The layers of each round that there may be, as far as limits say."""
        found = [*range(self.first, self.most, self.by), self.most] if self.first < self.most else [self.first]
        rounds = len(found) if self.most_rounds is None else self.most_rounds
        if self.most_tokens is not None and self.round_tokens:
            rounds = min(rounds, self.most_tokens // self.round_tokens)
        return found[:rounds]


@dataclass(frozen=True)
class Move:
    """What to do next.

    Attributes:
        layers: Of the next round; None where there is none.
        matched: Whether the reference is matched.
        why: In words.
    """

    layers: int | None
    matched: bool
    why: str


def next_move(rule: Rule, rounds: Sequence[Shown]) -> Move:
    """Return what comes after these rounds."""
    planned = rule.layers
    matched = bool(rounds) and rule.matches(rounds[-1])
    if matched and rule.until == "matched":
        return Move(None, True, f"the reference is matched with {rounds[-1].layers} layers")
    if len(rounds) < len(planned):
        layers = planned[len(rounds)]
        return Move(layers, matched, f"grow to {layers} layers" if rounds else f"begin with {layers} layers")
    ending = "matched" if matched else "not matched"
    return Move(None, matched, f"the reference is {ending}: {_limit(rule, rounds)}")


def _limit(rule: Rule, rounds: Sequence[Shown]) -> str:
    """Return which limit has been reached."""
    if rounds and rounds[-1].layers >= rule.most:
        return f"all {rule.most} layers are in use"
    if rule.most_tokens is not None and (len(rounds) + 1) * rule.round_tokens > rule.most_tokens:
        return f"another round would go beyond {rule.most_tokens:,} tokens"
    return f"{len(rounds)} rounds were allowed"


def best_round(rule: Rule, rounds: Sequence[Shown]) -> int:
    """Return the number of the round, from 0, whose child is the result: the match, else the lowest loss.

    Where rounds go to the end whatever they show, it is the last.
    """
    if rule.until == "end" or rule.matches(rounds[-1]):
        return len(rounds) - 1
    return min(range(len(rounds)), key=lambda number: (rounds[number].difference, number))
