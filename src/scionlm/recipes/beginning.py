"""What training begins with beside weights: the optimizer's state and the place in the data, of what went before."""

from collections.abc import Callable, Mapping
from pathlib import Path

from scionlm.core.log import say, warn
from scionlm.core.records import Record
from scionlm.data.mixing.plan import REPLAYED
from scionlm.recipes.order import Sampling
from scionlm.recipes.setting import Setting
from scionlm.recipes.stages import Stage
from scionlm.train.checkpoint import Checkpoint, find_checkpoint
from scionlm.train.learner import Learner, Position
from scionlm.train.shards import Renamed

Beginning = Callable[[Learner, Position], None]
"""Called before the first step with what learns and where it is."""


def branching(setting: Setting) -> Beginning:
    """Return how a recipe says that its model begins: with another run's checkpoint, or with nothing more.

    Calling the result raises:
        UsageError: There is no such checkpoint.
        DataError: It is damaged, or of another model.
    """
    branch, stage = setting.recipe.branch, setting.stages[0].stage

    def begin(learner: Learner, position: Position) -> None:
        if branch is None:
            return
        checkpoint = find_checkpoint(Path(branch.run), branch.step)
        learner.begin_with(checkpoint, stage.optimizer_state)
        position.cursors = cursors_at(checkpoint)
        _tell(checkpoint, stage)

    return begin


def growing(trained: Path, names: Mapping[str, str], keep_optimizer: bool) -> Beginning:
    """Return how a grown model begins that goes on with a trained one: behind it in the data.

    Args:
        trained: The trained model's run folder, whose last checkpoint it begins with.
        names: Weight of the grown model to the trained one's that it was, for all that were trained.
        keep_optimizer: Whether these keep the optimizer's state.
    """

    def begin(learner: Learner, position: Position) -> None:
        checkpoint = find_checkpoint(trained)
        if keep_optimizer:
            learner.optimizer.load(Renamed(checkpoint.saved("optimizer"), names), some=True)
        position.cursors = cursors_at(checkpoint)

    return begin


def behind(folder: Path) -> Beginning:
    """Return how a model begins that goes on in the data where another run, of its folder, has stopped."""

    def begin(learner: Learner, position: Position) -> None:
        position.cursors = cursors_at(find_checkpoint(folder))  # not before: a run that goes on does without

    return begin


def _tell(checkpoint: Checkpoint, stage: Stage) -> None:
    """Say what a run branches off, and warn where the learning rate jumps."""
    say(f"branching off {checkpoint.path}, optimizer state: {stage.optimizer_state}")
    before = checkpoint.state.get("lr_now")
    first = stage.optimizer.lr * stage.build_schedule()(0)
    if before and stage.optimizer_state != "reset" and not 0.8 < first / before < 1.25:
        warn(f"the learning rate jumps from {before:.3g} at the checkpoint to {first:.3g}")


def cursors_at(checkpoint: Checkpoint) -> dict[str, Record]:
    """Return where a checkpoint is in the data: for what goes on from there in a folder of its own."""
    found = cursors_of(checkpoint.state.get("cursors", {}), checkpoint.state)
    return {key: cursor for key, cursor in found.items() if not Sampling.replays_itself(key)}


def cursors_of(cursors: Mapping[str, Record], state: Record) -> dict[str, Record]:
    """Return the cursors with those of a stage's state."""
    if "windows" not in state:
        return dict(cursors)
    counts = {n: c for n, c in state["plan"]["counts"].items() if not n.startswith(REPLAYED)}
    before = cursors.get(state["windows"], {}).get("counts", {})
    found = {**cursors, state["windows"]: {"order": state["order"], "counts": before | counts}}
    if state.get("replayed"):
        found[state["replayed"]] = {"counts": {REPLAYED: state["plan"]["counts"][REPLAYED]}}
    return found
