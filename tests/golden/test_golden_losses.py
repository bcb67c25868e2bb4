"""The losses of a few short runs, as they were when they were written down: what changes them must be meant.

`PYTHONPATH=tests python tests/golden/test_golden_losses.py --write` writes them again.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from factories import corpora_file, model_folder
from scionlm.data import load_corpora, prepare
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import SETTINGS as PLAIN
from whole_runs import column, quicken

LOSSES = Path(__file__).with_name("losses.json")
# Other kernels (ATEN_CPU_CAPABILITY, MKL_CBWR, one thread or two) move these by 1e-7 with AdamW, and by 2e-6 with Muon,
# whose orthogonalization is computed in bfloat16: hence its small learning rate. They move the divergence from a
# teacher, a small difference of large numbers, by 1e-7 nats.
RELATIVE = 1e-5
SETTINGS = {key: value for key, value in PLAIN.items() if not key.startswith("inherit")} | {
    "train.steps": 20, "data.mixture": {"alpha": 0.6, "beta": 0.4}, "evaluate.every": 0,
    "evaluate.tokens_per_domain": 200, "seed": 7,
}  # fmt: skip
RECIPES = {
    "adamw and cosine": {
        "recipe": "inheritune", "inherit.layers": 3,
        "optimizer.lr": 2e-3, "schedule": {"name": "cosine", "warmup": 3}, "train.micro_batch_size": 3,
    },
    "muon and wsd": {
        "recipe": "inheritune", "inherit.layers": 3,
        "optimizer.name": "muon", "optimizer.lr": 5e-4,
        "schedule": {"name": "wsd", "warmup": 2, "decay": 6, "decay_shape": "one_minus_sqrt"},
        "data.packing": "best_fit", "data.document_mask": True, "average": {"decay": 0.9},
    },
    "masks and bounded weights": {
        "recipe": "shear", "schedule": {"name": "cosine", "warmup": 3},
        "target": {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2,
                   "num_key_value_heads": 1},
        "prune.method": "masks", "prune.steps": 20, "prune.gates.start": "activation",
        "reweight.rule": "bounded", "reweight.every": 4, "reweight.tokens_per_domain": 100,
        "reweight.reference": {"alpha": 4.0, "beta": 4.2},
    },
    "replay and a teacher": {
        "recipe": "continual", "schedule": {"name": "linear", "warmup": 2}, "data.mixture": {"beta": 1.0},
        "replay.data": "DATA", "replay.domains": ["alpha"], "replay.fraction": 0.25,
        "distill.teacher": "TEACHER", "distill.weight": 0.3, "distill.temperature": 2.0, "distill.hidden": {},
    },
}  # fmt: skip
PARTS = {
    "masks and bounded weights": {"pruning": ("prune", "train/nll_nats"), "weights": ("", "reweight/alpha/weight")},
    "replay and a teacher": {
        "divergence": ("", "train/divergence_nats"), "hidden": ("", "train/hidden_error_ratio"),
    },
}  # fmt: skip
"""What else is written down of a recipe: the column of a folder."""


def inputs(root: Path) -> dict[str, str]:
    """Make a source, a teacher and a data folder: always the same."""
    source, teacher = (model_folder(root / name, seed=seed) for seed, name in enumerate(("source", "teacher")))
    path = corpora_file(root / "text", source)
    prepare(load_corpora(path), path.parent, root / "data")
    return {"SOURCE": str(source), "TEACHER": str(teacher), "DATA": str(root / "data")}


def measure(made: dict[str, str], out: Path, name: str, **changes) -> dict[str, list[float]]:
    """Return a run's loss at each step, what it comes to on held-out text, and its other parts."""
    settings = SETTINGS | {"source": "SOURCE", "data.dir": "DATA"} | RECIPES[name]
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    settings = {key: made.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    result = run_recipe(load_recipe(settings.pop("recipe"), settings), out)
    held_out = [result["domains"][domain]["nll"] for domain in ("alpha", "beta")]
    others = {part: column(out / folder, key) for part, (folder, key) in PARTS.get(name, {}).items()}
    return {"train": column(out, "train/nll_nats"), "held_out": held_out} | others


def approximately(values: list[float]):
    return pytest.approx(values, rel=RELATIVE, abs=1e-6)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_that_were_written_down(made, tmp_path, name):
    golden = json.loads(LOSSES.read_text())[name]
    assert (len(golden["train"]), len(golden["held_out"])) == (20, 2)
    assert {"train", "held_out", *PARTS.get(name, {})} == golden.keys()
    assert golden["train"][-1] < golden["train"][0] - 0.1, "it learns"
    losses = measure(made, tmp_path / "run", name)
    for part, values in golden.items():
        assert losses[part] == approximately(values), part


OF_TRAINING = [
    {"optimizer__betas": (0.9, 0.96)}, {"optimizer__weight_decay": 3.0}, {"schedule__warmup": 4}, {"seed": 8},
]  # fmt: skip
CHANGES = {
    "adamw and cosine": OF_TRAINING,
    "muon and wsd": OF_TRAINING,
    "masks and bounded weights": [
        {"prune__gates__start": "open"}, {"prune__gates__start": "magnitude"}, {"prune__gates__lr": 0.11},
        {"prune__gates__sharpen": 9.0}, {"prune__schedule": {"warmup": 4}}, {"reweight__pull": 0.2},
        {"reweight__max_step": 0.1},
    ],
    "replay and a teacher": [
        {"replay__fraction": 0.3}, {"replay__order": "reshuffled"}, {"distill__weight": 0.31},
        {"distill__temperature": 2.1}, {"distill__hidden": {"weight": 1.1}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in CHANGES.items() for change in changes],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_losses_of_a_slightly_other_run_are_others(made, tmp_path, name, change):
    """Negative control: the tolerance is finer than what a small change of the recipe does."""
    golden = json.loads(LOSSES.read_text())[name]
    losses = measure(made, tmp_path / "run", name, **change)
    assert any(losses[part] != approximately(values) for part, values in golden.items())


def write() -> None:
    """Write the losses of this machine down."""
    quicken()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = inputs(root)
        losses = {name: measure(made, root / name.replace(" ", "-"), name) for name in RECIPES}
    LOSSES.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("say --write to write the losses again")
    write()
