"""Inheritune of a model that has learned three small languages: what inheriting is worth, in nats.

Comments give what seeds 0, 1 and 2 came to, each with languages, source and runs of its own. The tests run seed 0.
"""

import pytest

from languages import LANGUAGES, corpora_of_languages, nats
from scionlm.data import load_corpora, prepare
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import quicken

SEED = 0
MODEL = {
    "model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
SEQ_LEN, STEPS = 32, 150

pytestmark = pytest.mark.slow


class Lab:
    """A source, and what becomes of parts of it."""

    def __init__(self, root, seed=SEED):
        self._root = root
        (root / "text").mkdir()
        prepare(load_corpora(corpora_of_languages(root / "text", seed)), root / "text", root / "data")
        self._common = {
            "data.dir": str(root / "data"), "data.mixture": dict.fromkeys(LANGUAGES, 1 / 3), "data.seq_len": SEQ_LEN,
            "train.micro_batch_size": 32, "train.global_batch_tokens": 32 * SEQ_LEN, "train.precision": "fp32",
            "train.compile": False, "schedule.warmup": 0.1, "evaluate.every": 0, "evaluate.tokens_per_domain": 2048,
            "optimizer.lr": 3e-3, "seed": seed,
        }  # fmt: skip
        learned = self._run("scratch", "source", {"model": MODEL, "train.steps": STEPS})
        self.source = nats(learned["domains"])

    def child(self, steps, **changes):
        """Inherit half of the layers, train them for some steps, and return the result."""
        settings = {"source": str(self._root / "source" / "model"), "inherit.layers": 4, "train.steps": steps}
        number = len(list(self._root.iterdir()))
        return self._run(
            "inheritune", f"run-{number}", settings | {k.replace("__", "."): v for k, v in changes.items()}
        )

    def _run(self, recipe, name, changes):
        return run_recipe(load_recipe(recipe, self._common | changes), self._root / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def half(lab):
    """The first half after a few steps, with a control."""
    return lab.child(20, control=True)


def test_half_of_the_layers_beat_random_weights_at_as_many_steps_by_much(half, lab):
    assert half["control"]["training"]["tokens"] == half["training"]["tokens"]
    assert nats(half["domains"]) < nats(half["control"]["domains"]) - 1.0  # 1.94, 1.89, 1.89


def test_the_gap_to_random_weights_closes_with_the_steps(half, lab):
    longer = lab.child(STEPS, control=True)
    gaps = [nats(one["control"]["domains"]) - nats(one["domains"]) for one in (half, longer)]
    assert 0.05 < gaps[1] < gaps[0] - 1.0  # 0.114, 0.102, 0.100


def test_the_first_half_is_worth_more_than_the_last(half, lab):
    last = lab.child(20, inherit__strategy="last")
    assert nats(half["domains"]) < nats(last["domains"]) - 0.12  # 0.32, 0.25, 0.26


def test_growth_reaches_the_source(lab):
    grow = {"from": "source", "by": 1, "tolerance": 0.02, "max_rounds": 4}
    growth = lab.child(STEPS // 3, inherit__layers=1, grow=grow)["growth"]
    assert growth["outcome"] == "matched"
    assert [one["layers"] for one in growth["rounds"]] == [1, 2, 3]  # so for all three
    assert growth["rounds"][0]["nll"] > lab.source + 0.1  # 0.165, 0.143
