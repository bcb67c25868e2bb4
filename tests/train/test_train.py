"""The training step, the loop, checkpoints: exactness first."""

import dataclasses
import json
import math

import pytest
import torch

from factories import tiny_model
from scionlm.core.errors import DivergenceError, StoppedError
from scionlm.core.records import JsonlWriter, read_jsonl
from scionlm.data import Ledger, Mixture, Order, SamplePlan
from scionlm.data.mixing.windows import IGNORE
from scionlm.parallel.runtime import Runtime
from scionlm.schedules import Sizes, build_schedule
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.loop import Session, Stage, fit, take_up
from scionlm.train.metrics import Metrics
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.saver import Saver
from scionlm.train.step import train_step

STEPS, SEQUENCES, SEQ_LEN, LR = 8, 6, 24, 3e-3
SCHEDULE = build_schedule("cosine", Sizes(STEPS, 2, floor=0.1))
RUNTIME = Runtime("cpu", "a processor", 2, "fp32")


class Stop:
    """Asks to stop once `at` checks of `requested` inside the loop have been made."""

    def __init__(self, plan=None, at_slot=None):
        self._plan, self._at = plan, at_slot

    @property
    def requested(self):
        return self._at is not None and self._plan.state()["slot"] >= self._at

    def agreed(self):
        return self.requested

    def check(self):
        pass


def make_stage(plan, ledger, steps=STEPS, micro=4, **changes):
    stage = Stage(
        name="main", index=0, first_step=0, steps=steps, plan=plan, windows_id="w", order="main", schedule=SCHEDULE,
        lr=LR, grad_clip=1.0, sequences_per_step=SEQUENCES, seq_len=SEQ_LEN, micro_batch_size=micro, ledger=ledger,
    )  # fmt: skip
    return dataclasses.replace(stage, **changes)


class Run:
    """One stage of training in a folder, as a recipe puts it together."""

    def __init__(self, folder, data, seed=0, checkpoint_every=1000, dtype=torch.float32, skip=0, evaluate_every=3):
        torch.manual_seed(seed)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.objective = Objective(tiny_model(seed=seed), dtype)
        self.optimizer = Optimizer(self.objective.model, OptimizerSettings())
        self.learner = Learner(self.objective, self.optimizer, Guard(skip))
        streams = {name: data.stream(name, "train") for name in data.domains}
        self.plan = SamplePlan(streams, Mixture({"alpha": 0.7, "beta": 0.3}), Order(SEQ_LEN, seed))
        self.every, self.evaluate_every = checkpoint_every, evaluate_every
        self.evaluations = 0

    def _evaluate(self):
        self.evaluations += 1
        return {"eval/alpha/nll_nats": 1.0}

    def fit(self, stop_after=None, micro=4):
        metrics = Metrics(JsonlWriter(self.folder / "metrics.jsonl", "metrics"))
        ledger = Ledger(self.folder / "ledger.jsonl", {})
        store = CheckpointStore(self.folder / "checkpoints", keep=2)
        saver = Saver(store, self.every)
        stop = Stop(self.plan, stop_after and stop_after * SEQUENCES)
        session = Session("test", STEPS, self.evaluate_every, self._evaluate, metrics, saver, stop, RUNTIME)
        stage, position = make_stage(self.plan, ledger, micro=micro), Position()
        take_up(store.newest(), self.learner, stage, position, session)
        try:
            fit(self.learner, stage, position, session)
        finally:
            metrics.close()
            ledger.close()

    @property
    def weights(self):
        return {name: p.detach().clone() for name, p in self.objective.model.named_parameters()}

    def losses(self):
        return [r["train/nll_nats"] for r in read_jsonl(self.folder / "metrics.jsonl") if "train/nll_nats" in r]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_loss(tmp_path, data_folder):
    run = Run(tmp_path / "a", data_folder)
    run.fit()
    losses = run.losses()
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop_after", [1, 3, 7])
def test_stopped_and_resumed_equals_never_stopped_bitwise(tmp_path, data_folder, stop_after, dtype):
    whole = Run(tmp_path / "whole", data_folder, dtype=dtype)
    whole.fit()
    first = Run(tmp_path / "parts", data_folder, dtype=dtype)
    with pytest.raises(StoppedError):
        first.fit(stop_after=stop_after)
    second = Run(tmp_path / "parts", data_folder, seed=0, dtype=dtype)
    with torch.no_grad():  # whatever the fresh process starts from must not matter
        for parameter in second.objective.model.parameters():
            parameter.add_(1.0)
    second.fit()
    assert equal(whole.weights, second.weights)
    assert whole.losses() == second.losses()
    assert second.evaluations == whole.evaluations - first.evaluations


