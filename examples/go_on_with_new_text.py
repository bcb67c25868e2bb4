"""Go on with a model on new text, with and without replay, and see what it learns and what it forgets.

    scion prepare CORPORA.yaml -o data
    python examples/go_on_with_new_text.py smollm2-135m data prose code runs/new

`prose` is the domain that the model knows, `code` the one that is new; both are in the data folder. To replay what a
run of Scion's really saw, in its order, set replay.run to its folder instead of replay.domains.
"""

import sys
from typing import Any

import scionlm as scion

SETTINGS: dict[str, Any] = {
    "train.tokens": "200k",
    "train.global_batch_tokens": 1024,
    "train.micro_batch_size": 4,
    "data.seq_len": 256,
    "optimizer.lr": 3e-4,
    "schedule.warmup": 0.05,
    "evaluate.tokens_per_domain": 8192,
}
SHARES = (0.0, 0.05, 0.25)
SIDES = {"upstream": "forgetting", "downstream": "adaptation"}


def main(
    source: str, data: str, known: str, new: str, out: str, settings: dict[str, Any] = SETTINGS
) -> dict[float, dict[str, float]]:
    """Make a run for each share of replay and return what each forgot and gained, in nats."""
    shared = {
        "source": source,
        "data.dir": data,
        "data.mixture": {new: 1},
        "upstream.domains": [known],
        "replay.domains": [known],
    }
    found: dict[float, dict[str, float]] = {}
    for share in SHARES:
        result = scion.run("continual", shared | settings | {"replay.fraction": share}, out=f"{out}/replay-{share:g}")
        change = result["forgetting"]
        found[share] = {key: change[side][key] for side, key in SIDES.items()}
        print(f"replay {share:.0%}: forgot {found[share]['forgetting']:+.3f}, gained {found[share]['adaptation']:+.3f}")

    scion.compare([f"{out}/replay-{share:g}" for share in SHARES], f"{out}/compared")
    print(f"page: {out}/compared/compare.html")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:6])
