"""Pack the tokens that `gpu.py` brings to a machine without data: 16 bits each, in one file.

    python benchmarks/gpu_tokens.py DATA_DIR gpu-tokens.npy [--mebibytes 8]

DATA_DIR is a folder that `scion prepare` made.
"""

import argparse
from pathlib import Path

import numpy as np

from scionlm.data import DataFolder

MAX_BYTES = 40 * 2**20


def pack(folder, path, mebibytes):
    """Write the first training tokens of each domain of a prepared folder, in equal parts."""
    data = DataFolder(folder)
    assert data.tokenizer.vocab_size <= 2**16, "the ids do not fit into 16 bits"
    each = int(min(mebibytes * 2**20, MAX_BYTES - 128)) // 2 // len(data.domains)
    streams = [data.stream(name, "train") for name in data.domains]
    tokens = np.concatenate([stream.read(0, min(each, stream.num_tokens)) for stream in streams]).astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens)
    print(f"{path}: {len(tokens)} tokens of {', '.join(data.domains)}, {path.stat().st_size / 2**20:.1f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--mebibytes", type=float, default=8.0, help="at most 40")
    options = parser.parse_args()
    pack(options.data, options.file, options.mebibytes)


if __name__ == "__main__":
    main()
