"""The training loop: take a batch, step, measure, evaluate, save. In the order in which things happen."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scionlm.core.duration import Duration
from scionlm.core.errors import DivergenceError, StoppedError
from scionlm.core.log import Progress
from scionlm.core.records import JsonlWriter, Record
from scionlm.core.signals import StopRequest
from scionlm.data import SamplePlan
from scionlm.schedules import Schedule
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.objective import Objective
from scionlm.train.step import train_step

_LOGGED_STEPS = 5000  # about so many lines of metrics, however long the run


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know, in steps.

    Attributes:
        title: What is being trained, for the progress bar.
        total_steps: Updates in all.
        sequences_per_step: Sequences in the global batch.
        seq_len: Predicted tokens in a sequence.
        micro_batch_size: Sequences in one pass.
        lr: Peak learning rate.
        grad_clip: Largest gradient norm; 0 does not clip.
        evaluate_every: Updates between evaluations; 0 does not evaluate in between.
        checkpoint_every: Time or updates between checkpoints.
    """

    title: str
    total_steps: int
    sequences_per_step: int
    seq_len: int
    micro_batch_size: int
    lr: float
    grad_clip: float
    evaluate_every: int
    checkpoint_every: Duration


def fit(  # noqa: PLR0913, PLR0915, PLR0917 - everything the loop touches is handed in, nothing is looked up
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    plan: SamplePlan,
    schedule: Schedule,
    config: LoopConfig,
    metrics: JsonlWriter,
    checkpoints: CheckpointStore,
    evaluate: Callable[[], Record],
    stop: StopRequest,
) -> float:
    """Train to the last step, from the newest checkpoint where there is one; return the seconds spent training.

    Args:
        objective: The module to train.
        optimizer: Of its weights.
        plan: Where samples come from.
        schedule: Multiplier of the learning rate by step.
        config: Numbers.
        metrics: Gets a record a step and a record an evaluation.
        checkpoints: Where to save.
        evaluate: Called before the first update and then every so often; its record goes to the metrics.
        stop: Asked after every step.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergenceError: Loss or gradient is not finite.
    """
    step, tokens, seconds, owed = 0, 0, 0.0, False  # owed: an evaluation that a signal cut short
    state = checkpoints.load_latest(objective, optimizer)
    if state is not None:
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        plan.restore(state["plan"])
        metrics.rewind(step)
        owed = state["evaluation_owed"]
    else:
        metrics.rewind(-1)
        owed = True

    def measure() -> None:
        objective.eval()
        metrics.write({"step": step, "tokens": tokens} | evaluate())
        objective.train()

    if owed:
        measure()
    log_every = -(-config.total_steps // _LOGGED_STEPS)
    saved_at, saved_step = time.monotonic(), step
    objective.train()
    with Progress(config.title, config.total_steps, step) as progress:
        while step < config.total_steps:
            started = time.monotonic()
            samples = plan.take(config.sequences_per_step)
            lr = config.lr * schedule(step)
            try:
                result = train_step(
                    objective, optimizer, plan.batch(samples), config.micro_batch_size, lr, config.grad_clip
                )
            except DivergenceError as error:
                where = ", ".join(f"{s.domain}:{s.draw}" for s in samples[:4])
                raise DivergenceError(
                    f"{error} at step {step + 1} (samples {where}{', ...' if len(samples) > 4 else ''}); "
                    "lower optimizer.lr or raise schedule.warmup"
                ) from error
            step += 1
            tokens += result.num_tokens
            elapsed = time.monotonic() - started
            seconds += elapsed
            speed = config.sequences_per_step * config.seq_len / elapsed
            progress.update(step, f"loss {result.nll:.3f}  {speed:.0f} tokens/s")
            if step % log_every == 0 or step == config.total_steps:
                record = {
                    "train/nll_nats": result.nll,
                    "optim/lr": lr,
                    "optim/grad_norm": result.grad_norm,
                    "speed/tokens_per_s": speed,
                    "time/elapsed_s": seconds,
                }
                metrics.write({"step": step, "tokens": tokens} | record)
            owed = bool(config.evaluate_every) and step % config.evaluate_every == 0 and step < config.total_steps
            if owed and not stop.requested:
                with contextlib.suppress(StoppedError):  # then it is saved below, with the evaluation still owed
                    measure()
                    owed = False
            due = _is_due(config.checkpoint_every, step - saved_step, time.monotonic() - saved_at, config)
            if (due or stop.requested) and step < config.total_steps:
                state = {"step": step, "tokens": tokens, "seconds": seconds, "evaluation_owed": owed}
                checkpoints.save(objective, optimizer, state | {"plan": plan.state()})
                saved_at, saved_step = time.monotonic(), step
            if stop.requested and step < config.total_steps:
                raise StoppedError(f"stopped at step {step} of {config.total_steps}, saved")
    objective.eval()
    return seconds


def _is_due(every: Duration, steps: int, seconds: float, config: LoopConfig) -> bool:
    if every.unit == "seconds":
        return seconds >= every.amount
    tokens_per_step = config.sequences_per_step * config.seq_len
    return steps >= max(1, every.in_steps(config.total_steps, tokens_per_step))
