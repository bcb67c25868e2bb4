"""What the loop costs over a bare step, and what a checkpoint costs: one process, the same model, data and batch.

Bare is a hand-written step on a batch that is there already: forward, backward, clip, AdamW. The loop takes samples,
reads the batch, guards, measures and writes metrics. The two take turns, so that a noisy machine is noisy for both.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scionlm.core.records import JsonlWriter
from scionlm.core.signals import StopRequest
from scionlm.data import DataFolder, Ledger, Mixture, Order, SamplePlan
from scionlm.parallel.runtime import start_runtime
from scionlm.recipes.demo_data import prepare_demo_data
from scionlm.schedules import Sizes, build_schedule
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.loop import Session, Stage, fit, take_up
from scionlm.train.metrics import Metrics
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.saver import Saver

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def bare_step(objective, optimizer, parameters, ids, labels, rows):
    count = labels.numel()
    for some_ids, some_labels in zip(ids.split(rows), labels.split(rows), strict=True):
        loss, _, _ = objective(some_ids, some_labels)
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    runtime = start_runtime()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=options.layers))
    objective = Objective(model, runtime.compute_dtype)
    learner = Learner(objective, Optimizer(model, OptimizerSettings()), Guard(0))
    parameters = learner.optimizer.parameters
    plain = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare_demo_data("smollm2-135m", work / "data")
        data = DataFolder(work / "data")
        streams = {domain: data.stream(domain, "train") for domain in data.domains}
        plan = SamplePlan(streams, Mixture(dict.fromkeys(streams, 1.0)), Order(256))
        batch = plan.batch(plan.take(options.rows))
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        metrics, ledger = Metrics(JsonlWriter(work / "metrics.jsonl", "metrics")), Ledger(work / "ledger.jsonl", {})
        store = CheckpointStore(work / "checkpoints", keep=1)
        position, bare, looped = Position(evaluation_owed=False), [], []
        total = options.steps * (options.turns + 1)
        schedule = build_schedule("constant", Sizes(total))
        for turn in range(options.turns + 1):
            started = time.perf_counter()
            for _ in range(options.steps):
                bare_step(objective, plain, parameters, ids, labels, options.rows)
            bare.append((time.perf_counter() - started) / options.steps)
            stage = Stage(
                name="main", index=0, first_step=position.step, steps=options.steps, plan=plan, windows_id="",
                order="main", schedule=schedule, lr=1e-5, grad_clip=1.0, sequences_per_step=options.rows, seq_len=256,
                micro_batch_size=options.rows, ledger=ledger,
            )  # fmt: skip
            saver = Saver(store, every=1e9)
            session = Session("loop", total, 0, dict, metrics, saver, StopRequest(), runtime, 1.0)
            if turn == 0:
                take_up(None, learner, stage, position, session)
            saver.save = lambda *arguments, **options: 0.0  # the end of a stage saves; that is measured by itself below
            position.evaluation_owed = False
            started = time.perf_counter()
            fit(learner, stage, position, session)
            looped.append((time.perf_counter() - started) / options.steps)
        pairs = [b / a for a, b in zip(bare[1:], looped[1:], strict=True)]
        print(f"{runtime.name}, {runtime.threads} threads, {runtime.precision}, {options.layers} layers, "
              f"{options.rows} x 256 tokens, {options.turns} turns of {options.steps} steps each")  # fmt: skip
        print(f"bare step  {statistics.median(bare[1:]):.3f} s   loop  {statistics.median(looped[1:]):.3f} s")
        print(f"loop / bare, turn by turn: median {statistics.median(pairs):.4f}, "
              f"quartiles {statistics.quantiles(pairs)[0]:.4f} {statistics.quantiles(pairs)[2]:.4f}")  # fmt: skip
        overhead = [overhead_seconds(plan, options.rows) for _ in range(20)]
        print(f"taking samples and reading the batch: {1e3 * statistics.median(overhead):.2f} ms")
        saves, copies = [], []
        for step in range(1, 6):
            started = time.perf_counter()
            path = store.save({"step": step, "random": {}}, learner.tensors())
            saves.append(time.perf_counter() - started)
            copies.append(fsync_copy(path, work / "copy"))
            size = sum(file.stat().st_size for file in path.iterdir())
        save, copy = statistics.median(saves), statistics.median(copies)
        print(f"checkpoint of {size / 2**20:.0f} MiB: {save:.2f} s, {save / copy:.2f} x a copy with fsync "
              f"({copy:.2f} s); every 10 min that is {100 * save / 600:.2f} % of the time")  # fmt: skip
        metrics.close()
        ledger.close()


def overhead_seconds(plan, rows):
    started = time.perf_counter()
    plan.batch(plan.take(rows))
    return time.perf_counter() - started


def fsync_copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        with (target / file.name).open("wb") as out:
            shutil.copyfileobj(file.open("rb"), out, 2**22)
            out.flush()
            os.fsync(out.fileno())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
