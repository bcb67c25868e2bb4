"""Training speed on one GPU, case by case, in under ten minutes: TinyLlama's shape from random weights.

    python benchmarks/gpu_tokens.py DATA_DIR gpu-tokens.npy     # first, where the data is: pack the tokens to bring
    python benchmarks/gpu.py --out DIR --tokens gpu-tokens.npy [--minutes 9] [--cases NAME ...]
    python benchmarks/gpu.py --out DIR --smoke                  # tiny shapes, also without a GPU

Each case runs in a process of its own with a limit of its own, the most important first; what each finds is appended at
once to DIR/results.jsonl, and what no time is left for is listed as not run. From the fourth case on two share the GPU,
so that one compiles while the other is timed; a lock keeps them from being timed at once. They also share what has been
compiled: compile times are of a cold start only in `scion`, `whole-causal` and `bare`. Needs scionlm importable
(PYTHONPATH=src), and pydantic for it.

`scion` is Scion's own step as it is: layers compiled one by one. In `whole-graph` all of it is one graph, inside which
transformers hands over a mask, which keeps SDPA from its fast kernels; in `whole-causal`, as in `bare`, attention is told
that it is causal instead. A step is 4 micro-batches of 8 sequences of 2,048.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

TARGET_TOKENS_PER_S, TARGET_OVERHEAD = 60_000, 0.03


@dataclass(frozen=True)
class Case:
    name: str
    kind: str = "speed"
    limit: float = 110.0
    alone: bool = False  # shares the GPU with no other case
    gpu: bool = False
    attention: str = "scion"
    backend: str = ""  # of torch's SDPA
    loss: str = "chunked"  # chunked, full (Scion's step over plain logits), bare, bare-autocast (no Scion at all)
    optimizer: str = "adamw"
    compiled: str = "layers"  # layers (each layer and the head's losses apart), whole (one graph), "" (not at all)
    micro: int = 8
    checkpointing: str = "none"
    documents: bool = False


CASES = (
    Case("peak", "peak", 90, alone=True),
    Case("scion", limit=140, alone=True),
    Case("whole-causal", attention="causal", compiled="whole", limit=140, alone=True),
    Case("bare", loss="bare", attention="causal"),
    Case("whole-graph", compiled="whole"),
    Case("parity", "parity", 80, attention=""),
    Case("overhead", "overhead", 150, alone=True),
    Case("full-logits", loss="full"),
    Case("profile", "profile"),
    Case("muon", optimizer="muon"),
    Case("sdpa-cudnn", backend="CUDNN_ATTENTION", gpu=True),
    Case("sdpa-flash", backend="FLASH_ATTENTION", gpu=True),
    Case("flash-attention-2", attention="flash_attention_2", gpu=True),
    Case("flex", attention="flex_attention", gpu=True),
    Case("micro-4", micro=4),
    Case("checkpointing-full", checkpointing="full"),
    Case("checkpointing-selective", checkpointing="selective"),
    Case("micro-16", micro=16, alone=True),
    Case("eager", compiled="", limit=80),
    Case("documents-sdpa", attention="sdpa", documents=True),
    Case("documents-flex", attention="flex_attention", documents=True, gpu=True),
    Case("bare-autocast", loss="bare-autocast", attention="causal"),
)


class Running:
    """A case in its process."""

    def __init__(self, case, options, work, limit):
        self.case, self.limit, self.started = case, limit, time.monotonic()
        self.result = work / f"{case.name}.json"
        self._all, self._log = options.out / "log.txt", work / f"{case.name}.log"
        command = [sys.executable, str(Path(__file__).with_name("gpu_cases.py")), case.name, "--result", str(self.result),
                   "--lock", str(work / "lock")]  # fmt: skip
        command += ["--tokens", str(options.tokens)] if options.tokens else []
        command += ["--smoke"] if options.smoke else []
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self):
        """Return what there is of the case once it is over, None before."""
        seconds, late = time.monotonic() - self.started, False
        if self.process.poll() is None:
            late = seconds > self.limit
            if not late:
                return None
        self.stop()  # workers that compile outlive their parent
        log = self._log.read_text(errors="replace")
        with self._all.open("a") as everything:
            everything.write(f"\n==== {self.case.name}\n{log}")
        how = f"over {self.limit:.0f} s" if late else f"ended with {self.process.returncode}"
        found = {"status": how, "error": (log.strip().splitlines() or [""])[-1][:500]}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found = json.loads(self.result.read_text())
            if found["status"] == "stopped":
                found["status"] = how
        return found | {"seconds": seconds}

    def stop(self):
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_all(options):
    """Run the cases in order and print what came of them."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        sys.exit("there is no GPU here; --smoke tries every case with tiny shapes")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    waiting = [c for c in CASES if not options.cases or c.name in options.cases]
    running: list[Running] = []
    results: dict[str, dict] = {}

    def done(case, found):
        results[case.name] = found
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"case": case.name, "setting": asdict(case), "smoke": options.smoke} | found) + "\n")
        print(f"{case.name:26s}{found['status']:16s}{found.get('seconds', 0.0):6.1f} s  {brief(found)}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            while waiting or running:
                for one in list(running):
                    found = one.ended()
                    if found:
                        running.remove(one)
                        done(one.case, found)
                left = deadline - time.monotonic()
                blocked = len(running) >= options.jobs or any(one.case.alone for one in running)
                if waiting and not blocked and not (running and waiting[0].alone):
                    case = waiting.pop(0)
                    if case.gpu and not cuda:
                        done(case, {"status": "needs a GPU"})
                    elif left < (10 if options.smoke else case.limit / 3):
                        done(case, {"status": "not run", "error": f"{max(left, 0):.0f} s were left"})
                    else:
                        running.append(Running(case, options, work, min(case.limit, left)))
                else:
                    time.sleep(0.2)
        finally:
            for one in running:
                one.stop()
    print(table(results))


def brief(found):
    """Return the figure that matters most of a case."""
    if found.get("error"):
        return " ".join(found["error"].split())[:110]
    keys = ("tokens_per_s", "product_flops", "over_bare", "holds", "busy_share")
    return "  ".join(f"{key} {found[key]:.4g}" for key in keys if found.get(key) is not None)


def table(results):
    """Return the final table, and how the targets were met."""
    peak = results.get("peak", {})
    sheet, product = peak.get("data_sheet_flops"), peak.get("product_flops")
    lines = [
        "",
        f"{'case':26s}{'status':15s}{'tokens/s':>9s}{'step ms':>9s}{'MFU':>7s}{'Scion':>7s}{'of mm':>7s}{'GiB':>7s}{'compile s':>10s}{'loss':>8s}",
    ]
    for name, found in results.items():
        row = f"{name:26s}{found['status']:15s}"
        if "tokens_per_s" in found:
            shares = [(found["flops_6n"], sheet), (found["flops_scion"], sheet), (found["flops_6n"], product)]
            row += f"{found['tokens_per_s']:9.0f}{found['step_ms']:9.1f}"
            row += "".join(f"{100 * flops / whole:6.1f}%" if whole else f"{'-':>7s}" for flops, whole in shares)
            row += f"{found['peak_memory'] / 2**30:7.1f}{found['compile_s']:10.1f}{found['first_loss']:8.4f}"
        lines.append(row)
    if product:
        lines.append(f"bf16 product {product / 1e12:.1f} TFLOP/s, copy {peak['copy_bytes_per_s'] / 1e12:.2f} TB/s; "
                     f"MFU and Scion: 6N+12LdT and Scion's formula over the data sheet's peak; of mm: over the product. Loss: of the first step, equal where the same is computed")  # fmt: skip
    speeds = {n: f["tokens_per_s"] for n, f in results.items() if "tokens_per_s" in f and not n.startswith("bare")}
    if speeds:
        best = max(speeds, key=lambda n: speeds[n])
        lines.append(f"Scion's fastest: {best}, {speeds[best]:.0f} tokens/s; target {TARGET_TOKENS_PER_S}")
    overhead = results.get("overhead", {})
    if "over_bare" in overhead:
        lines.append(f"step over bare {100 * overhead['over_bare']:+.1f} %, over the same objective in a bare loop "
                     f"{100 * overhead['over_same_objective']:+.1f} %; target {100 * TARGET_OVERHEAD:.0f} %")  # fmt: skip
    for name, entry in results.get("parity", {}).get("distances", {}).items():
        lines.append(
            f"parity {name:20s}loss {entry['loss']:.1e}  gradient {entry['gradient']:.1e}  worst {entry['worst_tensor']:.1e}"
        )
    for entry in results.get("profile", {}).get("largest", [])[:3]:
        lines.append(f"{100 * entry['share']:5.1f} %  {entry['calls']:5d} x  {entry['kernel'][:90]}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and log.txt")
    parser.add_argument("--tokens", type=Path, help="packed tokens; random ones without")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="cases that may share the GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    run_all(options)


if __name__ == "__main__":
    main()