def test_resuming_without_the_optimizers_moments_would_differ(tmp_path, data_folder, monkeypatch):
    """Negative control of the test above."""
    whole = Run(tmp_path / "whole", data_folder)
    whole.fit()
    first = Run(tmp_path / "parts", data_folder)
    with pytest.raises(StoppedError):
        first.fit(stop_after=3)
    second = Run(tmp_path / "parts", data_folder)
    monkeypatch.setattr(Optimizer, "load", lambda *arguments, **keywords: None)
    second.fit()
    assert not equal(whole.weights, second.weights)


def test_metrics_after_the_checkpoint_are_not_doubled_by_a_resume(tmp_path, data_folder):
    first = Run(tmp_path / "a", data_folder, checkpoint_every=2)
    with pytest.raises(StoppedError):
        first.fit(stop_after=5)
    newest = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():  # as if the kill had come before this checkpoint
        file.unlink()
    newest.rmdir()
    Run(tmp_path / "a", data_folder, checkpoint_every=2).fit()
    steps = [r["step"] for r in read_jsonl(tmp_path / "a" / "metrics.jsonl") if "train/nll_nats" in r]
    assert steps == list(range(1, STEPS + 1))


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, data_folder, capsys):
    whole = Run(tmp_path / "whole", data_folder)
    whole.fit()
    first = Run(tmp_path / "a", data_folder, checkpoint_every=2)
    with pytest.raises(StoppedError):
        first.fit(stop_after=5)
    newest = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000005"
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "weights.safetensors").write_bytes(data)
    second = Run(tmp_path / "a", data_folder)
    second.fit()
    assert "step-00000005" in capsys.readouterr().err
    assert equal(whole.weights, second.weights)


def test_only_the_newest_checkpoints_stay_and_nothing_half_written(tmp_path, data_folder):
    Run(tmp_path / "a", data_folder, checkpoint_every=1).fit()
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000007", "step-00000008"]  # the end of a stage stays for good
    for path in (tmp_path / "a" / "checkpoints").rglob("*"):
        assert path.suffix in (".safetensors", ".json", "")


@pytest.mark.parametrize("micro", [1, 4, 5])
def test_micro_batches_give_the_step_of_the_whole_batch(data_folder, tmp_path, micro):
    def step(size):
        run = Run(tmp_path / str(size), data_folder)
        batch = run.plan.batch(run.plan.take(SEQUENCES))
        labels = batch.labels.copy()
        labels[0, :20] = IGNORE  # uneven numbers of predicted tokens
        batch = dataclasses.replace(batch, labels=labels)
        gradients = {}
        # Of the gradients, since an update by AdamW would make the sign of a rounding error as large as a weight's.
        run.optimizer.step = lambda lr, divisor: gradients.update(
            {name: p.grad.clone() for name, p in run.objective.model.named_parameters()}
        )
        return train_step(run.objective, run.optimizer, batch, size, lr=1e-3, clip=0.5), gradients

    (whole, gradients), (parts, other) = step(SEQUENCES), step(micro)
    assert whole.num_tokens == parts.num_tokens == SEQUENCES * SEQ_LEN - 20
    assert parts.nll == pytest.approx(whole.nll, abs=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - other[name]).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize(("clip", "clips"), [(0.0, False), (0.01, True), (1e9, False)])
def test_gradients_are_clipped_as_torch_clips_them(data_folder, tmp_path, clip, clips):
    run, gradients = Run(tmp_path / "a", data_folder), {}
    batch = run.plan.batch(run.plan.take(SEQUENCES))

    def keep(lr, divisor):
        gradients.update({p: p.grad.clone() for p in run.optimizer.parameters}, divisor=divisor)

    run.optimizer.step = keep
    norm = train_step(run.objective, run.optimizer, batch, SEQUENCES, lr=1e-3, clip=clip).grad_norm
    divisor = gradients.pop("divisor")
    assert (divisor > 1) == clips
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    assert float(torch.nn.utils.clip_grad_norm_(gradients, clip or torch.inf)) == pytest.approx(norm)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient / divisor, parameter.grad, rtol=1e-6, atol=0)


