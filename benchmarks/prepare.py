"""Speed of `scion prepare` beside the bare tokenizers library on the same text, interleaved, in one run.

    python benchmarks/prepare.py [CORPORA.yaml] [--repeats 2]

Bare means: every text in memory already, one `encode_batch_fast` over each 16 MB of it with the library's own threads on
all cores, results thrown away. Scion's time is that of the whole command in the process: both passes over the files,
hashing, splitting, shards flushed to disk. Without an argument the demo's two domains are used.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys, time
from pathlib import Path
from scionlm.data.reading.corpora import load_corpora
from scionlm.data.reading.documents import find_files, read_documents
from scionlm.sources import load_tokenizer, resolve
path = Path(sys.argv[1])
corpora = load_corpora(path)
tokenizer = load_tokenizer(resolve(corpora.tokenizer).path)
batches, size = [[]], 0
for name, domain in corpora.domains.items():
    for document in read_documents(find_files(domain, path.parent, name), domain.text_key):
        batches[-1].append(document.text)
        size += len(document.text.encode())
        if size > 16e6 * len(batches):
            batches.append([])
started = time.perf_counter()
for batch in batches:
    getattr(tokenizer, sys.argv[2])(batch, add_special_tokens=False)
print(size, time.perf_counter() - started)
"""
SCION = """
import resource, sys, time
from pathlib import Path
from scionlm import api
started = time.perf_counter()
api.prepare(sys.argv[1], sys.argv[2])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def ask(code, *arguments, **env):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True, capture_output=True, text=True, env=os.environ | env,
    )  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def demo_corpora(folder):
    from scionlm.core.config import dump_yaml
    from scionlm.recipes.demo_data import demo_corpora as make

    path = Path(folder) / "corpora.yaml"
    path.write_text(dump_yaml(make("smollm2-135m").model_dump()))
    return path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("corpora", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpora = (options.corpora or demo_corpora(folder)).resolve()
        bare, fast, mine = [], [], []
        for repeat in range(options.repeats):
            size, seconds = ask(BARE, corpora, "encode_batch", TOKENIZERS_PARALLELISM="true")
            bare.append(size / seconds / 1e6)
            size, seconds = ask(BARE, corpora, "encode_batch_fast", TOKENIZERS_PARALLELISM="true")
            fast.append(size / seconds / 1e6)
            started = time.perf_counter()
            seconds, memory = ask(SCION, corpora, Path(folder) / f"data-{repeat}")
            mine.append(size / seconds / 1e6)
            print(
                f"bare encode_batch {bare[-1]:.2f} MB/s, encode_batch_fast {fast[-1]:.2f} MB/s; scion prepare "
                f"{mine[-1]:.2f} MB/s ({time.perf_counter() - started:.0f} s with start-up, peak {memory:.2f} GB)",
                flush=True,
            )
        print(
            f"{size / 1e6:.0f} MB; best of {options.repeats}: scion / encode_batch {max(mine) / max(bare):.2f}, "
            f"scion / encode_batch_fast {max(mine) / max(fast):.2f}"
        )


if __name__ == "__main__":
    main()
