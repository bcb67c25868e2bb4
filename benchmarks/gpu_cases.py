"""One case of `gpu.py` in a process of its own, which calls this file; what it finds goes to a file as it is found."""

import argparse
import contextlib
import fcntl
import itertools
import json
import statistics
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu import CASES, Case
from gpu_parity import parity_of
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scionlm.core.devices import gpu_by_name
from scionlm.core.machine import git_commit, peak_memory_bytes, versions
from scionlm.data import Batch
from scionlm.families import count_parameters, flops_per_token
from scionlm.families.models import random_model
from scionlm.parallel.runtime import start_runtime
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

TINYLLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "intermediate_size": 5632, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = TINYLLAMA | {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 512,
}  # fmt: skip
KERNELS = {
    "attention": ("flash", "fmha", "sdpa", "attention"), "optimizer": ("adam", "multi_tensor"), "compiled": ("triton",),
    "copies": ("memcpy", "memset"), "products": ("gemm", "nvjet", "cutlass", "xmma", "mm", "cublas"),
}  # fmt: skip
"""What the names of kernels hold, by what they do."""


class Absent(Exception):
    """This machine or this scionlm does not have it."""


@dataclass
class Setting:
    """What a case runs with, and where it puts what it finds."""

    options: argparse.Namespace
    case: Case
    device: torch.device
    shape: dict = field(default_factory=dict)
    found: dict = field(default_factory=dict)

    def __post_init__(self):
        smoke = self.options.smoke
        self.shape = TINY if smoke else TINYLLAMA
        self.seq_len, self.sequences = (128, 8) if smoke else (2048, 32)
        self.micro = max(self.case.micro // 4, 1) if smoke else self.case.micro
        self.steps, self.warm = (2, 1) if smoke else (6, 2)
        # On a CPU one compiled case shows that it works; the others would only take their time.
        self.compiled = self.case.compiled if self.device.type == "cuda" or self.case.name == "scion" else ""

    def report(self, **values):
        """Keep what has been found so far, so that it is there even if the case does not come to its end."""
        self.found |= values
        self.options.result.write_text(json.dumps(self.found))

    @contextlib.contextmanager
    def timing(self):
        """Hold the lock under which cases are timed."""
        with Path(self.options.lock).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def make_model(setting, attention=None):
    """Return the model with random weights made on the device."""
    attention = attention or setting.case.attention
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    torch.manual_seed(0)
    with setting.device:
        if attention == "scion":
            model = random_model({"model_type": "llama"} | setting.shape, seed=0)
        else:
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**setting.shape), dtype=torch.float32, attn_implementation=attention
            )
    setting.report(attention=f"{model.config._attn_implementation} {setting.case.backend}".strip())
    return model.train()


def make_objective(model, case, dtype):
    """Return Scion's objective: the one place that knows how it is told to keep fewer activations."""

    class FullLogits(Objective):
        """Cross-entropy over all logits at once."""

        def _losses(self, input_ids, labels, position_ids, taught):
            hidden = self._states(input_ids, position_ids).last
            logits = hidden @ self.model.lm_head.weight.to(hidden.dtype).T
            labels = labels.to(hidden.device)
            nll = functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
            ).view_as(labels)
            return nll.sum(), (labels != -100).sum(), {"sequence_nll": nll.detach().sum(dim=1)}

    kind = FullLogits if case.loss == "full" else Objective
    return kind(model, dtype, checkpointing=case.checkpointing)


def make_batches(setting):
    """Return an endless round of batches, and where their tokens are from."""
    vocab, rows, length = setting.shape["vocab_size"], setting.sequences, setting.seq_len + 1
    wanted, dice = 4 * rows * length, np.random.default_rng(0)
    path = setting.options.tokens
    if path:
        tokens = np.load(path, mmap_mode="r")
        beyond = float((tokens[:wanted] >= vocab).mean())
        tokens = np.resize(tokens[:wanted], wanted).astype(np.int64) % vocab
        source = f"{path.name}, {100 * beyond:.1f} % of them folded into the vocabulary"
    else:
        odds = 1 / (np.arange(vocab) + 10.0)
        tokens, source = dice.choice(vocab, wanted, p=odds / odds.sum()), "random with Zipf's odds, seed 0"
    batches = []
    for pages in tokens.reshape(4, rows, length):
        positions = None
        if setting.case.documents:  # of 512 tokens on average
            places = np.arange(length - 1)
            starts = np.where((dice.random((rows, length - 1)) < 1 / 512) | (places == 0), places, 0)
            positions = places - np.maximum.accumulate(starts, axis=1)
        batches.append(Batch(pages[:, :-1], pages[:, 1:], positions))
    return itertools.cycle(batches), source


