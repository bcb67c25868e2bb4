"""Training from scratch: a model of a given shape, from its family's own random weights."""

from pathlib import Path

from scionlm.core.records import Record
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.child import NO_SOURCE, train_one
from scionlm.recipes.inputs import Inputs
from scionlm.recipes.setting import settle


def run_scratch(
    inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False
) -> Record:
    """Run the recipe into `out`; each finished phase is kept, so that the same call goes on after a stop."""
    setting = settle(inputs, out, stop, ranks, allow_change)
    return train_one(setting, out, NO_SOURCE, name="model")
