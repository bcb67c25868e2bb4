"""Speed of `scion prepare` beside the bare tokenizers library on the same text, interleaved, in one run.

    python benchmarks/prepare.py [CORPORA.yaml] [--repeats 2]

`datasets.map` is given the texts in memory as an Arrow table, the same tokenizer through transformers, and a cache file to
write; the better of one process with the library's threads and of two processes without counts. Bare means: every text in memory already, one `encode_batch_fast` over each 16 MB of it with the library's own threads on
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

TEXTS = """
import sys, time
from pathlib import Path
from scionlm.data.preparing.job import Job
from scionlm.data.reading.corpora import load_corpora
from scionlm.sources import load_tokenizer, resolve
path = Path(sys.argv[1])
corpora = load_corpora(path)
tokenizer = load_tokenizer(resolve(corpora.tokenizer).path)
job = Job.of(corpora, path.parent, Path("nowhere"))
batches, size = [[]], 0
for part in (part for parts in job.parts.values() for part in parts):
    for document in job.reader(part, quiet=True).read(part.files):
        batches[-1].append(document.text)
        size += len(document.text.encode())
        if size > 16e6 * len(batches):
            batches.append([])
"""
BARE = (
    TEXTS
    + """
started = time.perf_counter()
for batch in batches:
    getattr(tokenizer, sys.argv[2])(batch, add_special_tokens=False)
print(size, time.perf_counter() - started)
"""
)
MAP = (
    TEXTS
    + """
import datasets, tempfile
from transformers import AutoTokenizer
datasets.disable_progress_bars()
fast = AutoTokenizer.from_pretrained(resolve(corpora.tokenizer).path)
data = datasets.Dataset.from_dict({"text": [text for batch in batches for text in batch]})
with tempfile.TemporaryDirectory() as folder:
    started = time.perf_counter()
    data.map(
        lambda rows: {"ids": fast(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]},
        batched=True, num_proc=int(sys.argv[2]), remove_columns=["text"], cache_file_name=folder + "/map.arrow",
    )
    print(size, time.perf_counter() - started)
"""
)
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
        bare, fast, mine, mapped = [], [], [], []
        for repeat in range(options.repeats):
            size, seconds = ask(BARE, corpora, "encode_batch", TOKENIZERS_PARALLELISM="true")
            bare.append(size / seconds / 1e6)
            size, seconds = ask(BARE, corpora, "encode_batch_fast", TOKENIZERS_PARALLELISM="true")
            fast.append(size / seconds / 1e6)
            for processes in (1, 2):
                size, seconds = ask(
                    MAP, corpora, processes, TOKENIZERS_PARALLELISM="true" if processes == 1 else "false"
                )
                mapped.append(size / seconds / 1e6)
            started = time.perf_counter()
            seconds, memory = ask(SCION, corpora, Path(folder) / f"data-{repeat}")
            mine.append(size / seconds / 1e6)
            print(
                f"bare encode_batch {bare[-1]:.2f} MB/s, encode_batch_fast {fast[-1]:.2f} MB/s; datasets.map "
                f"{mapped[-2]:.2f} (1 process), {mapped[-1]:.2f} (2 processes) MB/s; scion prepare "
                f"{mine[-1]:.2f} MB/s ({time.perf_counter() - started:.0f} s with start-up, peak {memory:.2f} GB)",
                flush=True,
            )
        print(
            f"{size / 1e6:.0f} MB; best of {options.repeats}: scion / encode_batch {max(mine) / max(bare):.2f}, "
            f"scion / encode_batch_fast {max(mine) / max(fast):.2f}, "
            f"scion / datasets.map {max(mine) / max(mapped):.2f}"
        )


if __name__ == "__main__":
    main()
