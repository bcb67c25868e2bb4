"""The training loop: take a batch, step, measure, evaluate, save. In the order in which things happen."""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from scionlm.core.duration import Duration
from scionlm.core.errors import DataError, DivergenceError, StoppedError
from scionlm.core.log import Progress
from scionlm.core.records import JsonlWriter, Record
from scionlm.core.signals import StopRequest
from scionlm.data import Ledger, Sample, SamplePlan
from scionlm.schedules import Schedule
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.objective import Objective
from scionlm.train.step import StepResult, train_step

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


def fit(  # noqa: PLR0913, PLR0915, PLR0917 - everything the loop touches is handed in, nothing is looked up
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    plan: SamplePlan,
    schedule: Schedule,
    config: LoopConfig,
    metrics: JsonlWriter,
    checkpoints: CheckpointStore,
    ledger: Ledger,
    evaluate: Callable[[], Record],
    reweighting: Reweighting | None,
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
        ledger: Gets what has been consumed, at every checkpoint and at the end.
        evaluate: Called before the first update and then every so often; its record goes to the metrics.
        reweighting: Moves the weights of the plan every so often.
        stop: Asked after every step.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergenceError: Loss or gradient is not finite.
        DataError: A domain is exhausted, and the plan says to stop then; the state is saved.
    """
    step, tokens, seconds = 0, 0, 0.0
    owed, reweight_owed = True, False  # measurements that are due, or that a signal cut short
    state = checkpoints.load_latest(objective, optimizer)
    if state is not None:
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        plan.restore(state["plan"])
        owed, reweight_owed = state["evaluation_owed"], state.get("reweight_owed", False)
        if reweighting:
            reweighting.restore(state["reweight"])
    # A measurement that is owed is made again, whatever of it was written before the stop.
    metrics.rewind(step if state else -1, keep=lambda line: not owed or "train/nll_nats" in line)
    ledger.rewind(step if state else -1)

    def measured(work: Callable[[], Record]) -> bool:
        objective.eval()
        try:
            metrics.write({"step": step, "tokens": tokens} | work())
        except StoppedError:  # the state is saved with the measurement still owed
            return False
        finally:
            objective.train()
        return True

    def save() -> None:
        ledger.record(step, plan)
        state = {"step": step, "tokens": tokens, "seconds": seconds, "plan": plan.state()}
        owing = {"evaluation_owed": owed, "reweight_owed": reweight_owed}
        weights = {"reweight": reweighting.state()} if reweighting else {}
        checkpoints.save(objective, optimizer, state | owing | weights)

    log_every = -(-config.total_steps // _LOGGED_STEPS)
    saved_at, saved_step = time.monotonic(), step
    objective.train()
    with Progress(config.title, config.total_steps, step) as progress:
        while True:
            owed = owed and (stop.requested or not measured(evaluate))
            if reweighting:
                reweight_owed = reweight_owed and (stop.requested or not measured(reweighting.update))
            due = _is_due(config.checkpoint_every, step - saved_step, time.monotonic() - saved_at, config)
            if (due or stop.requested) and step < config.total_steps:
                save()
                saved_at, saved_step = time.monotonic(), step
            if step == config.total_steps:
                break
            if stop.requested:
                raise StoppedError(f"stopped at step {step} of {config.total_steps}, saved")
            started = time.monotonic()
            samples = _take(plan, config.sequences_per_step, save)
            lr = config.lr * schedule(step)
            with _diverging_at(step + 1, samples):
                batch = plan.batch(samples)
                result = train_step(objective, optimizer, batch, config.micro_batch_size, lr, config.grad_clip)
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
                metrics.write({"step": step, "tokens": tokens} | record | _domain_means(samples, result))
            last = step == config.total_steps
            owed = bool(config.evaluate_every) and step % config.evaluate_every == 0 and not last
            reweight_owed = reweighting is not None and step % reweighting.every == 0 and not last
    ledger.record(step, plan)
    objective.eval()
    return seconds


def _take(plan: SamplePlan, count: int, save: Callable[[], None]) -> list[Sample]:
    """Return the next samples; where a domain has come to its end, save first and then say so."""
    try:
        return plan.take(count)
    except DataError:
        save()
        raise


@contextlib.contextmanager
def _diverging_at(step: int, samples: list[Sample]) -> Generator[None, None, None]:
    """Say where training diverged, if it does."""
    try:
        yield
    except DivergenceError as error:
        where = ", ".join(f"{sample.domain}:{sample.draw}" for sample in samples[:4])
        raise DivergenceError(
            f"{error} at step {step} (samples {where}{', ...' if len(samples) > 4 else ''}); "
            "lower optimizer.lr or raise schedule.warmup"
        ) from error


def _domain_means(samples: list[Sample], result: StepResult) -> Record:
    """Return the training loss of each domain in a step, nats; a domain that does not occur in it has none."""
    sums: dict[str, tuple[float, int]] = {}
    for sample, nll, tokens in zip(samples, result.sequence_nll, result.sequence_tokens, strict=True):
        before = sums.get(sample.domain, (0.0, 0))
        sums[sample.domain] = before[0] + nll, before[1] + tokens
    return {f"train/{name}/nll_nats": nll / tokens for name, (nll, tokens) in sums.items() if tokens}


def _is_due(every: Duration, steps: int, seconds: float, config: LoopConfig) -> bool:
    if every.unit == "seconds":
        return seconds >= every.amount
    tokens_per_step = config.sequences_per_step * config.seq_len
    return steps >= max(1, every.in_steps(config.total_steps, tokens_per_step))
