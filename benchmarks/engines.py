"""Training speed of Scion beside a bare compiled step, the Hugging Face Trainer and litgpt: same model, data and batch.

    python benchmarks/engines.py [--engines bare-compiled,scion-loop-compiled,...] [--litgpt-python PATH] [--json FILE]

Each engine lives in a process of its own, so that its peak memory is its own, and the processes take turns of a few
steps, forward and then backward through the list, so that a noisy machine is noisy for all. litgpt needs its own
environment (`python -m venv E && E/bin/pip install litgpt==0.5.13`, with the same torch); without `--litgpt-python` it
is left out. The model has SmolLM2-135M's width, first layers and vocabulary, with random weights; weights and AdamW are
float32 wherever an engine has that beside bf16. Compilers start with an empty cache. `bare` is a hand-written step:
weights cast on the way into the forward pass, cross-entropy on full logits, clipping, fused AdamW.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LR, BETAS, EPS, DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0
SEED = 20


class Clock:
    """Told of every step: times it, and between two turns waits for the parent's word."""

    def __init__(self, warm_up):
        self.left, self.times, self.warm, self.last = warm_up, [], False, time.perf_counter()

    def __call__(self, loss=None):
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.left -= 1
        if self.left == 0:
            word = {"times": self.times, "loss": loss, "peak_memory": peak_memory(), "versions": versions()}
            print("@" + json.dumps(word), flush=True)
            # An end of the input is the end, without what loops do at theirs.
            self.left, self.times = int(sys.stdin.readline() or os._exit(0)), []
        self.last = time.perf_counter()


def peak_memory():
    found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) * 1024


def versions():
    return {name: version(name) for name in ("torch", "transformers", "litgpt", "lightning") if name in sys.modules}


def load_batches(options):
    """All batches of the packed file, [batches, sequences, seq_len + 1]."""
    ids = np.load(options.data, mmap_mode="r")
    return ids[: len(ids) // options.sequences * options.sequences].reshape(-1, options.sequences, ids.shape[1])


def open_plan(options):
    from scionlm.data import DataFolder, Mixture, Order, SamplePlan

    data = DataFolder(Path(options.folder))
    streams = {domain: data.stream(domain, "train") for domain in data.domains}
    return SamplePlan(streams, Mixture(dict.fromkeys(streams, 1.0)), Order(options.seq_len))


def pack(options, path):
    """Write what Scion's loop will train on for the engines that read a plain array."""
    plan, rows = open_plan(options), []
    for _ in range(options.batches):
        batch = plan.batch(plan.take(options.sequences))
        if batch.position_ids is not None or (batch.labels[:, :-1] != batch.input_ids[:, 1:]).any():
            raise SystemExit("the data are not plainly packed")
        rows.append(np.concatenate([batch.input_ids, batch.labels[:, -1:]], axis=1))
    np.save(path, np.concatenate(rows).astype(np.int32))


def llama(options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=options.layers, use_cache=False))


