"""Learning-rate schedules: pure functions of the step, without torch."""

from scionlm.schedules.build import Cooldown, Decay, Name, Sizes, build_schedule, curve, describe
from scionlm.schedules.pieces import Piece, Schedule

__all__ = ["Cooldown", "Decay", "Name", "Piece", "Schedule", "Sizes", "build_schedule", "curve", "describe"]
