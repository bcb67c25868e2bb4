"""Speed of reading: tokens a second out of memory-mapped shards, beside `datasets` (Arrow) random access, in one run.

    python benchmarks/reading.py [--tokens 50M] [--repeats 3]

Scion's figure is that of the whole path of a training step's data: dealing slots to domains, permuting, reading and
laying out input ids and labels, on one core. `datasets` gets the same windows as rows of a fixed size already, in
random order, as numpy. The floor is a copy of as many int64 as a batch has. Pages are in the cache for all.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from scionlm.core.duration import parse_count
from scionlm.data import Mixture, Order, SamplePlan, TokenStream
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

SEQ_LEN, BATCH = 1024, 256
SHARD = 2**22


def make_streams(folder, domains, tokens):
    """Write random documents of about a thousand tokens each; return a stream a domain."""
    rng = np.random.default_rng(0)
    info = TokenizerInfo("none", "0" * 64, 49152, "<|endoftext|>", 0, 0)
    streams = {}
    for domain in range(domains):
        shards = []
        for number in range(max(1, tokens // domains // SHARD)):
            path = Path(folder) / f"{domain}-{number}.safetensors"
            documents = [
                rng.integers(1, 49152, 1000, dtype=np.uint32) for _ in range(min(SHARD, tokens // domains) // 1001)
            ]
            write_shard(path, documents, [4000] * len(documents), info)
            shards.append(Shard(path))
        streams[f"d{domain}"] = TokenStream(shards)
    return streams


def rate(work, tokens, repeats):
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = max(best, tokens / (time.perf_counter() - started))
    return best


def plan_of(streams, start, **settings):
    plan = SamplePlan(streams, Mixture({name: 1.0 + i for i, name in enumerate(streams)}), Order(SEQ_LEN, **settings))
    if start:
        state = plan.state()
        shares = np.array([1.0 + i for i in range(len(streams))])
        counts = np.floor(shares / shares.sum() * start).astype(int)
        counts[-1] += start - counts.sum()
        state |= {"slot": start, "counts": dict(zip(streams, counts.tolist(), strict=True))}
        state["phase"] = state["phase"] | {"counts": counts.tolist()}
        started = time.perf_counter()
        plan.restore(state)
        plan.batch(plan.take(BATCH))
        print(
            f"  restored and a first batch of {BATCH} at slot {start:,}: {1e3 * (time.perf_counter() - started):.1f} ms"
        )
    return plan


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="50M")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokens = parse_count(options.tokens)
    batches = max(4, tokens // (SEQ_LEN * BATCH) // 4)
    read = batches * BATCH * SEQ_LEN
    with tempfile.TemporaryDirectory() as folder:

        def copy():
            source, target = np.ones((BATCH, SEQ_LEN), dtype=np.int64), np.empty((2, BATCH, SEQ_LEN), dtype=np.int64)
            for _ in range(batches):
                target[:] = source

        print(f"floor, a copy of ids and labels: {rate(copy, read, options.repeats) / 1e6:,.0f}M tokens/s")
        for domains in (1, 10, 100):
            streams = make_streams(folder, domains, tokens)
            for start in (0, 10**6 * BATCH):
                plan = plan_of(streams, start)

                def work(plan=plan):
                    for _ in range(batches):
                        plan.batch(plan.take(BATCH))

                print(
                    f"scion, {domains} domains, from slot {start:,}: {rate(work, read, options.repeats) / 1e6:,.0f}M tokens/s"
                )
        streams = make_streams(folder, 10, tokens)
        for settings in ({"packing": "best_fit"}, {"document_mask": True}):
            started = time.perf_counter()
            plan = plan_of(streams, 0, **settings)
            opened = time.perf_counter() - started

            def work(plan=plan):
                for _ in range(batches):
                    plan.batch(plan.take(BATCH))

            print(
                f"scion, 10 domains, {settings}: {rate(work, read, options.repeats) / 1e6:,.0f}M tokens/s, opened in {opened:.2f} s"
            )
        arrow(Path(folder), tokens, batches, options.repeats)


def arrow(folder, tokens, batches, repeats):
    """Random access to rows of as many tokens in an Arrow data set on disk."""
    import datasets

    datasets.disable_progress_bars()
    rows = tokens // (SEQ_LEN + 1)
    rng = np.random.default_rng(0)
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"), length=SEQ_LEN + 1)})
    data = datasets.Dataset.from_dict(
        {"ids": list(rng.integers(0, 49152, (rows, SEQ_LEN + 1), dtype=np.uint16))}, features=features
    )
    data.save_to_disk(str(folder / "arrow"))
    data = datasets.load_from_disk(str(folder / "arrow")).with_format("numpy")
    batches = max(2, batches // 8)

    def work():
        for _ in range(batches):
            ids = data[rng.integers(0, rows, BATCH)]["ids"].astype(np.int64)
            np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])

    def singly():
        for index in rng.integers(0, rows, BATCH).tolist():
            ids = data[index]["ids"].astype(np.int64)
            np.ascontiguousarray(ids[:-1]), np.ascontiguousarray(ids[1:])

    print(f"datasets (Arrow), one random row at a time: {rate(singly, BATCH * SEQ_LEN, repeats) / 1e6:,.0f}M tokens/s")
    print(
        f"datasets (Arrow), random rows in batches of {BATCH}: {rate(work, batches * BATCH * SEQ_LEN, repeats) / 1e6:,.0f}M tokens/s"
    )


if __name__ == "__main__":
    main()
