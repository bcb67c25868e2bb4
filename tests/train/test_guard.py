"""Updates that are not finite are left out, and change nothing; losses that leap are found, and only those."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import SEQUENCES, STEPS, Run, equal

from scionlm.core.errors import DivergenceError, StoppedError
from scionlm.core.records import read_jsonl
from scionlm.train.average import Average, AverageSettings
from scionlm.train.guard import Guard
from scionlm.train.step import train_step

quick = settings(max_examples=200)
KINDS = ["loss", "gradient", "gradient that is infinite"]


def break_steps(run: Run, steps: set[int], kind: str) -> None:
    """Spoil the updates of some steps of a run; which step it is, the plan knows, also after a resume."""

    def now() -> bool:
        return run.plan.state()["slot"] // SEQUENCES in steps

    if kind == "loss":
        run.objective.register_forward_hook(
            lambda module, inputs, out: (out[0] * math.nan, *out[1:]) if now() and torch.is_grad_enabled() else None
        )
        return

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = math.inf if "infinite" in kind else math.nan
        return gradient

    parameter = run.objective.model.model.layers[1].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: spoil(gradient) if now() else gradient)


def state_of(run: Run) -> dict[str, bytes]:
    """Return all that a left-out update may not touch, bit by bit."""
    tensors = {**run.weights, **run.optimizer.tensors()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def lines_of(run: Run) -> list[dict]:
    return [line for line in read_jsonl(run.folder / "metrics.jsonl") if "train/nll_nats" in line]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_guard_gives_up_after_so_many_in_a_row_and_one_more(limit, capsys):
    guard = Guard(limit)
    for step in range(1, limit + 1):
        guard.left_out(step, math.nan, 1.0, f"alpha:{step}")
        words = capsys.readouterr().err
        assert f"step {step} (samples alpha:{step})" in words
        assert f"{limit - step} more" in words
    with pytest.raises(DivergenceError, match=rf"step {limit + 1} \(samples beta:7, \.\.\.\)") as caught:
        guard.left_out(limit + 1, 2.0, math.inf, "beta:7, ...")
    assert caught.value.exit_code == 3
    assert "gradient norm inf" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)
    assert guard.skipped == limit + 1


@quick
@given(limit=st.integers(0, 4), broken=st.lists(st.booleans(), max_size=40))
def test_only_updates_in_a_row_count_and_one_that_is_applied_begins_anew(limit, broken):
    guard, in_a_row = Guard(limit), 0
    for step, one in enumerate(broken, start=1):
        in_a_row = in_a_row + 1 if one else 0
        if in_a_row > limit:
            with pytest.raises(DivergenceError):
                guard.left_out(step, math.nan, math.nan, "x:1")
            assert guard.skipped == sum(broken[:step])
            return
        if one:
            guard.left_out(step, math.nan, math.nan, "x:1")
        else:
            guard.applied(step, 1.0, "x:1")
    assert guard.skipped == sum(broken)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_number_in_the_message_is_english(limit):
    guard = Guard(limit)
    for step in range(limit):
        guard.left_out(step, math.nan, 1.0, "x:1")
    with pytest.raises(DivergenceError) as caught:
        guard.left_out(limit, math.nan, 1.0, "x:1")
    assert not re.search(r"[23]th\b", str(caught.value))


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_out_update_touches_neither_weights_nor_optimizer(tmp_path, data_folder, kind):
    run = Run(tmp_path / "a", data_folder)
    break_steps(run, {2}, kind)

    def step():
        batch = run.plan.batch(run.plan.take(SEQUENCES))
        return train_step(run.objective, run.optimizer, batch, 4, lr=1e-2, clip=1.0)

    assert step().applied
    before = state_of(run)
    result = step()
    assert not result.applied
    assert not (math.isfinite(result.nll) and math.isfinite(result.grad_norm))
    assert state_of(run) == before
    assert all(parameter.grad is None for parameter in run.objective.model.parameters())
    assert step().applied
    after = state_of(run)
    assert not any(after[name] == before[name] for name in before)  # the control: an applied one touches everything


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_bad_gradient_is_found_whether_gradients_are_clipped_or_not(tmp_path, data_folder, clip):
    run = Run(tmp_path / "a", data_folder)
    break_steps(run, {1}, "gradient")
    before = state_of(run)
    batch = run.plan.batch(run.plan.take(SEQUENCES))
    assert not train_step(run.objective, run.optimizer, batch, 4, lr=1e-2, clip=clip).applied
    assert state_of(run) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_after_left_out_updates_and_says_which(tmp_path, data_folder, capsys, kind):
    run = Run(tmp_path / "a", data_folder, skip=2)
    run.learner.average = Average(run.objective.model, AverageSettings("uniform", 0.9, 0, 1))
    break_steps(run, {3, 4, 6}, kind)
    run.fit()
    assert run.learner.guard.skipped == 3
    assert run.learner.average.count == STEPS - 3
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    noted = {line["step"]: line["train/skipped_updates"] for line in lines if "train/skipped_updates" in line}
    assert noted == {3: 1, 4: 2, 6: 3}
    assert lines[-1]["train/nll_nats"] < lines[0]["train/nll_nats"]
    warned = re.findall(r"at step (\d+) \(samples (\w+:\d+), ", capsys.readouterr().err)
    assert [int(step) for step, _ in warned] == [3, 4, 6]
    assert {domain.split(":")[0] for _, domain in warned} <= {"alpha", "beta"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_too_many_in_a_row_ends_the_run_with_the_weights_of_before(tmp_path, data_folder, kind):
    good = Run(tmp_path / "good", data_folder)
    with pytest.raises(StoppedError):
        good.fit(stop_after=3)
    run = Run(tmp_path / "a", data_folder, skip=1)
    break_steps(run, {4, 5}, kind)
    with pytest.raises(DivergenceError, match=r"at step 5 \(samples (alpha|beta):\d+"):
        run.fit()
    assert state_of(run) == state_of(good)


def test_a_run_with_a_left_out_update_differs_from_one_without(tmp_path, data_folder):
    """The control of the resumes below: a step more or less shows in the weights."""
    plain, broken = Run(tmp_path / "a", data_folder, skip=3), Run(tmp_path / "b", data_folder, skip=3)
    break_steps(broken, {3}, "loss")
    plain.fit()
    broken.fit()
    assert not equal(plain.weights, broken.weights)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("stop_after", [2, 3, 4, 6])
def test_a_run_with_left_out_updates_stopped_and_resumed_is_the_same_bitwise(tmp_path, data_folder, kind, stop_after):
    """Before, between and after two of them; when it stops between, one more of the row is still allowed."""

    def start(folder):
        run = Run(tmp_path / folder, data_folder, skip=2)
        break_steps(run, {3, 4}, kind)
        return run

    whole = start("whole")
    whole.fit()
    with pytest.raises(StoppedError):
        start("parts").fit(stop_after=stop_after)
    second = start("parts")
    second.fit()
    assert state_of(second) == state_of(whole)
    assert second.learner.guard.state() == whole.learner.guard.state()
    assert second.losses() == whole.losses()


def test_a_stop_inside_a_row_does_not_begin_the_row_anew(tmp_path, data_folder):
    first = Run(tmp_path / "a", data_folder, skip=2)
    break_steps(first, {3, 4, 5}, "loss")
    with pytest.raises(StoppedError):
        first.fit(stop_after=4)
    second = Run(tmp_path / "a", data_folder, skip=2)
    break_steps(second, {3, 4, 5}, "loss")
    with pytest.raises(DivergenceError, match="step 5"):
        second.fit()


# Losses as training gives them: how they fall, and how they scatter around that.
FALLS = {
    "flat": lambda t: 3.0 + 0 * t,
    "power law": lambda t: 2.5 + 8.0 * (t + 1) ** -0.35,
    "steep and then slow": lambda t: 2.5 + 7.0 * np.exp(-t / 60) + 1.0 * np.exp(-t / 800),
    "linear": lambda t: 4.0 - 0.0004 * t,
    "with the cooldown of the learning rate": lambda t: np.where(t < 1600, 3.2, 3.2 - 0.001 * (t - 1600)),
}
SCATTERS = {
    "normal": lambda rng, n: rng.normal(0, 0.05, n),
    "uniform": lambda rng, n: rng.uniform(-0.1, 0.1, n),
    "of two domains": lambda rng, n: rng.choice([-0.2, 0.2], n) + rng.normal(0, 0.03, n),
    "that goes with the batch before": lambda rng, n: np.convolve(rng.normal(0, 0.04, n + 3), np.ones(4) / 2, "valid"),
    "of rare hard batches": lambda rng, n: rng.normal(0, 0.05, n) + 0.15 * (rng.random(n) < 0.03),
}
LENGTH = 2000


def trace(fall: str, scatter: str, seed: int) -> list[float]:
    rng = np.random.default_rng([seed, *map(ord, fall + scatter)])
    return (FALLS[fall](np.arange(LENGTH)) + SCATTERS[scatter](rng, LENGTH)).tolist()


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("fall", FALLS)
def test_a_clean_run_has_no_spike(fall, scatter, capsys):
    for seed in range(2):
        guard = Guard(0)
        heights = [guard.applied(step, loss, "x:1") for step, loss in enumerate(trace(fall, scatter, seed), start=1)]
        assert heights == [None] * LENGTH
        assert guard.spikes == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("fall", FALLS)
def test_every_planted_spike_is_found_with_its_height_its_step_and_its_samples(fall, scatter, capsys):
    """Eight standard deviations of the window before it, from early to late, each in a window of its own."""
    losses = trace(fall, scatter, 5)
    planted = [40, 200, 401, 777, 1200, 1500, 1999]
    guard, found = Guard(0), {}
    for step, plain in enumerate(losses):
        loss = plain
        if step in planted:
            window = np.array(losses[max(0, step - 128) : step])
            loss = float(window.mean() + 8 * window.std())
        height = guard.applied(step, loss, f"x:{step}")
        losses[step] = loss
        if height is not None:
            found[step] = height
    assert list(found) == planted
    assert list(found.values()) == pytest.approx([8.0] * len(planted), rel=1e-6)
    assert guard.spikes == len(planted)
    warned = re.findall(r"at step (\d+) is 8 standard deviations .*\(samples x:(\d+)\)", capsys.readouterr().err)
    assert [(int(step), int(draw)) for step, draw in warned] == [(step, step) for step in planted]


def test_five_standard_deviations_are_no_spike_and_a_loss_that_falls_is_none():
    """The control of the test above: it is the height that is found."""
    for height, spikes in ((5.0, 0), (5.99, 0), (6.01, 1), (-9.0, 0)):
        losses = trace("flat", "normal", 3)[:300]
        window = np.array(losses[-128:])
        guard = Guard(0)
        for step, loss in enumerate([*losses, float(window.mean() + height * window.std())]):
            guard.applied(step, loss, "x:1")
        assert guard.spikes == spikes, height


def test_there_is_no_spike_before_there_is_enough_to_compare_with():
    for before, spikes in ((0, 0), (1, 0), (31, 0), (32, 1), (40, 1)):
        guard = Guard(0)
        for step in range(before):
            guard.applied(step, 2.0 + 0.1 * (step % 2), "x:1")
        guard.applied(before, 100.0, "x:1")
        assert guard.spikes == spikes, before


def test_losses_that_are_all_the_same_raise_no_alarm():
    guard = Guard(0)
    assert [guard.applied(step, 2.0, "x:1") for step in range(200)] == [None] * 200


@quick
@given(
    losses=st.lists(st.floats(0, 20) | st.just(math.nan), max_size=200),
    more=st.lists(st.floats(0, 20) | st.just(math.nan), max_size=60),
)
def test_a_guard_restored_from_json_goes_on_exactly(losses, more):
    def feed(guard, some, first):
        heights = []
        for step, loss in enumerate(some, start=first):
            if math.isnan(loss):
                guard.left_out(step, loss, 1.0, "x:1")
            else:
                heights.append(guard.applied(step, loss, "x:1"))
        return heights

    whole, second = Guard(1000), Guard(1000)
    feed(whole, losses, 0)
    second.left_out(0, math.nan, 1.0, "y:1")  # what it had before may not matter
    second.applied(1, 50.0, "y:1")
    second.restore(json.loads(json.dumps(whole.state(), allow_nan=False)))
    assert second.state() == whole.state()
    assert feed(second, more, len(losses)) == feed(whole, more, len(losses))
    assert second.state() == whole.state()


def test_a_guard_restored_after_many_losses_forgets_the_oldest_as_it_would_have():
    losses = trace("steep and then slow", "normal", 2)[:600]
    whole = Guard(0)
    for step, loss in enumerate(losses[:300]):
        whole.applied(step, loss, "x:1")
    second = Guard(0)
    second.restore(json.loads(json.dumps(whole.state())))
    for guard in (whole, second):
        for step, loss in enumerate(losses[300:]):
            guard.applied(300 + step, loss, "x:1")
    assert second.state() == whole.state()
    assert second.state()["losses"] == losses[-128:]


def test_a_restored_guard_finds_the_spike_that_a_fresh_one_could_not():
    losses = trace("flat", "normal", 1)[:100]
    whole, second, fresh = Guard(0), Guard(0), Guard(0)
    for step, loss in enumerate(losses):
        whole.applied(step, loss, "x:1")
    second.restore(whole.state())
    assert [guard.applied(100, 9.0, "x:1") is not None for guard in (whole, second, fresh)] == [True, True, False]


def test_a_spike_stands_in_the_metrics_of_its_step(tmp_path, data_folder, monkeypatch):
    from scionlm.train import guard as module

    monkeypatch.setattr(module, "_ENOUGH", 3)
    run = Run(tmp_path / "a", data_folder)

    def louder(module, inputs, out):
        return (out[0] * 9, *out[1:]) if run.plan.state()["slot"] == 6 * SEQUENCES and torch.is_grad_enabled() else None

    run.objective.register_forward_hook(louder)
    run.fit()
    noted = {line["step"]: line["train/spike_sigmas"] for line in lines_of(run) if "train/spike_sigmas" in line}
    assert list(noted) == [6]
    assert noted[6] > 6
    assert run.learner.guard.spikes == 1


def test_no_checkpoint_replaces_a_good_one_while_updates_are_left_out(tmp_path, data_folder):
    """The weights may be what is broken: then the newest checkpoints would all be."""
    run = Run(tmp_path / "run", data_folder, checkpoint_every=1, skip=2)
    step = run.optimizer.step

    def breaking(lr, divisor):
        step(lr, divisor)
        if sum(1 for _ in (tmp_path / "run" / "checkpoints").glob("step-*")) == 2:
            with torch.no_grad():
                run.objective.model.model.norm.weight[0] = torch.nan

    run.optimizer.step = breaking
    with pytest.raises(DivergenceError):
        run.fit()
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        weights = load_file(path / "weights.safetensors")
        broken = not all(torch.isfinite(tensor).all() for tensor in weights.values())
        assert broken == (path.name == "step-00000003"), path
