"""The mixture that a run really gets: counts against weights over many steps, for fixed, ramped and moving weights.

    python benchmarks/mixture.py DATA [--steps 2000] [--sequences 4]

Beside it what per-batch rounding and independent draws would have given.
"""

import argparse
from pathlib import Path

import numpy as np

from scionlm.data import DataFolder, Mixture, Order, SamplePlan


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=4)
    options = parser.parse_args()
    data = DataFolder(options.data)
    streams = {name: data.stream(name, "train") for name in data.domains}
    names, slots = list(streams), options.steps * options.sequences
    sizes = {name: float(stream.num_tokens) for name, stream in streams.items()}
    skewed = {name: 1.0 / 4**i for i, name in enumerate(names)}
    order = Order(256)

    def follow(title, plan, moves=None):
        asked, counts, worst = np.zeros(len(names)), np.zeros(len(names)), 0.0
        for slot in range(slots):
            if moves and slot % (50 * options.sequences) == 0:
                plan.set_weights(moves(slot), 50 * options.sequences)
            asked += np.array([plan.weights()[name] for name in names])
            counts[names.index(plan.take(1)[0].domain)] += 1
            worst = max(worst, float(np.abs(counts - asked).max()))
        print(f"{title}: largest deviation in any of {slots:,} prefixes {worst:.3f} sequences")
        for name, got, wanted in zip(names, counts, asked, strict=True):
            print(f"  {name:12} {int(got):6} of {wanted:9.2f} asked for")

    follow("by size", SamplePlan(streams, Mixture(sizes), order))
    follow("skewed 4 to 1", SamplePlan(streams, Mixture(skewed), order))
    follow("ramp from skewed to size", SamplePlan(streams, Mixture(sizes, skewed, slots // 2), order))
    rng = np.random.default_rng(0)
    follow(
        "moved every 50 steps at random",
        SamplePlan(streams, Mixture(sizes), order),
        lambda slot: dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True)),
    )
    share = np.array([skewed[name] for name in names]) / sum(skewed.values())
    rounded = np.round(share * options.sequences) * options.steps
    drawn = np.bincount(rng.choice(len(names), p=share, size=slots), minlength=len(names))
    print("skewed, rounded in each batch:", dict(zip(names, rounded.astype(int).tolist(), strict=True)))
    print("skewed, drawn independently:  ", dict(zip(names, drawn.tolist(), strict=True)))
    print("skewed, asked for:            ", dict(zip(names, np.round(share * slots, 1).tolist(), strict=True)))


if __name__ == "__main__":
    main()
