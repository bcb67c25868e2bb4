"""Speed and memory of surgery on a source that is larger than what it may keep in memory, beside a plain copy.

    python benchmarks/surgery.py [--layers 28] [--keep 14] [--mergekit PATH/TO/mergekit-yaml] [--json FILE] [--folder DIR]

The source has the shape of a 3B model in bf16 with random weights, in several files. Each measurement runs in a process of
its own; time is taken inside it, after imports; memory is the process's peak, that of the imports alone beside it. The
plain copy reads as many bytes as the child has, hashes them with SHA-256 and writes them, in blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 3072,
    "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True, "dtype": "bfloat16", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
SHARD = 10**9

COPY = """
import hashlib, sys, time
source, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
from pathlib import Path
import os
files = sorted(Path(source).glob("*.safetensors"))
started = time.perf_counter()
digest, left = hashlib.sha256(), size
with open(out, "wb", buffering=0) as target:
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while left and (block := handle.read(min(left, 16 * 2**20))):
                digest.update(block)
                target.write(block)
                left -= len(block)
    os.fsync(target.fileno())
print(time.perf_counter() - started)
"""

CUT = """
import json, resource, sys, time
import torch
from transformers import AutoConfig
from pathlib import Path
from scionlm.recipes.inherit import inherit_folder
from scionlm.surgery import export, files, surgery
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
started = time.perf_counter()
facts = inherit_folder(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), verify=False, shard_bytes=10**9)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "imports": before, "peak": peak, "bytes": facts["bytes"]}))
"""


def make_source(folder: Path, layers: int) -> None:
    """Write random bf16 weights, through Scion's own writer."""
    import torch

    from scionlm.families.shape import expected_tensors
    from scionlm.surgery.write import Tensor, write_weights

    config = SHAPE | {"num_hidden_layers": layers}
    block = (0.02 * torch.randn(2**24)).to(torch.bfloat16)

    def blocks(shape):
        left = torch.Size(shape).numel()
        while left:
            yield block[: min(left, len(block))]
            left -= min(left, len(block))

    tensors = [
        Tensor(place.name, torch.bfloat16, place.shape, lambda shape=place.shape: blocks(shape))
        for place in expected_tensors(config)
    ]
    write_weights(tensors, folder, SHARD)
    (folder / "config.json").write_text(json.dumps(config))


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def largest_bytes(folder: Path) -> int:
    from math import prod

    from scionlm.sources import tensor_index

    return max(prod(entry.shape) * 2 for _, entry in tensor_index(folder).values())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--keep", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--folder", help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        root = Path(room)
        source = root / "source"
        source.mkdir()
        make_source(source, args.layers)
        os.sync()  # or the first measurement would wait for it
        largest = largest_bytes(source)
        cuts = {
            "depth": {"layers": args.keep, "strategy": "spaced"},
            "depth + width": {
                "layers": args.keep,
                "hidden_size": 2304,
                "intermediate_size": 6144,
                "num_attention_heads": 18,
            },
        }
        rows = []
        for name, options in cuts.items():
            for _ in range(args.repeats):
                mine = json.loads(run(CUT, str(source), str(root / "out"), json.dumps(options)))
                subprocess.run(["rm", "-rf", str(root / "out")], check=True)
                plain = float(run(COPY, str(source), str(root / "copy"), str(mine["bytes"])))
                (root / "copy").unlink()
                rows.append({"cut": name, "plain_copy_s": plain} | mine)
        if args.mergekit:
            rows += beside_mergekit(args, source, root)
    print(f"largest tensor {largest / 1e6:.0f} MB, allowed over imports: {(3 * largest + 1e8) / 1e6:.0f} MB")
    print("cut              bytes   plain copy      scion   ratio   peak over imports")
    for row in rows:
        if "plain_copy_s" in row:
            over = (row["peak"] - row["imports"]) / 1e6
            print(
                f"{row['cut']:<14} {row['bytes'] / 1e9:6.2f}GB {row['plain_copy_s']:9.2f} s {row['seconds']:8.2f} s "
                f"{row['seconds'] / row['plain_copy_s']:7.2f} {over:12.0f} MB"
            )
        else:
            print(f"{row['tool']:<14} whole command {row['seconds']:8.2f} s, peak {row['peak'] / 1e6:8.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def timed(command: list[str]) -> dict:
    """Seconds and peak memory of a whole command."""
    code = (
        "import json, resource, subprocess, sys, time\n"
        "started = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "seconds = time.perf_counter() - started\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024\n"
        "print(json.dumps({'seconds': seconds, 'peak': peak, 'rc': done.returncode, 'err': done.stderr[-500:]}))\n"
    )
    return json.loads(run(code, *command))


def beside_mergekit(args, source: Path, root: Path) -> list[dict]:
    """Both tools on the same passthrough: the first half of the layers."""
    yaml = root / "slices.yaml"
    yaml.write_text(
        f"slices:\n  - sources:\n      - model: {source}\n        layer_range: [0, {args.keep}]\nmerge_method: passthrough\n"
    )
    scion = str(Path(sys.executable).parent / "scion")
    commands = {
        "scion": [scion, "inherit", str(yaml), "--no-verify", "-o", str(root / "out")],
        "mergekit": [args.mergekit, str(yaml), str(root / "out"), "--lazy-unpickle"],
    }
    rows = []
    for _ in range(args.repeats):
        for tool, command in commands.items():
            found = timed(command)
            if found["rc"]:
                sys.exit(f"{tool}: {found['err']}")
            subprocess.run(["rm", "-rf", str(root / "out")], check=True)
            rows.append({"tool": tool} | found)
            time.sleep(1)
    return rows


if __name__ == "__main__":
    main()