def test_the_objective_is_the_plain_cross_entropy_with_its_gradient(data_folder, tmp_path):
    run = Run(tmp_path / "a", data_folder)
    batch = run.plan.batch(run.plan.take(4))
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    loss, count, _ = run.objective(ids, labels)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in run.objective.model.named_parameters()}
    run.objective.model.zero_grad()
    log_p = torch.log_softmax(run.objective.model(ids).logits, -1)
    plain = -log_p.gather(-1, labels[..., None]).sum()
    plain.backward()
    assert int(count) == ids.numel()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    for name, parameter in run.objective.model.named_parameters():
        assert torch.allclose(mine[name], parameter.grad, rtol=1e-4, atol=1e-4), name


def test_bf16_computes_in_bf16_and_keeps_float32_weights_and_gradients(data_folder, tmp_path):
    run = Run(tmp_path / "a", data_folder, dtype=torch.bfloat16)
    exact = Run(tmp_path / "b", data_folder)
    batch = run.plan.batch(run.plan.take(4))
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    seen = []
    run.objective.model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    loss, _, _ = run.objective(ids, labels)
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in run.objective.model.parameters())
    expected, _, _ = exact.objective(ids, labels)
    mine, theirs = float(loss.detach()), float(expected.detach())
    assert mine == pytest.approx(theirs, rel=0.02)
    assert mine != theirs
    assert run.objective.model.lm_head.weight is run.objective.model.model.embed_tokens.weight


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(data_folder, tmp_path):
    run = Run(tmp_path / "a", data_folder)
    with torch.no_grad():
        run.objective.model.model.norm.weight[0] = math.inf
    before = run.weights
    with pytest.raises(DivergenceError, match=r"step 1 .*alpha"):
        run.fit()
    assert equal(before, run.weights)


def test_the_learning_rate_in_use_is_the_schedules(tmp_path, data_folder):
    run = Run(tmp_path / "a", data_folder)
    run.fit()
    logged = [r["optim/lr"] for r in read_jsonl(tmp_path / "a" / "metrics.jsonl") if "optim/lr" in r]
    assert logged == [LR * SCHEDULE(step) for step in range(STEPS)]


def test_evaluation_does_not_move_training(tmp_path, data_folder):
    run, quiet = Run(tmp_path / "a", data_folder), Run(tmp_path / "b", data_folder, evaluate_every=0)
    run.fit()
    quiet.fit()
    assert quiet.evaluations == 1
    assert run.evaluations == 3
    assert equal(run.weights, quiet.weights)


def test_compiled_training_is_close_to_eager(tmp_path, data_folder):
    run, other = Run(tmp_path / "a", data_folder), Run(tmp_path / "b", data_folder)
    other.objective.compile(backend="aot_eager")  # needs no C++ compiler; the graph is the one that inductor gets
    batch = run.plan.batch(run.plan.take(SEQUENCES))
    mine = train_step(run.objective, run.optimizer, batch, SEQUENCES, lr=1e-3, clip=1.0)
    theirs = train_step(other.objective, other.optimizer, batch, SEQUENCES, lr=1e-3, clip=1.0)
    assert mine.nll == pytest.approx(theirs.nll, abs=1e-5)
    assert all(torch.allclose(run.weights[n], other.weights[n], atol=1e-5) for n in run.weights)


def test_ddp_does_not_cut_the_graphs_of_layers(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    run = Run(tmp_path / "a", data_folder)
    run.objective.compile(backend="aot_eager")
    assert torch._dynamo.config.optimize_ddp is False


def test_a_state_file_is_plain_json(tmp_path, data_folder):
    first = Run(tmp_path / "a", data_folder)
    with pytest.raises(StoppedError):
        first.fit(stop_after=2)
    state = json.loads((tmp_path / "a" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["format_version"] == 1
    assert state["plan"]["slot"] == 2 * SEQUENCES
