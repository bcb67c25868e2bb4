"""Training: one loop that reads from top to bottom, one step, one objective, checkpoints complete or absent."""

from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.loop import LoopConfig, fit
from scionlm.train.objective import Objective
from scionlm.train.optimizer import OptimizerConfig, build_optimizer

__all__ = ["CheckpointStore", "LoopConfig", "Objective", "OptimizerConfig", "build_optimizer", "fit"]
