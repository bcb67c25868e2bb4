"""What learns, and where it is: all that a checkpoint holds, but for the order of the samples."""

from dataclasses import dataclass, field
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.parallel.runtime import random_state, reseed, restore_random_state
from scionlm.train.average import Average
from scionlm.train.checkpoint import Checkpoint
from scionlm.train.guard import Guard
from scionlm.train.objective import PROJECTIONS, Objective
from scionlm.train.optimizer import Carry, Optimizer
from scionlm.train.shards import InMemory, Tensors


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: Updates so far, over all stages.
        tokens: Predicted tokens so far.
        seconds: Time spent training, the teacher's included.
        teacher_seconds: Time that the teacher took of it.
        evaluation_owed: Whether an evaluation is due, or was cut short by a signal.
        reweight_owed: The same of the domains' weights.
        saving_seconds: Time spent saving.
        epochs: How often each domain has been gone through by the end of the last stage.
        cursors: How many samples of each domain earlier stages took, and in which order, by what they drew from.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    evaluation_owed: bool = True
    reweight_owed: bool = False
    saving_seconds: float = 0.0
    epochs: dict[str, float] = field(default_factory=dict)
    cursors: dict[str, Record] = field(default_factory=dict)

    def state(self) -> Record:
        """Return it as plain values."""
        return {**vars(self)}

    def restore(self, state: Record) -> None:
        """Go on from a checkpoint's state."""
        for name in vars(self):
            setattr(self, name, state.get(name, getattr(self, name)))


@dataclass
class Learner:
    """The weights with everything that changes as they learn.

    Attributes:
        objective: The module that is trained.
        optimizer: Of its weights.
        guard: What to do about updates that are not finite.
        average: Of the weights, where one is kept.
    """

    objective: Objective
    optimizer: Optimizer
    guard: Guard
    average: Average | None = None

    def change_optimizer(self, optimizer: Optimizer, carry: Carry) -> None:
        """Go on with another optimizer, which takes over the state of the one before as far as `carry` says."""
        optimizer.load(InMemory(self.optimizer.tensors()), carry)
        self.optimizer = optimizer

    def tensors(self) -> dict[str, Tensors]:
        """Return what a checkpoint holds in safetensors."""
        weights = dict(self.objective.model.named_parameters())
        average = self.average.tensors() if self.average else {}
        pruner = self.objective.pruner
        return {
            "weights": weights,
            "projections": self.objective.projections,
            "optimizer": self.optimizer.tensors(),
            "average": average,
            "gates": pruner.tensors() if pruner else {},
        }

    def state(self) -> Record:
        """Return what a checkpoint holds beside them."""
        averaged = {"average_count": self.average.count} if self.average else {}
        ranks = self.objective.trained.ranks
        random: Record = {"random": random_state()}
        if ranks.world > 1:
            random = {"random_by_rank": ranks.gather(random["random"])}
        return averaged | {"guard": self.guard.state()} | random

    def begin_with(self, checkpoint: Checkpoint, carry: Carry) -> None:
        """Take the weights of another run, and of its optimizer's state what `carry` says.

        Projections and their state are taken where both runs have the same; else they begin anew.

        Raises:
            UsageError: The state is of another optimizer.
            DataError: The weights are of another model.
        """
        checkpoint.load_weights(self.objective.model)
        mine, saved = self.objective.projections, checkpoint.saved("projections")
        state = checkpoint.saved("optimizer")
        if {name: p.shape for name, p in mine.items()} == dict(saved.shapes):
            checkpoint.load_into(mine, "projections")
        else:
            state.shapes = {key: shape for key, shape in state.shapes.items() if not key.startswith(PROJECTIONS)}
        self.optimizer.load(state, carry)
        if self.average:
            self.average.begin()

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            DataError: It is of another model.
            UsageError: It is of another optimizer.
        """
        checkpoint.load_weights(self.objective.model)
        checkpoint.load_into(self.objective.projections, "projections")
        # Before its first update a grown model has the state of the weights that were trained already, and no other.
        left_out = checkpoint.state.get("guard", {}).get("skipped", 0)
        try:
            self.optimizer.load(checkpoint.saved("optimizer"), some=checkpoint.state["step"] == left_out)
        except UsageError as error:
            raise UsageError("optimizer.name cannot change inside a stage; keep it, or use another folder") from error
        state: dict[str, Any] = checkpoint.state
        if self.average and checkpoint.saved("average").shapes:
            self.average.load(checkpoint.saved("average"), state["average_count"])
        if self.objective.pruner:
            self.objective.pruner.load(checkpoint.saved("gates"))
            self.objective.pruner.at_step(checkpoint.state["step"])
        if "guard" in state:
            self.guard.restore(state["guard"])
        ranks = self.objective.trained.ranks
        generators = state.get("random_by_rank", [state.get("random") or {"cpu": state.get("torch_rng")}])
        if len(generators) == ranks.world:
            restore_random_state(generators[ranks.rank])
        else:  # on another number of devices dropout cannot be the same: it must not be the same on two of them
            reseed(state["step"], ranks.rank)
