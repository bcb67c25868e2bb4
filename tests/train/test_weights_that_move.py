"""Weights of domains that follow what training measures: stopped and resumed anywhere, to the bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import tiny_model
from scionlm.core.errors import DataError, StoppedError
from scionlm.core.records import JsonlWriter, read_json, read_jsonl
from scionlm.data import Ledger, Mixture, Order, SamplePlan
from scionlm.data.mixing.ledger import LEDGER, plan_facts, read_consumed
from scionlm.evaluation.loss import domain_losses
from scionlm.parallel.runtime import Runtime, random_state
from scionlm.recipes.config_data import ReweightConfig
from scionlm.recipes.reweighting import EVALUATION_S, Reweighter
from scionlm.schedules import Sizes, build_schedule
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.loop import Session, Stage, fit, take_up
from scionlm.train.metrics import Metrics
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.saver import Saver

STEPS, SEQUENCES, SEQ_LEN = 9, 6, 24
EVALUATE, REWEIGHT = 3, 2  # both at step 6
SHARES = {"alpha": 0.7, "beta": 0.3}
CLOCKS = {"time/elapsed_s", "speed/tokens_per_s", "speed/data_share", "memory/peak_bytes", EVALUATION_S}


class Stop:
    """Asks to stop after a step, inside the n-th measurement of a kind, or never."""

    def __init__(self, after: int | None = None, inside: tuple[str, int] | None = None) -> None:
        self.requested = False
        self._after, self._inside = after, inside
        self.measured = {"evaluate": 0, "reweight": 0}

    def step_done(self, step: int) -> None:
        self.requested |= step == self._after

    def measuring(self, kind: str) -> None:
        self.measured[kind] += 1
        self.requested |= (kind, self.measured[kind]) == self._inside

    def agreed(self) -> bool:
        return self.requested

    def check(self) -> None:
        if self.requested:
            raise StoppedError("stopped on request")


class Killed(Exception):
    """A kill: nothing is saved."""


class Run:
    """A run with dropout, held-out evaluations and moving weights.

    Attributes:
        seen: The bytes of each batch that was trained on.
        random: The random state at the end.
    """

    def __init__(self, folder: Path, data, **order) -> None:
        self.folder, self.data = folder, data
        folder.mkdir(exist_ok=True)
        self.objective = Objective(tiny_model(attention_dropout=0.1), torch.float32)
        optimizer = Optimizer(self.objective.model, OptimizerSettings())
        self.learner = Learner(self.objective, optimizer, Guard(0))
        self.order = Order(SEQ_LEN, 4, **order)
        streams = {name: data.stream(name, "train") for name in SHARES}
        self.plan = SamplePlan(streams, Mixture(SHARES), self.order)
        self.seen: list[bytes] = []
        self.stop = Stop()

    def losses(self) -> dict[str, float]:
        losses = domain_losses(self.objective.token_nll, self.data, list(SHARES), SEQ_LEN, 60)
        return {name: loss.nll for name, loss in losses.items()}

    def evaluate(self) -> dict:
        self.stop.measuring("evaluate")
        self.stop.check()
        return {f"eval/{name}/nll_nats": nll for name, nll in self.losses().items()}

    def measure(self) -> dict[str, float]:
        self.stop.measuring("reweight")
        losses = self.losses()
        self.stop.check()
        return losses

    def fit(self, stop: Stop | None = None, kill_at: int = 0, every=1000, reweight=True, evaluate_every=EVALUATE):
        self.stop = stop or Stop()
        torch.manual_seed(0)
        take, batch = self.plan.take, self.plan.batch

        def taking(count: int):
            step = self.plan.slot // SEQUENCES + 1
            if step == kill_at:
                raise Killed
            samples = take(count)
            self.stop.step_done(step)
            return samples

        def reading(samples):
            made = batch(samples)
            self.seen.append(made.input_ids.tobytes())
            return made

        self.plan.take, self.plan.batch = taking, reading
        config = ReweightConfig(rule="paper", step_size=40.0)
        references = {"alpha": 4.0, "beta": 4.0}
        moving = None
        if reweight:
            moving = Reweighter(config, REWEIGHT, self.plan, SEQUENCES, references, SHARES, self.measure)
        metrics = Metrics(JsonlWriter(self.folder / "metrics.jsonl", "metrics"))
        ledger = Ledger(self.folder / LEDGER, plan_facts(self.data, list(SHARES), self.order, None))
        stage = Stage(
            name="main", index=0, first_step=0, steps=STEPS, plan=self.plan, windows_id="w", order="main",
            schedule=build_schedule("cosine", Sizes(STEPS, 2, floor=0.1)), lr=3e-3, grad_clip=1.0,
            sequences_per_step=SEQUENCES, seq_len=SEQ_LEN, micro_batch_size=4, ledger=ledger, reweighting=moving,
        )  # fmt: skip
        store = CheckpointStore(self.folder / "checkpoints", keep=20)
        runtime = Runtime("cpu", "a processor", 2, "fp32")
        session = Session(
            "test", STEPS, evaluate_every, self.evaluate, metrics, Saver(store, every), self.stop, runtime
        )
        position = Position()
        try:
            take_up(store.newest(), self.learner, stage, position, session)
            fit(self.learner, stage, position, session)
        finally:
            self.random = torch.get_rng_state()
            metrics.close()
            ledger.close()

    def metrics(self) -> list[dict]:
        lines = read_jsonl(self.folder / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]

    def weights(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.objective.model.parameters())

    def consumed(self) -> tuple:
        consumed = read_consumed(self.folder)
        in_order = consumed.samples()
        return consumed.counts, consumed.phases, [next(in_order) for _ in range(consumed.num_samples)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_folder) -> Run:
    """The run that is never stopped."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", data_folder)
    run.fit(every=1)
    return run


