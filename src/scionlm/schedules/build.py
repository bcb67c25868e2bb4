"""The named schedules, built from whole numbers of updates."""

import math
from dataclasses import dataclass
from typing import Literal

from scionlm.schedules.pieces import Piece, Schedule, Shape

Decay = Literal["linear", "cosine", "one_minus_sqrt", "exponential"]
Cooldown = Literal["cosine", "inverse_sqrt"]
Name = Literal[
    "constant",
    "linear",
    "cosine",
    "one_minus_sqrt",
    "exponential",
    "inverse_sqrt",
    "wsd",
    "infinite",
    "neox_cosine",
]


@dataclass(frozen=True)
class Sizes:
    """What a schedule is built from, in updates and multiplicands of the peak.

    Attributes:
        total: Updates in all.
        warmup: Of these, the linear rise.
        first: Multiplier that the rise starts from.
        floor: Multiplier at the end.
        decay: Updates of the last decay, for wsd and infinite.
        decay_shape: Its curve.
        half_life: Updates in which an exponential decay halves; 0 lets it arrive at `floor`.
        cooldown: Updates of infinite's way from the peak to its constant phase.
        cooldown_shape: Its curve.
        constant: Multiplier of that phase.
        timescale: Constant of the inverse square root.
    """

    total: int
    warmup: int = 0
    first: float = 0.0
    floor: float = 0.1
    decay: int = 0
    decay_shape: Decay = "linear"
    half_life: int = 0
    cooldown: int = 0
    cooldown_shape: Cooldown = "cosine"
    constant: float = 0.5
    timescale: float = 0.0


def build_schedule(name: Name, sizes: Sizes) -> Schedule:
    """Return a named schedule.

    Raises:
        ValueError: Its parts do not fit into its length, or a value makes no sense for it.
    """
    rest = sizes.total - sizes.warmup
    pieces = [Piece("warmup", "linear", sizes.warmup, sizes.first, 1.0)]
    match name:
        case "constant":
            pieces.append(Piece("constant", "constant", rest, 1.0, 1.0))
        case "linear" | "cosine" | "one_minus_sqrt" | "exponential":
            pieces.append(_decay(name, rest, 1.0, sizes))
        case "inverse_sqrt":
            scale = sizes.timescale or max(sizes.warmup, 1)
            pieces.append(Piece("decay", "decaying_sqrt", rest, 1.0, sizes.floor, scale))
        case "wsd":
            pieces.append(Piece("constant", "constant", rest - sizes.decay, 1.0, 1.0))
            pieces.append(_decay(sizes.decay_shape, sizes.decay, 1.0, sizes))
        case "infinite":
            scale = sizes.timescale if sizes.cooldown_shape == "inverse_sqrt" else 0.0
            level = sizes.constant
            if not sizes.cooldown:  # a branch that begins in the constant phase: no way down from a peak
                pieces = [Piece("warmup", "linear", sizes.warmup, sizes.first, level)]
            pieces += [
                Piece("cooldown", sizes.cooldown_shape, sizes.cooldown, 1.0, level, scale),
                Piece("constant", "constant", rest - sizes.cooldown - sizes.decay, level, level),
                _decay(sizes.decay_shape, sizes.decay, level, sizes),
            ]
        case "neox_cosine":
            # GPT-NeoX before August 2023, which Pythia and the first re-warming study were trained with: the floor is a
            # clamp and not where the curve ends, and the last `warmup` updates stand still.
            pieces.append(Piece("decay", "neox_cosine", rest, 1.0, sizes.floor, sizes.warmup))
    for piece in pieces:
        if piece.steps < 0:
            raise ValueError(
                f"its parts are longer than its {sizes.total} steps (warmup {sizes.warmup}, cooldown {sizes.cooldown}, "
                f"decay {sizes.decay})"
            )
    return Schedule(tuple(piece for piece in pieces if piece.steps) or (Piece("constant", "constant", 1, 1.0, 1.0),))


def _decay(shape: Decay, steps: int, start: float, sizes: Sizes) -> Piece:
    if shape == "exponential" and sizes.half_life:
        return Piece("decay", "half_life", steps, start, start * 0.5 ** (steps / sizes.half_life), sizes.half_life)
    if shape == "exponential" and sizes.floor <= 0:
        raise ValueError("an exponential decay never arrives at 0; set min_lr_ratio above 0, or half_life")
    curve: Shape = shape
    return Piece("decay", curve, steps, start, sizes.floor)


def describe(schedule: Schedule, lr: float) -> str:
    """Return a schedule in words, for messages and tables."""
    parts = [f"{piece.name} {piece.steps:,} steps to {piece.at(piece.steps) * lr:.3g}" for piece in schedule.pieces]
    whole = ", ".join(parts)
    if schedule.steps is None:
        return whole
    ends = [f"{schedule.at(t) * lr:.3g}" for t in (0, schedule.steps)]
    return f"{schedule.steps:,} steps from {ends[0]} to {ends[1]}, a stretch of: {whole}"


def curve(schedule: Schedule, points: int) -> list[tuple[int, float]]:
    """Return up to `points` pairs of update number and multiplier, evenly spread, first and last among them."""
    total = schedule.total_steps
    count = max(min(points, total), 1)
    if count == 1:
        return [(1, schedule.at(1))]
    times = [1 + math.floor(k * (total - 1) / (count - 1)) for k in range(count)]
    return [(t, schedule.at(t)) for t in times]