def run_bare(options, clock, mode):
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(options.threads)
    model = llama(options)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim == 2], "weight_decay": DECAY},
         {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip

    def loss_of(ids, labels):
        weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        out = torch.func.functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})
        return F.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten())

    if mode == "compiled":
        loss_of = torch.compile(loss_of)
    while True:
        for batch in load_batches(options):
            ids = torch.from_numpy(batch.astype(np.int64))
            loss = loss_of(ids[:, :-1], ids[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            clock(float(loss.detach()))


def scion_parts(options, mode):
    import torch

    from scionlm.parallel.runtime import start_runtime
    from scionlm.train.objective import Objective
    from scionlm.train.optimizer import Optimizer, OptimizerSettings

    runtime = start_runtime("bf16")
    torch.set_num_threads(options.threads)
    model = llama(options)
    objective = Objective(model, torch.bfloat16)
    if mode == "compiled":
        objective.compile()
    settings = OptimizerSettings(betas=BETAS, eps=EPS, weight_decay=DECAY)
    return runtime, objective, Optimizer(model, settings)


def run_scion_step(options, clock, mode):
    from scionlm.data import Batch
    from scionlm.train.step import train_step

    _, objective, optimizer = scion_parts(options, mode)
    while True:
        for ids in load_batches(options):
            batch = Batch(ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64))
            clock(train_step(objective, optimizer, batch, options.sequences, LR, CLIP).nll)


def run_scion_loop(options, clock, mode):
    """`fit`, with all that it does at a step: taking samples, guarding, measuring, writing metrics."""
    from scionlm.core.records import JsonlWriter
    from scionlm.core.signals import StopRequest
    from scionlm.data import Ledger
    from scionlm.schedules import Sizes, build_schedule
    from scionlm.train.checkpoint import CheckpointStore
    from scionlm.train.guard import Guard
    from scionlm.train.learner import Learner, Position
    from scionlm.train.loop import Session, Stage, fit, take_up
    from scionlm.train.metrics import Metrics
    from scionlm.train.saver import Saver

    class Ticking(Metrics):
        def write(self, record):
            super().write(record)
            clock(record["train/nll_nats"])

    runtime, objective, optimizer = scion_parts(options, mode)
    learner = Learner(objective, optimizer, Guard(0))
    work = Path(options.work)
    plan = open_plan(options)
    total = 5000  # of the longest run that writes metrics at every step

    stage = Stage(
        name="main", index=0, first_step=0, steps=total, plan=plan, windows_id="", order="main",
        schedule=build_schedule("constant", Sizes(total)), lr=LR, grad_clip=CLIP,
        sequences_per_step=options.sequences, seq_len=options.seq_len, micro_batch_size=options.sequences,
        ledger=Ledger(work / "ledger.jsonl", {}),
    )  # fmt: skip
    metrics = Ticking(JsonlWriter(work / "metrics.jsonl", "metrics"))
    saver = Saver(CheckpointStore(work / "checkpoints", keep=1), every=1e9)
    session = Session("engines", total, 0, dict, metrics, saver, StopRequest(), runtime, 1.0)
    position = Position(evaluation_owed=False)
    take_up(None, learner, stage, position, session)
    position.evaluation_owed = False
    clock.last = time.perf_counter()
    fit(learner, stage, position, session)


def run_trainer(options, clock, mode):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(options.threads)
    ids = np.load(options.data)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(ids)

        def __getitem__(self, index):
            row = torch.from_numpy(ids[index, : options.seq_len].astype(np.int64))
            return {"input_ids": row, "labels": row}  # the model shifts them itself

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock()

    arguments = TrainingArguments(
        output_dir=str(Path(options.work) / "trainer"), per_device_train_batch_size=options.sequences, max_steps=5000,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_epsilon=EPS, max_grad_norm=CLIP, optim="adamw_torch_fused", bf16=mode != "fp32", use_cpu=True,
        torch_compile=mode == "bf16-compiled", save_strategy="no", report_to="none", logging_steps=5000,
        disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    Trainer(llama(options), arguments, train_dataset=Rows(), callbacks=[Tick()]).train()


def run_litgpt(options, clock, mode):
    """The step of litgpt's `pretrain.py`, with its model, its loss and Fabric; that always compiles."""
    import lightning
    import torch
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    torch.set_num_threads(options.threads)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true" if mode == "fp32" else "bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    config = Config(
        name="shape", block_size=options.seq_len, n_layer=options.layers, n_embd=SHAPE["hidden_size"],
        vocab_size=SHAPE["vocab_size"], padded_vocab_size=SHAPE["vocab_size"], n_head=SHAPE["num_attention_heads"],
        n_query_groups=SHAPE["num_key_value_heads"], intermediate_size=SHAPE["intermediate_size"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model) if mode == "bf16-compiled" else model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    while True:
        for batch in load_batches(options):
            ids = torch.from_numpy(batch.astype(np.int64))
            loss = chunked_cross_entropy(model(ids[:, :-1].contiguous()), ids[:, 1:].contiguous())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
            clock(float(loss.detach()))


RUNNERS = {
    "bare": run_bare, "scion-step": run_scion_step, "scion-loop": run_scion_loop, "trainer": run_trainer,
    "litgpt": run_litgpt,
}  # fmt: skip
ENGINES = [
    "bare-eager", "bare-compiled", "scion-step-eager", "scion-step-compiled", "scion-loop-compiled",
    "trainer-fp32", "trainer-bf16", "trainer-bf16-compiled", "litgpt-fp32", "litgpt-bf16", "litgpt-bf16-compiled",
]  # fmt: skip


class Engine:
    """A process that steps when it is told to."""

    def __init__(self, name, options, work):
        self.name, self.seconds, self.facts = name, [], {}
        python = options.litgpt_python if name.startswith("litgpt") else sys.executable
        mine = work / name
        mine.mkdir()
        words = [python, __file__, "--run", name, "--work", str(mine), "--data", str(work / "data.npy")]
        for key in ("folder", "layers", "sequences", "seq_len", "threads", "warm_up"):
            words += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(mine / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        self._log = (mine / "log").open("w")
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.first = self._answer()[0]

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith("@"):
                self.facts = json.loads(line[1:])
                return self.facts["times"]
        raise SystemExit(f"{self.name} failed:\n{Path(self._log.name).read_text()[-3000:]}")

    def turn(self, steps):
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds += self._answer()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def table(engines, peak, flops, tokens):
    rows = []
    for engine in engines:
        median, best = statistics.median(engine.seconds), min(engine.seconds)
        low, _, high = statistics.quantiles(engine.seconds)
        rows.append({
            "engine": engine.name, "median_tokens_per_s": tokens / median, "best_tokens_per_s": tokens / best,
            "quartiles": [tokens / high, tokens / low], "share_of_peak": flops * tokens / median / peak,
            "peak_memory": engine.facts["peak_memory"], "first_step_s": engine.first, "loss": engine.facts["loss"],
            "versions": engine.facts["versions"], "seconds": engine.seconds,
        })  # fmt: skip
    by_name = {row["engine"]: row["median_tokens_per_s"] for row in rows}
    bare = by_name.get("bare-compiled")
    scion = by_name.get("scion-loop-compiled") or by_name.get("scion-step-compiled")
    print(f"{'tokens/s':22s} median (quartiles)   best  of peak  memory  first step  / bare  Scion / it")
    for row in rows:
        row["of_bare"] = bare and row["median_tokens_per_s"] / bare
        row["scion_over_it"] = scion and scion / row["median_tokens_per_s"]
        low, high = row["quartiles"]
        print(
            f"{row['engine']:22s} {row['median_tokens_per_s']:6.0f} ({low:4.0f}-{high:4.0f}) {row['best_tokens_per_s']:9.0f}"
            f" {100 * row['share_of_peak']:6.1f} %  {row['peak_memory'] / 2**20:4.0f} MiB {row['first_step_s']:8.1f} s"
            f" {row['of_bare'] or 0:8.3f} {row['scion_over_it'] or 0:8.3f}"
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of: %(default)s")
    parser.add_argument("--litgpt-python", help="the interpreter of litgpt's environment")
    parser.add_argument("--folder", help="a folder of prepared data; the demo's where it is not given")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first turn; the first one compiles")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    for name in ("run", "work", "data"):  # of a process that is an engine
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind = next(kind for kind in RUNNERS if options.run.startswith(kind))
        RUNNERS[kind](options, Clock(options.warm_up), options.run.removeprefix(f"{kind}-"))
        return
    compare(options)


def compare(options):
    import torch
    from train_step import matmul_peak
    from transformers import LlamaConfig

    from scionlm.families import flops_per_token
    from scionlm.parallel.runtime import start_runtime

    names = options.engines.split(",")
    if unknown := set(names) - set(ENGINES):
        raise SystemExit(f"no engines: {', '.join(sorted(unknown))}")
    if not options.litgpt_python:
        print("litgpt is left out: no --litgpt-python")
        names = [name for name in names if not name.startswith("litgpt")]
    torch.set_num_threads(options.threads)
    options.batches = options.warm_up + options.rounds * options.steps + 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        if not options.folder:
            from scionlm.recipes.demo_data import prepare_demo_data

            prepare_demo_data("smollm2-135m", work / "demo")
            options.folder = str(work / "demo")
        pack(options, work / "data.npy")
        engines, peaks = [], [matmul_peak(torch.bfloat16)]
        for name in names:
            engines.append(Engine(name, options, work))
            stack.callback(engines[-1].close)
            print(f"{name}: first step {engines[-1].first:.1f} s", flush=True)
        for number in range(options.rounds):
            for engine in engines[:: 1 if number % 2 == 0 else -1]:
                engine.turn(options.steps)
            peaks.append(matmul_peak(torch.bfloat16))
        config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers).to_dict()
        flops = flops_per_token(config, options.seq_len)
        print(
            f"{start_runtime().name}, {options.threads} threads, {options.sequences} x {options.seq_len} tokens, "
            f"{options.layers} layers; {options.rounds} turns of {options.steps} steps; bf16 product peak "
            f"{max(peaks) / 1e12:.3f} TFLOP/s (best of ten, round by round: {', '.join(f'{p / 1e12:.3f}' for p in peaks)})"
        )
        rows = table(engines, max(peaks), flops, options.sequences * options.seq_len)
    if options.json:
        options.json.write_text(json.dumps({"peaks": peaks, "flops_per_token": flops, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
