"""What `scion plan` says beside what a run takes: time and memory of every recipe, each in a process of its own.

python benchmarks/plan.py            # about a quarter of an hour on two quiet cores; --steps 20 to look whether it works

The time is that of training, planned from passes measured on the spot (`--calibrate`) and from the table of devices; the
memory is the peak of the process, planned part by part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "inherit": ["inheritune-mini", "control=false"],
    "inherit, distilled": ["inheritune-mini", "control=false", "distill={teacher: source}"],
    "shear, distilled": ["shear-mini", "control=false", "prune.tokens=12288", "train.tokens=12288"],
    "continual": ["continual-mini"],
    "scratch": ["scratch-tinyllama-1.1b-mini"],
}

_TRAINING = ("training", "teacher", "pruning", "recovery")
"""Parts of a plan's seconds that a result counts as training."""


def scion(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "scionlm", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="of each run; its own where left out")
    parser.add_argument("--only", choices=CASES)
    asked = parser.parse_args()
    print("recipe | s: run | calibrated | table | peak memory: run | planned")
    for name, words in CASES.items():
        if asked.only in (None, name):
            measure(name, [*words, *([f"train.steps={asked.steps}"] if asked.steps else [])])


def measure(name: str, words: list[str]) -> None:
    calibrated = json.loads(scion("plan", *words, "--calibrate", "--json"))
    table = json.loads(scion("plan", *words, "--json"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        scion("run", *words, "-o", str(out))
        training = json.loads((out / "result.json").read_text())["training"]
    seconds = training["seconds"]
    figures = [seconds]
    for plan in (calibrated, table):
        figures.append(sum(plan["seconds_by_part"].get(part, 0) for part in _TRAINING) / seconds)
    memory, planned = training["peak_memory_bytes"], calibrated["memory_bytes_per_device"]
    print(
        f"{name} | {figures[0]:.1f} | {figures[1]:.2f} x | {figures[2]:.2f} x | {memory / 2**30:.2f} GiB | "
        f"{planned / memory:.2f} x",
        flush=True,
    )


if __name__ == "__main__":
    main()
