"""What the losses of the head take, and what a teacher costs: time in turns in one process, memory in one process each.

Losses, of the same hidden states, head and labels, forward and backward: the plain path (all logits at once, torch's own
cross-entropy or KL), Scion's, and torch's `linear_cross_entropy` where there is one. Step: a student's with and without
its teacher, and the teacher's forward pass alone; the floor of a taught step is the sum of the two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from scionlm.families.logits import LogitScaling
from scionlm.parallel.runtime import start_runtime
from scionlm.schedules import Piece, Schedule
from scionlm.train.distillation import Distillation, DistillSettings
from scionlm.train.head_loss import HeadSettings, HeadTargets, head_losses
from scionlm.train.objective import Objective
from scionlm.train.teacher import Teacher

VOCAB, HIDDEN = 49152, 576
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
SETTINGS = HeadSettings(LogitScaling())
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def inputs(tokens, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCAB, HIDDEN)).requires_grad_()
    taught = torch.randn(tokens, HIDDEN).to(dtype), (0.05 * torch.randn(VOCAB, HIDDEN)).to(dtype)
    return hidden, weight, torch.randint(0, VOCAB, (tokens,)), taught


def plain(hidden, weight, labels, taught):
    return functional.cross_entropy(hidden @ weight.to(hidden.dtype).T, labels, reduction="none").float().sum()


def plain_kl(hidden, weight, labels, taught):
    log_p = functional.log_softmax((hidden @ weight.to(hidden.dtype).T).float(), -1)
    with torch.no_grad():
        log_q = functional.log_softmax((taught[0] @ taught[1].T).float(), -1)
    nll = functional.nll_loss(log_p, labels, reduction="sum")
    return 0.5 * nll + 0.5 * functional.kl_div(log_p, log_q, log_target=True, reduction="sum")


def scion(hidden, weight, labels, taught):
    return head_losses(hidden, weight, labels, SETTINGS).loss


def scion_kl(hidden, weight, labels, taught):
    targets = HeadTargets(taught[0], taught[1], LogitScaling(), torch.tensor(0.5))
    return head_losses(hidden, weight, labels, SETTINGS, targets).loss


def torchs(hidden, weight, labels, taught):
    return functional.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, reduction="sum")


LOSSES = {"plain": plain, "scion": scion, "torch": torchs, "plain KL": plain_kl, "scion KL": scion_kl}
if not hasattr(functional, "linear_cross_entropy"):
    del LOSSES["torch"]


def run(name, arguments):
    arguments[0].grad = arguments[1].grad = None
    loss = LOSSES[name](*arguments)
    (loss / len(arguments[2])).backward()
    return float(loss.detach())


def peak_of(name, tokens, precision):
    """Print what a loss takes at its height beyond its inputs and their gradients."""
    start_runtime("fp32")
    arguments = inputs(tokens, TYPES[precision])
    run(name, inputs(64, TYPES[precision]))  # what libraries set up once
    status = Path("/proc/self/status")

    def field(key):
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = field("VmRSS")
    loss = run(name, arguments)
    gradients = sum(part.grad.nbytes for part in arguments[:2])
    print(json.dumps({"bytes": field("VmHWM") - before - gradients, "loss": loss}))


def memory(tokens, precision):
    found = {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--peak-of", name, "--tokens", str(tokens), "--precision", precision]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        found[name] = json.loads(shown.splitlines()[-1])
    for name, facts in found.items():
        base = found["plain KL" if "KL" in name else "plain"]["bytes"]
        print(f"memory, {precision}, {tokens} tokens, {name:9s} {facts['bytes'] / 2**30:6.2f} GiB   "
              f"{facts['bytes'] / base:.2f} of the plain   loss {facts['loss'] / tokens:.5f}")  # fmt: skip


def in_turns(works, turns):
    """Return the seconds of each turn, all works one after another in each; the first turn does not count."""
    taken = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def speed(tokens, precision, turns):
    arguments = inputs(tokens, TYPES[precision])
    taken = in_turns({name: lambda name=name: run(name, arguments) for name in LOSSES}, turns)
    for name, seconds in taken.items():
        base = taken["plain KL" if "KL" in name else "plain"]
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        print(f"time, {precision}, {tokens} tokens, {name:9s} {statistics.median(seconds):6.3f} s   "
              f"{ratio:.2f} of the plain")  # fmt: skip


def step(options, runtime):
    torch.manual_seed(0)
    teacher = Teacher(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=30)).to(runtime.compute_dtype))
    student = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=options.layers))
    always = Schedule((Piece("constant", "constant", 1, 1.0, 1.0),))
    alone = Objective(student, runtime.compute_dtype)
    settings = {"forward KL": {}, "top 64": {"top_k": 64}, "JS": {"divergence": "jensen_shannon"}}
    taught = {
        name: Objective(student, runtime.compute_dtype, 0.0,
                        Distillation(student, teacher, DistillSettings(0.5, always, **values)))
        for name, values in settings.items()
    }  # fmt: skip
    ids = torch.randint(0, VOCAB, (options.rows, 256))

    def teaching():
        """What a teacher that is a plain model does: its logits are made, and looked at by nobody."""
        teacher(ids).last.flatten(0, 1) @ teacher.weight.T

    def passing(objective):
        objective(ids, ids)[0].backward()
        student.zero_grad()

    works = {"student": lambda: passing(alone), "teacher": teaching}
    works |= {name: lambda objective=objective: passing(objective) for name, objective in taught.items()}
    taken = in_turns(works, options.turns)
    floor = [a + b for a, b in zip(taken["student"], taken["teacher"], strict=True)]
    for name, seconds in taken.items():
        over = statistics.median(a / b for a, b in zip(seconds, floor, strict=True))
        whole = statistics.median(a / b for a, b in zip(seconds, taken["student"], strict=True))
        print(f"pass, {runtime.precision}, {options.layers} of 30 layers, {options.rows} x 256, {name:10s} "
              f"{statistics.median(seconds):6.3f} s   {whole:.2f} of the student's, {over:.3f} of student + teacher")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16384, help="for the memory")
    parser.add_argument("--precision", choices=TYPES, default="bf16")
    parser.add_argument("--peak-of", help="used for itself")
    options = parser.parse_args()
    if options.peak_of:
        peak_of(options.peak_of, options.tokens, options.precision)
        return
    runtime = start_runtime(options.precision)
    print(f"{runtime.name}, {runtime.threads} threads")
    memory(options.tokens, options.precision)
    speed(2048, options.precision, options.turns)
    step(options, runtime)


if __name__ == "__main__":
    main()
