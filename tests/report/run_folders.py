"""Run folders as Scion writes them, with plausible numbers: what the tests of the report draw."""

import json
import math
from pathlib import Path
from typing import Any

DOMAINS = {"prose": 3.41, "code": 2.98, "legal/german": 4.41}
# How much harder than the others a domain is to learn from little text; on average 1.
HARDNESS = {"prose": 0.8, "code": 0.9, "legal/german": 1.3}
TOKENS = {"prose": 16_384, "code": 16_384, "legal/german": 9_216}
STEPS, TOKENS_PER_STEP = 400, 1_024

CONFIG = """\
recipe: inheritune
source: smollm2-135m
data:
  dir: runs/demo/data
  mixture: {prose: 0.6, code: 0.3, legal/german: 0.1}
  seq_len: 256
inherit: {layers: 8, keep: null, init: source}
train: {steps: 400, global_batch_tokens: 1024, micro_batch_size: 2, precision: fp32, compile: false}
optimizer: {name: adamw, lr: 6.0e-4, betas: [0.9, 0.95], weight_decay: 0.1, grad_clip: 1.0}
schedule: {name: cosine, warmup: 0.05, min_lr_ratio: 0.1}
evaluate: {every: 0.1, tokens_per_domain: 16384, tasks: []}
export: {dtype: source}
seed: 0
"""


def losses(offset: float) -> dict[str, dict[str, float]]:
    """Return the losses of a model that is `offset` nats worse than the source."""
    return {
        name: {
            "nll": nll,
            "perplexity": math.exp(nll),
            "bits_per_byte": nll / 3.1,
            "num_tokens": TOKENS[name],
        }
        for name, nll in ((name, nll + offset * _hardness(name, offset)) for name, nll in DOMAINS.items())
    }


def _hardness(name: str, offset: float) -> float:
    return HARDNESS[name] if offset < 3 else 1.0


def excess(step: int, start: float, end: float, wobble: float = 0.0) -> float:
    """Return a falling loss above the source's: from `start` to `end` over the run."""
    falling = math.exp(-5 * step / STEPS) - math.exp(-5)
    return end + (start - end) * falling / (1 - math.exp(-5)) + wobble * math.sin(step * 2.7) * math.cos(step)


def metric_lines(start: float, end: float, last_step: int = STEPS) -> list[dict[str, Any]]:
    """Return training lines every 2 steps and evaluations every 40."""
    lines: list[dict[str, Any]] = []
    for step in range(0, last_step + 1, 2):
        place = {"step": step, "tokens": step * TOKENS_PER_STEP}
        if step:
            loss = 3.6 + excess(step, start, end, 0.35)
            lines.append({**place, "train/nll_nats": loss, "optim/lr": 6e-4, "speed/tokens_per_s": 612.0})
        if step % 40 == 0 or step == last_step:
            held_out = {
                f"eval/{n}/nll_nats": nll + excess(step, start, end * _hardness(n, end)) for n, nll in DOMAINS.items()
            }
            lines.append({**place, **held_out})
    return lines


def training(seconds: float) -> dict[str, Any]:
    """Return the training record of a result."""
    return {
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "seconds": seconds,
        "tokens_per_s": STEPS * TOKENS_PER_STEP / seconds,
        "flops": 1.39e14,
        "seed": 0,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "peak_memory_bytes": 1_840_000_000,
    }


def result(control: bool) -> dict[str, Any]:
    """Return the result of a run that is done."""
    record: dict[str, Any] = {
        "format_version": 1,
        "recipe": "inheritune",
        "name": "child",
        "source": {
            "name": "smollm2-135m",
            "model_type": "llama",
            "num_hidden_layers": 30,
            "num_parameters": 134_515_008,
            "license": "apache-2.0",
            "domains": losses(0.0),
        },
        "inherit": {
            "init": "source",
            "strategy": "spaced",
            "strategy_reason": "Evenly spaced layers, the first and the last among them, lose least without training.",
            "keep": [0, 4, 8, 12, 17, 21, 25, 29],
        },
        "model": {
            "num_parameters": 56_650_176,
            "num_hidden_layers": 8,
            "hidden_size": 576,
            "intermediate_size": 1_536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
        "training": training(669.0),
        "before": losses(6.1),
        "domains": losses(1.01),
        "best": {name: {"nll": loss["nll"] - 0.02, "step": 360} for name, loss in losses(1.01).items()},
        "samples": [
            {
                "prompt": "The oldest part of the library",
                "texts": {
                    "source": " is the reading room, which was built in 1754 and still holds the original oak shelves. "
                    "It is open to visitors on weekdays.",
                    "child": " is a small room, and the first of the books is the first of the library of the city. "
                    "The books are in the room.",
                    "control": " the the of, and the of the a of the in the to the. The, and of the",
                },
            },
            {
                "prompt": "def mean(values):\n    ",
                "texts": {
                    "source": "return sum(values) / len(values)\n\n\ndef median(values):\n    values = sorted(values)",
                    "child": "return sum(values)\n\n    def mean(self, values):\n        return self.values",
                    "control": "self self(self, self):\n    self = self",
                },
            },
        ],
        "control": {"name": "control", "before": losses(7.2), "domains": losses(4.3), "training": training(655.0)}
        if control
        else None,
    }
    if not control:
        for sample in record["samples"]:
            del sample["texts"]["control"]
    return record


def manifest() -> dict[str, Any]:
    """Return the manifest of a run."""
    return {
        "format_version": 1,
        "scion_version": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.17.0"},
        "git_commit": "4f2a9c81d07be35f6a1c",
        "command": ["scion", "run", "inheritune-mini", "train.steps=400", "-o", "runs/demo"],
        "started_at": "2026-11-20T09:14:03+00:00",
        "device": {"kind": "cpu", "name": "AMD EPYC 9654", "threads": 2},
        "seeds": {"run": 0},
        "source": {"config_sha256": "b1946ac92492d2347c6235b4d2611184"},
        "data": {"dir": "runs/demo/data", "fingerprint": "9c56cc51b374c3ba189210d5b6d4bf57"},
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")


def write_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    every = [{"format_version": 1, "kind": "metrics"}, *lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in every), encoding="utf-8")


def fill_run(run: Path, *, control: bool = True, state: str = "done", **changes: Any) -> None:
    """Write the files of a run into `run`; `changes` replace keys of its result."""
    (run / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_json(run / "manifest.json", manifest())
    done = state == "done"
    codes = {"done": 0, "stopped": 75, "failed": 3}
    status = {"state": state, "exit_code": codes.get(state), "step": STEPS if done else 120, "message": ""}
    if state == "failed":
        status["message"] = "the loss was not finite at step 120; lower optimizer.lr"
    write_json(run / "status.json", {"format_version": 1, **status})
    write_metrics(run / "metrics.jsonl", metric_lines(6.1, 1.01, STEPS if done else 120))
    if control:
        (run / "control").mkdir()
        write_metrics(run / "control" / "metrics.jsonl", metric_lines(7.2, 4.3, STEPS if done else 120))
    if done:
        record = result(control) | changes
        write_json(run / "result.json", record)
