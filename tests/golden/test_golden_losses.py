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
from scionlm.recipes.run import run_recipe
from whole_runs import column, quicken, recipe_of

LOSSES = Path(__file__).with_name("losses.json")
# Other kernels (ATEN_CPU_CAPABILITY, MKL_CBWR, one thread or two) move these by 1e-7 with AdamW, and by 2e-6 with Muon,
# whose orthogonalization is computed in bfloat16: hence its small learning rate.
RELATIVE = 1e-5
SETTINGS = {
    "train.steps": 20, "data.mixture": {"alpha": 0.6, "beta": 0.4}, "evaluate.every": 0, "inherit.layers": 3,
    "evaluate.tokens_per_domain": 200, "seed": 7,
}  # fmt: skip
RECIPES = {
    "adamw and cosine": {
        "optimizer.lr": 2e-3, "schedule": {"name": "cosine", "warmup": 3}, "train.micro_batch_size": 3,
    },
    "muon and wsd": {
        "optimizer.name": "muon", "optimizer.lr": 5e-4,
        "schedule": {"name": "wsd", "warmup": 2, "decay": 6, "decay_shape": "one_minus_sqrt"},
        "data.packing": "best_fit", "data.document_mask": True, "average": {"decay": 0.9},
    },
}  # fmt: skip


def inputs(root: Path) -> tuple[Path, Path]:
    """Make a source and a data folder: always the same."""
    source = model_folder(root / "source")
    path = corpora_file(root / "text", source)
    prepare(load_corpora(path), path.parent, root / "data")
    return source, root / "data"


def measure(source: Path, data: Path, out: Path, name: str, **changes) -> dict[str, list[float]]:
    """Return a run's loss at each step, and what it comes to on held-out text."""
    settings = {key.replace(".", "__"): value for key, value in (SETTINGS | RECIPES[name]).items()}
    result = run_recipe(recipe_of(source, data, **settings | changes), out)
    held_out = [result["domains"][domain]["nll"] for domain in ("alpha", "beta")]
    return {"train": column(out, "train/nll_nats"), "held_out": held_out}


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
    assert golden["train"][-1] < golden["train"][0] - 0.1, "it learns"
    losses = measure(*made, tmp_path / "run", name)
    for part, values in golden.items():
        assert losses[part] == pytest.approx(values, rel=RELATIVE), part


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "change",
    [{"optimizer__betas": (0.9, 0.96)}, {"optimizer__weight_decay": 3.0}, {"schedule__warmup": 4}, {"seed": 8}],
    ids=lambda change: next(iter(change)),
)
def test_losses_of_a_slightly_other_run_are_others(made, tmp_path, name, change):
    """Negative control: the tolerance is finer than what a small change of the recipe does."""
    golden = json.loads(LOSSES.read_text())[name]
    losses = measure(*made, tmp_path / "run", name, **change)
    assert losses["train"] != pytest.approx(golden["train"], rel=RELATIVE)


def write() -> None:
    """Write the losses of this machine down."""
    quicken()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = inputs(root)
        losses = {name: measure(*made, root / name.replace(" ", "-"), name) for name in RECIPES}
    LOSSES.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("say --write to write the losses again")
    write()
