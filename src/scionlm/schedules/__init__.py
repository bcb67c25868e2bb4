"""Learning-rate schedules: pure functions of the step, without torch."""

from scionlm.schedules.lr import Schedule

__all__ = ["Schedule"]
