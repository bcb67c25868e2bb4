"""Run folders for comparisons, with losses that can be reckoned with by hand."""

import json
import math
from pathlib import Path
from typing import Any

SOURCE = {"prose": 3.0, "code": 2.0}
SHAPE = {"num_parameters": 1_000_000, "num_hidden_layers": 8, "hidden_size": 64}
TOKENS = 1_000_000


def _losses(nll: dict[str, float], num_tokens: int) -> dict[str, dict[str, float]]:
    return {
        name: {"nll": value, "perplexity": math.exp(value), "bits_per_byte": value / 3, "num_tokens": num_tokens}
        for name, value in nll.items()
    }


def _json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps({"format_version": 1} | record), encoding="utf-8")


def compared_run(
    folder: Path,
    nll: dict[str, float],
    *,
    seed: int = 0,
    init: str = "source",
    control: dict[str, float] | None = None,
    state: str = "done",
    exit_code: int = 0,
    num_tokens: int = 4096,
    data: str = "d1",
    seq_len: int = 256,
    tokens: int = TOKENS,
    layers: int = 8,
    strategy: str = "first",
    source: str = "big",
    source_nll: dict[str, float] | None = None,
    start: float = 9.0,
    parameters: int = SHAPE["num_parameters"],
    flops: float = 6e12,
) -> Path:
    """Write a run folder whose final losses are `nll`; one that is not done has them as its last evaluation."""
    folder.mkdir(parents=True)
    config = {
        "recipe": "inheritune",
        "source": source,
        "data": {"dir": f"data-of-{folder.name}", "seq_len": seq_len},
        "inherit": {"layers": layers, "init": init, "strategy": strategy},
        "train": {"tokens": TOKENS, "global_batch_tokens": 1000},
        "seed": seed,
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    _json(folder / "manifest.json", {"data": {"fingerprint": data}, "source": {"name": source, "sha256": source}})
    _json(folder / "status.json", {"state": state, "exit_code": exit_code, "step": 10, "message": ""})
    source_losses = _losses(
        source_nll or dict.fromkeys(nll, 0.0) | {k: v for k, v in SOURCE.items() if k in nll}, num_tokens
    )
    _json(folder / "source.json", {"domains": source_losses, "samples": []})
    _metrics(folder, nll, tokens, start)
    if control is not None:
        (folder / "control").mkdir()
        _metrics(folder / "control", control, tokens, start)
    if state != "done":
        return folder
    training = {"steps": tokens // 1000, "tokens": tokens, "seconds": 60.0, "flops": flops, "seed": seed}
    result = {
        "recipe": "inheritune",
        "name": "child",
        "source": {"name": source, "num_hidden_layers": 30, "num_parameters": 9_000_000, "domains": source_losses},
        "inherit": {"init": init, "strategy": strategy, "keep": list(range(layers))},
        "model": SHAPE | {"num_hidden_layers": layers, "num_parameters": parameters},
        "training": training,
        "domains": _losses(nll, num_tokens),
    }
    if control is not None:
        result["control"] = {"name": "control", "domains": _losses(control, num_tokens), "training": training}
    _json(folder / "result.json", result)
    return folder


def _metrics(folder: Path, nll: dict[str, float], tokens: int, start: float) -> None:
    lines: list[dict[str, Any]] = [{"format_version": 1, "kind": "metrics"}]
    for k in range(11):
        at = {f"eval/{name}/nll_nats": v + (start - v) * math.exp(-0.9 * k) for name, v in nll.items()}
        last = {f"eval/{name}/nll_nats": value for name, value in nll.items()}
        lines.append({"step": k, "tokens": k * tokens / 10} | (last if k == 10 else at))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def pair(prose: float, code: float) -> dict[str, float]:
    """Return losses in the two domains."""
    return {"prose": prose, "code": code}
