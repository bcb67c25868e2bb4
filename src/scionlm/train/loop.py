"""The training loop: take a batch, step, measure, evaluate, save. In the order in which things happen."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scionlm.core.errors import BrokenModelError, DataError, DivergenceError, StoppedError, UsageError
from scionlm.core.log import Progress, warn
from scionlm.core.records import Record
from scionlm.core.signals import StopRequest
from scionlm.data import Ledger, Sample, SamplePlan
from scionlm.parallel.runtime import Runtime
from scionlm.schedules import Schedule, describe
from scionlm.train.checkpoint import Checkpoint
from scionlm.train.guard import HOW_TO_CALM
from scionlm.train.learner import Learner, Position
from scionlm.train.metrics import Metrics
from scionlm.train.objective import FROM_TEACHER, Objective
from scionlm.train.saver import Saver
from scionlm.train.step import StepResult, own_batch, train_step

_LOGGED_STEPS = 5000  # about so many lines of metrics, however long the run
_SKIPPED, _SPIKE = "train/skipped_updates", "train/spike_sigmas"
_NOTES = {_SKIPPED, _SPIKE}  # worth a line at any step


class Reweighting(Protocol):
    """Moves the plan's weights by what it measures."""

    every: int
    """Updates between two measurements."""

    def update(self) -> Record:
        """Measure, set the weights from the next slot on, and return what goes to the metrics."""
        ...

    def state(self) -> Record:
        """Return what is needed to go on."""
        ...

    def restore(self, state: Record) -> None:
        """Go on from a state."""
        ...


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one order of samples, one schedule, one optimizer.

    Attributes:
        name: Its name.
        index: Its place among the stages.
        first_step: Updates of the stages before it.
        steps: Its own updates.
        plan: Where samples come from.
        windows_id: What the plan draws from: another plan on the same windows goes on where this one stops.
        order: The key of the plan's order.
        replay_id: What the plan replays: another plan that replays the same goes on where this one stops.
        schedule: Multiplier of the learning rate by step of the stage.
        lr: Peak learning rate.
        grad_clip: Largest gradient norm; 0 does not clip.
        sequences_per_step: Sequences in the global batch.
        seq_len: Predicted tokens in a sequence.
        micro_batch_size: Sequences in one pass.
        ledger: Gets what has been consumed, at every checkpoint and at the end.
        reweighting: Moves the weights of the plan every so often.
        hands_on: Weights move after the last step too, for a stage that begins with those that this one ends with.
        flops_per_token: Forward and backward, for the utilization.
        teacher_flops_per_token: Of the teacher's forward pass.
    """

    name: str
    index: int
    first_step: int
    steps: int
    plan: SamplePlan
    windows_id: str
    order: str
    schedule: Schedule
    lr: float
    grad_clip: float
    sequences_per_step: int
    seq_len: int
    micro_batch_size: int
    ledger: Ledger
    reweighting: Reweighting | None = None
    hands_on: bool = False
    flops_per_token: float = 0.0
    teacher_flops_per_token: float = 0.0
    replay_id: str | None = None

    @property
    def last_step(self) -> int:
        """The step it ends with."""
        return self.first_step + self.steps

    def state(self, step: int) -> Record:
        """Return what a checkpoint after `step` holds of it."""
        weights = {"reweight": self.reweighting.state()} if self.reweighting else {}
        return {
            "stage": self.index,
            "first_step": self.first_step,
            "schedule": self.schedule.to_list(),
            "lr": self.lr,
            "lr_now": self.lr * self.schedule.at(step - self.first_step),
            "plan": self.plan.state(),
            "windows": self.windows_id,
            "order": self.order,
            "replayed": self.replay_id,
        } | weights

    def restore(self, state: Record, allow_change: bool) -> None:
        """Go on from a checkpoint's state.

        Raises:
            UsageError: The checkpoint was made with another schedule, and that may not change; or of other text; or it
                is beyond the end.
            DataError: It is of other domains.
        """
        before = state.get("schedule", self.schedule.to_list()), state.get("lr", self.lr)
        if before != (self.schedule.to_list(), self.lr):
            words = f"the schedule of stage {self.name} is not the checkpoint's: {describe(self.schedule, self.lr)}"
            if not allow_change:
                raise UsageError(f"{words}; use --allow-change to go on with it")
            warn(words)
        if state.get("first_step", self.first_step) != self.first_step:
            raise UsageError(f"the stages before {self.name} are finished, and cannot be made longer or shorter")
        if state["step"] > self.last_step:
            raise UsageError(
                f"the run is at step {state['step']}, but stage {self.name} would end with step {self.last_step}; "
                "give it more steps"
            )
        if state.get("windows", self.windows_id) != self.windows_id:
            raise UsageError(f"stage {self.name} has begun: its text and how it is cut up cannot change any more")
        if (self.reweighting is None) != ("reweight" not in state):
            raise UsageError(f"stage {self.name} has begun: reweight cannot be set or left out any more")
        self.plan.restore(state["plan"])
        if self.reweighting:
            self.reweighting.restore(state["reweight"])


@dataclass(frozen=True)
class Session:
    """What a run has around its training.

    Attributes:
        title: What is being trained, for the progress bar.
        total_steps: Updates of all stages.
        evaluate_every: Updates between evaluations; 0 evaluates only where a stage begins.
        evaluate: Its record goes to the metrics.
        metrics: Gets a record a step and a record an evaluation.
        saver: Makes checkpoints.
        stop: Asked after every step.
        runtime: The device.
        peak_flops: Of the device, a second; None where it is not known.
        dense: Evaluate 1, 2, 4, 8, ... updates into each stage too.
    """

    title: str
    total_steps: int
    evaluate_every: int
    evaluate: Callable[[], Record]
    metrics: Metrics
    saver: Saver
    stop: StopRequest
    runtime: Runtime
    peak_flops: float | None = None
    dense: bool = False

    def evaluates(self, step: int, since: int) -> bool:
        """Return whether losses are measured after a step, `since` steps into its stage."""
        every = self.evaluate_every
        soon = self.dense and since & (since - 1) == 0 and (since < every or not every)
        return soon or (every > 0 and step % every == 0)


def take_up(
    checkpoint: Checkpoint | None,
    learner: Learner,
    stage: Stage,
    position: Position,
    session: Session,
    allow_change: bool = False,
) -> None:
    """Go on from a checkpoint, or begin a run where there is none; what was recorded after it is dropped.

    Args:
        checkpoint: Of this stage.
        learner: Gets its weights and all that changes with them.
        stage: Gets its order of samples.
        position: Gets its step.
        session: Has the records.
        allow_change: Go on although the schedule is another.

    Raises:
        UsageError: The checkpoint was made with another optimizer or schedule, and that may not change.
        DataError: It is of another model, or other domains.
    """
    if checkpoint:
        position.restore(checkpoint.state)
        learner.load(checkpoint)
        stage.restore(checkpoint.state, allow_change)
    step = position.step if checkpoint else -1

    def stays(line: Record) -> bool:
        """Whether a line of this very step stays: what is owed is made again, whatever of it was written before."""
        moved = any(key.startswith("reweight/") for key in line)
        owed = position.reweight_owed if moved else position.evaluation_owed
        return "train/nll_nats" in line or not owed

    session.metrics.rewind(step, stays)
    stage.ledger.rewind(step)
    session.saver.begin(position.step, saved=checkpoint is not None)


def fit(learner: Learner, stage: Stage, position: Position, session: Session) -> None:
    """Train to the end of a stage, from where `position` says.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergenceError: Loss or gradient was not finite too many times in a row.
        DataError: A domain is exhausted, and the plan says to stop then; the state is saved.
        StorageError: The state cannot be saved.
    """
    objective, reweighting, stop = learner.objective, stage.reweighting, session.stop
    log_every = -(-session.total_steps // _LOGGED_STEPS)

    def save(must: bool) -> None:
        if session.saver.has(position.step, must):
            return
        stage.ledger.record(position.step, stage.plan)
        state = position.state() | stage.state(position.step) | learner.state()
        ends = position.step == stage.last_step
        records = (session.metrics, stage.ledger)
        taken = session.saver.save(state, learner.tensors(), records, must=must, for_good=ends)
        position.saving_seconds += taken

    objective.train()
    with Progress(session.title, session.total_steps, position.step) as progress:
        while True:
            if position.evaluation_owed and not stop.agreed():
                position.evaluation_owed = not _measured(session.evaluate, objective, position, session)
            if reweighting and position.reweight_owed and not stop.agreed():
                position.reweight_owed = not _measured(reweighting.update, objective, position, session)
            ends, stops = position.step == stage.last_step, stop.agreed()
            if session.saver.is_due(position.step, calm=learner.guard.is_calm) or ends or stops:
                save(must=ends or stops)
            if ends and not (stage.hands_on and position.reweight_owed):
                break
            if stops:
                raise StoppedError(f"stopped at step {position.step} of {session.total_steps}, saved")
            samples = _take(stage, save)
            record = _update(learner, stage, position, session, samples)
            loss, speed = record["train/nll_nats"], record["speed/tokens_per_s"]
            progress.update(position.step, f"loss {loss:.3f}  {speed:.0f} tokens/s")
            ends, since = position.step == stage.last_step, position.step - stage.first_step
            if ends or position.step % log_every == 0 or record.keys() & _NOTES:
                masks = objective.pruner.facts() if objective.pruner else {}
                session.metrics.write({"step": position.step, "tokens": position.tokens} | record | masks)
            last = position.step == session.total_steps
            position.evaluation_owed = (ends or session.evaluates(position.step, since)) and not last
            moves = reweighting is not None and since % reweighting.every == 0
            position.reweight_owed = moves and (stage.hands_on or not ends)
    objective.eval()


def _measured(work: Callable[[], Record], objective: Objective, position: Position, session: Session) -> bool:
    """Measure something of the model and write it down; return whether it was done and not cut short by a signal.

    Raises:
        DivergenceError: Training has broken the weights.
    """
    objective.eval()
    try:
        session.metrics.write({"step": position.step, "tokens": position.tokens} | work())
    except StoppedError:  # the state is saved with the measurement still owed
        return False
    except BrokenModelError as error:
        if position.step == 0:
            raise
        raise DivergenceError(f"{error} at step {position.step}; {HOW_TO_CALM}") from error
    finally:
        objective.train()
    return True


def _update(learner: Learner, stage: Stage, position: Position, session: Session, samples: list[Sample]) -> Record:
    """Make one update, move on, and return what it measured."""
    started = time.monotonic()
    objective, taught = learner.objective, learner.objective.teacher_seconds
    ranks = objective.trained.ranks
    batch = own_batch(stage.plan, samples, ranks)
    waited = time.monotonic() - started
    lr = stage.lr * stage.schedule(position.step - stage.first_step)
    objective.at_step(position.step)
    result = train_step(objective, learner.optimizer, batch, stage.micro_batch_size, lr, stage.grad_clip)
    position.step += 1
    position.tokens += result.num_tokens
    notes = _judge(learner, position.step, result, samples)
    elapsed = time.monotonic() - started
    position.seconds += elapsed
    taught = objective.teacher_seconds - taught
    position.teacher_seconds += taught
    speed = stage.sequences_per_step * stage.seq_len / elapsed
    peak = session.peak_flops and session.peak_flops * ranks.world
    record = {
        "train/nll_nats": result.nll,
        "optim/lr": lr,
        "optim/grad_norm": result.grad_norm,
        "speed/tokens_per_s": speed,
        "speed/data_share": waited / elapsed,
        "memory/peak_bytes": session.runtime.peak_memory(),
        "time/elapsed_s": position.seconds,
    }
    if taught:
        record["speed/teacher_share"] = taught / elapsed
    if peak:
        flops = stage.flops_per_token + (stage.teacher_flops_per_token if taught else 0.0)
        record["speed/mfu"] = speed * flops / peak
    record |= {f"train/{name}": value for name, value in result.parts.items()}
    return record | notes | _domain_means(samples, result)


def _take(stage: Stage, save: Callable[[bool], None]) -> list[Sample]:
    """Return the next samples; where a domain has come to its end, save first and then say so."""
    try:
        return stage.plan.take(stage.sequences_per_step)
    except DataError:
        save(True)
        raise


def _judge(learner: Learner, step: int, result: StepResult, samples: list[Sample]) -> Record:
    """Note what became of an update, and return what the metrics should say of it."""
    where = ", ".join(f"{sample.domain}:{sample.draw}" for sample in samples[:4])
    where += ", ..." if len(samples) > 4 else ""
    if not result.applied:
        _leave_out(learner, step, result, where)
        return {_SKIPPED: learner.guard.skipped}
    if learner.average:
        learner.average.update(step)
    height = learner.guard.applied(step, result.nll, where)
    return {} if height is None else {_SPIKE: height}


def _leave_out(learner: Learner, step: int, result: StepResult, where: str) -> None:
    """Count an update that is not made.

    Raises:
        DivergenceError: There were too many in a row.
        BrokenModelError: There were, and what is not finite comes from the teacher alone.
    """
    try:
        learner.guard.left_out(step, result.parts.get("loss_nats", result.nll), result.grad_norm, where)
    except DivergenceError as error:
        taught = [result.parts.get(part, 0.0) for part in FROM_TEACHER]
        if not math.isfinite(result.nll) or all(map(math.isfinite, taught)):
            raise
        raise BrokenModelError(
            f"at step {step} the cross-entropy is {result.nll:.3g}, but what the teacher adds is not finite: its "
            "weights are broken, or its states are too large for the precision"
        ) from error


def _domain_means(samples: list[Sample], result: StepResult) -> Record:
    """Return the training loss of each domain in a step, nats; a domain that does not occur in it has none."""
    sums: dict[str, tuple[float, int]] = {}
    # Where the ranks' shares are not even, what fills the last ones comes after all samples.
    for sample, nll, tokens in zip(samples, result.sequence_nll, result.sequence_tokens, strict=False):
        before = sums.get(sample.domain, (0.0, 0))
        sums[sample.domain] = before[0] + nll, before[1] + tokens
    return {f"train/{name}/nll_nats": nll / tokens for name, (nll, tokens) in sums.items() if tokens}