def same(whole: Run, parts: Run, seen: list[bytes]) -> None:
    assert parts.weights() == whole.weights()
    assert seen == whole.seen
    assert parts.metrics() == whole.metrics()
    assert parts.consumed() == whole.consumed()
    assert parts.plan.state() == whole.plan.state()


def test_the_weights_move_by_what_is_measured_and_act_on_the_next_batch(whole):
    moved = [line for line in whole.metrics() if "reweight/alpha/weight" in line]
    assert [line["step"] for line in moved] == [2, 4, 6, 8]  # and not after the last
    assert len({line["reweight/alpha/weight"] for line in moved}) == 4
    _, phases, samples = whole.consumed()
    assert [phase["slot"] for phase in phases] == [0, *(step * SEQUENCES for step in (2, 4, 6, 8))]
    for phase in phases[1:]:
        period = samples[phase["slot"] : phase["slot"] + REWEIGHT * SEQUENCES]
        counts = [sum(sample.domain == name for sample in period) for name in SHARES]
        if len(period) == REWEIGHT * SEQUENCES:
            assert counts == phase["weights"]
    for line, phase in zip(moved, phases[1:], strict=True):
        alpha = phase["weights"][0] / sum(phase["weights"])
        assert alpha == pytest.approx(line["reweight/alpha/weight"], abs=2 / (REWEIGHT * SEQUENCES))


@pytest.mark.parametrize("after", range(1, STEPS))
def test_stopped_after_any_step_and_resumed_is_never_stopped(tmp_path, data_folder, whole, after):
    first = Run(tmp_path / "run", data_folder)
    with pytest.raises(StoppedError):
        first.fit(Stop(after))
    second = Run(tmp_path / "run", data_folder)
    second.fit()
    same(whole, second, first.seen + second.seen)


def listed_once(lines: list[dict]) -> list[dict]:
    """Return the lines of a ledger; a resumed run may list the phase it is in once more."""
    known: list[dict] = []
    result = []
    for line in lines:
        new = [phase for phase in line.get("phases", ()) if phase not in known]
        known += new
        result.append(line | {"phases": new})
    return result


@pytest.mark.parametrize(("after", "lost"), [(1, False), (5, False), (5, True)])
def test_the_ledger_of_a_resumed_run_is_that_of_one_never_stopped(tmp_path, data_folder, whole, after, lost):
    """Checkpoints after each step, in both, so that both have the same lines; the newest may be lost, too."""
    with pytest.raises(StoppedError):
        Run(tmp_path / "run", data_folder).fit(Stop(after), every=1)
    if lost:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{after:08d}")
    Run(tmp_path / "run", data_folder).fit(every=1)
    assert listed_once(read_jsonl(tmp_path / "run" / LEDGER)) == listed_once(read_jsonl(whole.folder / LEDGER))


@pytest.mark.parametrize("kill_at", [2, 5, 6, 7, 9])
def test_killed_and_resumed_from_the_last_checkpoint_is_never_stopped(tmp_path, data_folder, whole, kill_at):
    first = Run(tmp_path / "run", data_folder)
    with pytest.raises(Killed):
        first.fit(kill_at=kill_at, every=3)
    second = Run(tmp_path / "run", data_folder)
    second.fit()
    lost = (kill_at - 1) % 3
    same(whole, second, first.seen[: len(first.seen) - lost] + second.seen)


