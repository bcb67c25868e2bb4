"""Several ranks train what one process trains: the same samples, the same losses, whatever a run is made of."""

import zlib
from pathlib import Path

import pytest

from features import FEATURES
from scionlm.core.config import dump_yaml
from scionlm.core.records import read_json
from scionlm.recipes.run import run_recipe
from whole_runs import Watch, consumed_of, metrics_of, quicken
from worlds import World

FP32, BF16 = 1e-5, 1e-3
# Features of which nothing is peculiar to several ranks beside what others have; one layout is enough for these.
ONCE = ("schedule", "stages", "branch", "proxy", "control", "replay", "ema of", "random")


@pytest.fixture(scope="module")
def pair():
    with World(2) as world:
        yield world


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder, and the watch, of a run by one process; the same recipe is run once."""
    root, runs = tmp_path_factory.mktemp("alone"), {}

    def alone(recipe):
        key = dump_yaml(recipe.model_dump(mode="json"))
        if key not in runs:
            with pytest.MonkeyPatch.context() as patch:
                watch = Watch(patch)
                run_recipe(recipe, root / str(len(runs)))
            runs[key] = root / str(len(runs)), watch
        return runs[key]

    return alone


def numbers_of(value, path=""):
    """Yield every number in a record, by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_of(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers_of(inner, f"{path}/{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def close(mine: Path, theirs: Path, tolerance: float) -> None:
    """Check that two runs have the same metrics and results: losses within a relative tolerance, norms within ten."""
    found, wanted = metrics_of(mine), metrics_of(theirs)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    result = [read_json(out / "result.json")["domains"] for out in (mine, theirs)]
    for (path, value), (_, true) in zip(numbers_of([found, result[0]]), numbers_of([wanted, result[1]]), strict=True):
        if path.endswith("perplexity"):  # the loss again, exponentiated
            continue
        loose = 10 if path.endswith("grad_norm") or "ratio" in path or "divergence" in path else 1
        assert value == pytest.approx(true, rel=loose * tolerance, abs=1e-7), path


def same_samples(answers, watch) -> None:
    """Check that every rank went through the samples of one process, and that together they saw each of them once."""
    for answer in answers:
        assert answer["samples"] == [[list(sample) for sample in step] for step in watch.samples]
    for step, rows in enumerate(watch.rows()):
        shown = [row for answer in answers for row in answer["rows"][step]]
        assert {row.hex() for row in rows} <= set(shown)
        assert len(shown) == len(answers) * -(-len(rows) // len(answers))


def tolerance_of(feature: str) -> float:
    """Return what a feature allows: Muon makes its updates in bfloat16, whatever the run computes in."""
    return BF16 if "bf16" in str(FEATURES[feature]) or "muon" in str(FEATURES[feature]) else FP32


def has_dropout(feature: str) -> bool:
    return "GPT2" in str(FEATURES[feature])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("feature", [name for name in FEATURES if not has_dropout(name)])
def test_two_ranks_train_what_one_process_trains(feature, layout, make, alone, pair, tmp_path):
    if feature.startswith(ONCE) and (zlib.crc32(feature.encode()) % 2 == 0) == (layout == "ddp"):
        pytest.skip("the other layout has it")
    out, watch = alone(make(feature))
    recipe = make(feature, train__parallel=layout)
    answers = pair.run(recipe, tmp_path / "run")
    assert [answer["error"] for answer in answers] == [None, None]
    close(tmp_path / "run", out, tolerance_of(feature))
    same_samples(answers, watch)
    assert consumed_of(tmp_path / "run", recipe) == consumed_of(out, recipe)
    assert read_json(tmp_path / "run" / "training.json")["layout"] == layout
