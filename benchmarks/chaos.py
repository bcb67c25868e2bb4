"""Kill a real training run again and again, and compare what is left with a run that nobody disturbed.

    python benchmarks/chaos.py --work /tmp/chaos train.steps=40 inherit.layers=4

Kills come at random times after each start: SIGKILL mostly, SIGTERM now and then; some hit the start of the process, a
save, an evaluation or the export. Then weights, losses, learning rates and the ledger have to be equal to the bit.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CLOCKS = ("time/", "speed/", "memory/")


def command(out, overrides):
    settings = ["control=false", "checkpoint.every=3", "evaluate.tokens_per_domain=2048", *overrides]
    return [sys.executable, "-m", "scionlm", "run", "inheritune-mini", *settings, "-o", str(out)]


def facts(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines],
        "consumed": json.loads((out / "ledger.jsonl").read_text().splitlines()[-1])["counts"],
        "losses": json.loads((out / "result.json").read_text())["domains"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--shortest", type=float, default=2.0)
    parser.add_argument("--longest", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    whole, killed = options.work / "whole", options.work / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    subprocess.run(command(whole, options.overrides), check=True, capture_output=True)
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    dice, kills = random.Random(options.seed), []
    while True:
        process = subprocess.Popen(
            command(killed, options.overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if len(kills) < options.kills:
            wait = dice.uniform(options.shortest, options.longest)
            sign = signal.SIGTERM if dice.random() < 0.2 else signal.SIGKILL
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(sign)
                code = process.wait()
                status = killed / "status.json"
                saved = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
                state = json.loads(status.read_text())["state"] if status.exists() else "not begun"
                kills.append(sign.name)
                print(
                    f"{len(kills):3d} {sign.name} after {wait:4.1f} s, exit {code}, {state}, {saved[-1:] or 'no checkpoint'}",
                    flush=True,
                )
                continue
        else:
            code = process.wait()
        if code == 0:
            break
        raise SystemExit(f"the run failed by itself with {code}")
    mine, theirs = facts(killed), facts(whole)
    for name in theirs:
        print(f"{name}: {'equal' if mine[name] == theirs[name] else 'DIFFERENT'}")
    left = [path.name for path in killed.rglob("*.tmp")]
    print(f"{len(kills)} kills; left over: {left or 'nothing'}")
    if mine != theirs or left:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