@pytest.mark.parametrize("time", [1, 2, 3, 4])
def test_stopped_inside_an_update_it_is_owed_and_done_on_resume(tmp_path, data_folder, whole, time):
    first = Run(tmp_path / "run", data_folder)
    with pytest.raises(StoppedError):
        first.fit(Stop(inside=("reweight", time)))
    step = REWEIGHT * time
    state = read_json(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json")
    assert (state["reweight_owed"], state["evaluation_owed"]) == (True, False)
    assert state["plan"]["phase"]["slot"] == (step - REWEIGHT) * SEQUENCES * (time > 1)  # the weights have not moved
    assert not [line for line in first.metrics() if line["step"] == step and "reweight/alpha/weight" in line]
    second = Run(tmp_path / "run", data_folder)
    second.fit()
    assert second.stop.measured["reweight"] == 4 - time + 1
    same(whole, second, first.seen + second.seen)


@pytest.mark.parametrize("time", [1, 2, 3])
def test_stopped_inside_an_evaluation_it_is_owed_and_so_is_the_update_after_it(tmp_path, data_folder, whole, time):
    first = Run(tmp_path / "run", data_folder)
    with pytest.raises(StoppedError):
        first.fit(Stop(inside=("evaluate", time)))
    step = EVALUATE * (time - 1)
    state = read_json(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json")
    assert (state["evaluation_owed"], state["reweight_owed"]) == (True, step == 6)
    second = Run(tmp_path / "run", data_folder)
    second.fit()
    same(whole, second, first.seen + second.seen)


def test_stopped_again_while_catching_up_nothing_is_measured_twice(tmp_path, data_folder, whole):
    """At step 6 both are due: the first stop comes inside the evaluation, the second inside the update after it."""
    runs = []
    for inside in (("evaluate", 3), ("reweight", 1), None):
        runs.append(Run(tmp_path / "run", data_folder))
        try:
            runs[-1].fit(Stop(inside=inside))
        except StoppedError:
            assert inside
    same(whole, runs[-1], [batch for run in runs for batch in run.seen])


@pytest.mark.parametrize("forgotten", ["plan", "reweight", "rng"])
def test_resuming_without_a_part_of_the_state_would_differ(tmp_path, data_folder, whole, monkeypatch, forgotten):
    """The control of all the above."""
    with pytest.raises(StoppedError):
        Run(tmp_path / "run", data_folder).fit(Stop(7))
    second = Run(tmp_path / "run", data_folder)
    newest = CheckpointStore.newest

    def forgetful(self):
        checkpoint = newest(self)
        state = checkpoint.state
        if forgotten == "rng":
            state["random"] = random_state()
        if forgotten == "reweight":
            state["reweight"]["weights"] = SHARES
        if forgotten == "plan":
            counts = state["plan"]["phase"]["counts"]
            state["plan"]["phase"] = {"slot": 0, "weights": [7, 3], "counts": counts}
        return checkpoint

    torch.manual_seed(1)
    monkeypatch.setattr(CheckpointStore, "newest", forgetful)
    second.fit()
    assert second.weights() != whole.weights()


def test_evaluation_moves_neither_the_loader_nor_the_random_state(tmp_path, data_folder):
    """Trained with dropout, so that any random number that evaluation took would show in the weights."""
    often, never = Run(tmp_path / "often", data_folder), Run(tmp_path / "never", data_folder)
    often.fit(reweight=False, evaluate_every=1)
    never.fit(reweight=False, evaluate_every=0)
    assert often.stop.measured["evaluate"] == STEPS
    assert never.stop.measured["evaluate"] == 1
    assert often.weights() == never.weights()
    assert often.seen == never.seen
    assert torch.equal(often.random, never.random)


def test_evaluating_twice_gives_the_same_and_takes_no_random_number(tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder)
    run.objective.eval()
    random, state, numpy_state = torch.get_rng_state(), run.plan.state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = run.losses()
    assert run.losses() == first
    assert torch.equal(torch.get_rng_state(), random)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert run.plan.state() == state
    run.objective.train()
    assert run.losses() != first  # the control: with dropout it would be another number, and random
    assert not torch.equal(torch.get_rng_state(), random)


def test_an_update_that_changes_nothing_changes_nothing_in_training(tmp_path, data_folder, monkeypatch):
    """Measuring is free: with the plan left alone, the run is that without measurements."""
    monkeypatch.setattr(SamplePlan, "set_weights", lambda self, weights, slots: None)
    measured, plain = Run(tmp_path / "measured", data_folder), Run(tmp_path / "plain", data_folder)
    measured.fit()
    plain.fit(reweight=False)
    assert measured.stop.measured["reweight"] == 4
    assert measured.weights() == plain.weights()
    assert measured.seen == plain.seen


def test_a_domain_without_a_sequence_in_a_step_has_no_loss_there(tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder)
    run.plan.set_weights({"alpha": 0.9, "beta": 0.1}, STEPS * SEQUENCES)
    run.fit(evaluate_every=0, reweight=False)
    lines = [line for line in run.metrics() if "train/nll_nats" in line]
    assert all("train/alpha/nll_nats" in line for line in lines)
    assert 1 <= sum("train/beta/nll_nats" in line for line in lines) <= 5
    assert all(value is not None for line in lines for value in line.values())
    both = next(line for line in lines if "train/beta/nll_nats" in line)
    low, high = sorted((both["train/alpha/nll_nats"], both["train/beta/nll_nats"]))
    assert low <= both["train/nll_nats"] <= high


def test_where_a_domain_ends_the_run_saves_and_says_so(tmp_path, data_folder):
    windows = Run(tmp_path / "other", data_folder).plan.num_windows("beta")
    run = Run(tmp_path / "run", data_folder, max_epochs={"beta": 7.5 / windows}, exhausted="stop")
    with pytest.raises(DataError, match="'beta' is exhausted"):
        run.fit(reweight=False)
    step = len(run.seen)
    assert 2 < step < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert read_consumed(run.folder).num_samples == step * SEQUENCES
    longer = Run(tmp_path / "run", data_folder)
    longer.order = run.order
    longer.fit(reweight=False)  # with the limit taken away it goes on from there
    assert len(longer.seen) == STEPS - step
