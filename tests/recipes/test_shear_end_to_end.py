"""Shearing of a model that has learned three small languages: what every part of it is worth, in nats.

Comments give what seeds 0 to 4 came to, each with languages, source and runs of its own. The tests run seed 0.
"""

import math

import pytest

from languages import LANGUAGES, NUM_WORDS, corpora_of_languages, nats
from scionlm.data import load_corpora, prepare
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import quicken

SEED = 0
MODEL = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
TARGET = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SEQ_LEN, STEPS, RECOVERY = 32, 40, 40
MASKS = {"method": "masks", "steps": 60, "gates": {"start": "open", "lr": 0.3}}
"""Gates that begin without knowing anything, so that what they choose is what they have learned."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield


@pytest.fixture(scope="module")
def sheared(tmp_path_factory):
    """Return what prunes the same source in a way that is given, and gives back the result."""
    root = tmp_path_factory.mktemp("languages")
    prepare(load_corpora(corpora_of_languages(root, SEED)), root, root / "data")
    common = {
        "data.dir": str(root / "data"),
        "data.mixture": dict.fromkeys(LANGUAGES, 1 / 3),
        "data.seq_len": SEQ_LEN,
        "train.micro_batch_size": 32,
        "train.precision": "fp32",
        "train.compile": False,
        "schedule.warmup": 0.1,
        "evaluate.tokens_per_domain": 512,
        "evaluate.every": 1,
        "seed": SEED,
    }
    first = {"train.steps": 100, "train.global_batch_tokens": 32 * SEQ_LEN, "optimizer.lr": 1e-2}
    learned = run_recipe(load_recipe("scratch", common | first | {"model": MODEL}), root / "source")
    assert nats(learned["domains"]) < 1.1  # 0.88, 0.86, 0.96, 0.86, 0.93; a chain with its language known: 0.69

    def sheared(prune, steps=1, **changes):
        out = tmp_path_factory.mktemp("sheared") / "run"
        settings = {"source": str(root / "source" / "model"), "target": TARGET, "prune": prune, "train.steps": steps}
        settings |= {"train.global_batch_tokens": 16 * SEQ_LEN, "optimizer.lr": 1e-2}
        return run_recipe(load_recipe("shear", common | settings | changes), out)

    return sheared


@pytest.fixture(scope="module")
def frozen(sheared):
    """The result of gates that learn while weights stay as they are."""
    return sheared(MASKS | {"optimizer": {"lr": 1e-8}})


def test_pruning_and_recovery_beat_random_weights_of_the_same_shape_at_as_many_tokens(sheared):
    result = sheared({"method": "masks", "steps": STEPS}, RECOVERY, control=True)
    control = result["control"]
    assert control["training"]["tokens"] == result["training"]["tokens"] == (STEPS + RECOVERY) * 16 * SEQ_LEN
    assert nats(control["domains"]) < math.log(NUM_WORDS) - 1  # it learns too
    assert nats(result["domains"]) < nats(control["domains"]) - 0.1  # 0.26, 0.16, 0.15, 0.17, 0.25


def test_gates_choose_better_than_chance(frozen, sheared):
    """Choosing alone: no weight moves."""
    others = [sheared({"method": "random"}, seed=seed) for seed in range(3)] + [sheared({"method": "first"})]
    best = min(nats(other["prune"]["domains"]) for other in others)
    assert nats(frozen["prune"]["domains"]) < best - 0.15  # 0.50, 0.52, 0.56, 0.62, 0.44


def test_weights_that_learn_with_the_gates_leave_less_to_recover(frozen, sheared):
    joint = sheared(MASKS)
    assert joint["prune"]["shape"] == frozen["prune"]["shape"]
    assert nats(joint["prune"]["domains"]) < nats(frozen["prune"]["domains"]) - 0.3  # 1.33, 1.17, 1.33, 1.36, 1.26