def scion_step(objective, optimizer, batch, micro):
    return train_step(objective, optimizer, batch, micro, lr=1e-4, clip=1.0).nll


def adamw_of(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [{"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([{"params": matrices}, *others], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def bare_pass(model, autocast, compiled):
    """Return a hand-written forward pass: all logits at once, weights cast like Scion's or by autocast."""

    def summed_loss(ids, labels):
        arguments = {"input_ids": ids, "use_cache": False}
        if autocast:
            with torch.autocast(ids.device.type, torch.bfloat16):
                logits = model(**arguments).logits
        else:
            weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
            logits = functional_call(model, weights, kwargs=arguments).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    return torch.compile(summed_loss) if compiled else summed_loss


def bare_step(forward, optimizer, batch, micro):
    """Make one update with nothing in it that is not needed: no loss is read, nothing is waited for."""
    ids, labels = batch
    total = 0.0
    for some_ids, some_labels in zip(ids.split(micro), labels.split(micro), strict=True):
        loss = forward(some_ids, some_labels) / labels.numel()
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def on_device(batches, device):
    """Yield ids and labels that are there already."""
    kept = [
        tuple(torch.from_numpy(a).to(device) for a in (b.input_ids, b.labels)) for b in itertools.islice(batches, 4)
    ]
    return itertools.cycle(kept)


def make_step(setting, model):
    """Return a function that makes one update as the case says."""
    case = setting.case
    batches, source = make_batches(setting)
    setting.report(tokens=source, micro_batch=setting.micro)
    if case.loss.startswith("bare"):
        forward, optimizer = bare_pass(model, case.loss == "bare-autocast", setting.compiled), adamw_of(model)
        ready = on_device(batches, setting.device)
        return lambda: bare_step(forward, optimizer, next(ready), setting.micro)
    objective = make_objective(model, case, torch.bfloat16).train()
    optimizer = Optimizer(model, OptimizerSettings(name=case.optimizer))
    if setting.compiled == "whole":
        objective._losses = torch.compile(objective._losses)
    elif setting.compiled:
        objective.compile()
    return lambda: scion_step(objective, optimizer, next(batches), setting.micro)


def seconds_of(steps, device):
    """Return the seconds of each step, by the device's own clock, the gaps between steps included."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def first_step(step, device):
    """Return the seconds that the first step takes, which compiles, and its loss."""
    started = time.perf_counter()
    loss = float(step())
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, loss


def flops_of(shape, seq_len):
    """Return the operations a token by TinyLlama's and nanoGPT's formula and by Scion's own."""
    config = {"model_type": "llama"} | shape
    parameters = count_parameters(config)["total"]
    attention = 12 * shape["num_hidden_layers"] * shape["hidden_size"] * seq_len
    return 6 * parameters + attention, flops_per_token(config, seq_len)


def sdpa(case):
    """Return the context that leaves SDPA only the case's backend."""
    return sdpa_kernel(SDPBackend[case.backend]) if case.backend else contextlib.nullcontext()


def run_speed(setting):
    cuda = setting.device.type == "cuda"
    with sdpa(setting.case):
        step = make_step(setting, make_model(setting))
        first, loss = first_step(step, setting.device)
        setting.report(first_step_s=first, first_loss=loss)
        with setting.timing():
            seconds_of([step] * setting.warm, setting.device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            taken = seconds_of([step] * setting.steps, setting.device)
    median = statistics.median(taken)
    speed = setting.sequences * setting.seq_len / median
    by_all, by_scion = flops_of(setting.shape, setting.seq_len)
    setting.report(
        tokens_per_s=speed, step_ms=1e3 * median, step_ms_all=[round(1e3 * s, 2) for s in taken],
        compile_s=first - median, flops_6n=speed * by_all, flops_scion=speed * by_scion,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else peak_memory_bytes(),
    )  # fmt: skip


def run_peak(setting):
    """Measure the best of ten bf16 products of random matrices, and what a copy moves."""
    runtime, cuda = start_runtime(), setting.device.type == "cuda"
    known = gpu_by_name(runtime.name) if cuda else None
    setting.report(
        runtime=runtime.to_dict(), versions=versions() | {"torch": torch.__version__}, commit=git_commit(),
        data_sheet_flops=known and known.bf16_flops,
    )  # fmt: skip
    size = 8192 if cuda else 512
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28 if cuda else 2**20, device=setting.device)
    target = torch.empty_like(source)
    with setting.timing():
        seconds_of([lambda: a @ b] * 3, setting.device)
        product = min(seconds_of([lambda: a @ b] * 10, setting.device))
        copy = min(seconds_of([lambda: target.copy_(source)] * 5, setting.device))
    setting.report(product_flops=2 * size**3 / product, copy_bytes_per_s=2 * source.nbytes / copy)


def run_overhead(setting):
    """Time Scion's step, the same objective in a bare loop, and the bare step, in turns."""
    model = make_model(setting)
    batches, _ = make_batches(setting)
    ready = on_device(batches, setting.device)
    objective = make_objective(model, setting.case, torch.bfloat16).train()
    if setting.compiled:
        objective.compile()
    other = make_model(setting, "causal")  # its layers are as transformers made them
    optimizer, same, plain = Optimizer(model, OptimizerSettings()), adamw_of(model), adamw_of(other)
    forward = bare_pass(other, autocast=False, compiled=setting.compiled)
    ways = {
        "scion": lambda: scion_step(objective, optimizer, next(batches), setting.micro),
        "same_objective": lambda: bare_step(lambda *a: objective(*a)[0], same, next(ready), setting.micro),
        "bare": lambda: bare_step(forward, plain, next(ready), setting.micro),
    }
    for step in ways.values():
        first_step(step, setting.device)
    taken = {name: [] for name in ways}
    with setting.timing():
        for _ in range(2 if setting.options.smoke else 5):
            for name, step in ways.items():  # the first of a turn comes after another's step: not counted
                taken[name] += seconds_of([step] * 3, setting.device)[1:]
    medians = {name: statistics.median(times) for name, times in taken.items()}
    setting.report(
        step_ms={name: 1e3 * seconds for name, seconds in medians.items()},
        over_same_objective=medians["scion"] / medians["same_objective"] - 1,
        over_bare=medians["scion"] / medians["bare"] - 1,
    )


def run_profile(setting):
    """Name the kernels that one step spends its time in."""
    cuda = setting.device.type == "cuda"
    step = make_step(setting, make_model(setting))
    first_step(step, setting.device)
    with setting.timing():
        seconds_of([step], setting.device)
        wall = seconds_of([step], setting.device)[0]
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
            seconds_of([step], setting.device)
    times: dict[str, list] = {}
    for event in seen.events():
        if event.is_user_annotation or (cuda and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        entry = times.setdefault(event.name, [0.0, 0])
        entry[0] += (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / 1e6
        entry[1] += 1
    total = sum(seconds for seconds, _ in times.values())
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, (seconds, _) in times.items():
        shares[next((g for g, words in KERNELS.items() if any(w in name.lower() for w in words)), "other")] += (
            seconds / total
        )
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:15]
    setting.report(
        step_ms=1e3 * wall, busy_share=total / wall, shares=shares,
        largest=[{"kernel": name[:160], "ms": 1e3 * s, "share": s / total, "calls": calls} for name, (s, calls) in largest],
    )  # fmt: skip


def run_parity(setting):
    cuda = setting.device.type == "cuda"
    parity_of(dict(TINYLLAMA), cuda, setting.report)
    if not cuda:
        raise Absent("the GPU's half needs a GPU")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=[case.name for case in CASES])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True, help="held while a case is timed")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    case = next(c for c in CASES if c.name == options.case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(options, case, device)
    setting.report(status="stopped", started=time.time())
    try:
        globals()[f"run_{case.kind}"](setting)
        setting.report(status="ok")
    except (Absent, ImportError) as error:
        needs = "needs a GPU" if "needs a GPU" in str(error) else "not available"
        setting.report(status=needs, error=str(error)[:500])
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, torch.OutOfMemoryError)
        setting.report(status="out of memory" if full else "failed", error=f"{type(error).__name__}: {error}"[:800])


if __name__ == "__main__":
    main()
