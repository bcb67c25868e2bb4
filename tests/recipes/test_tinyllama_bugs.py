"""What went wrong in TinyLlama's training, and does not here: one test for each fault that its issues report.

Held elsewhere: a window is read once an epoch and in another order each time, a run that goes on seeks instead of
reading again (tests/data/test_plan.py); no chunk or file is dropped whatever the number of workers
(tests/data/test_prepare.py); padding has no labels in packed windows (tests/data/test_packing.py); checkpoints are
ordered by number and not by text, so that step 1000000 is newer than 999999 (tests/train/test_checkpoint.py); k
micro-batches are one batch (tests/train/test_train.py); two ranks train what one does (tests/parallel/test_worlds.py)
from the same first weights (tests/recipes/test_model_shapes.py).
"""

from collections import Counter

import numpy as np
import pytest

from factories import corpora_file
from scionlm.data import DataFolder, Mixture, Order, SamplePlan, load_corpora, prepare
from scionlm.data.mixing.windows import IGNORE
from scionlm.parallel.ranks import Ranks
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.presets import load_recipe, preset_names
from scionlm.recipes.run import run_recipe
from scionlm.train.optimizer import Optimizer
from scionlm.train.step import own_batch
from whole_runs import SEQUENCES, SETTINGS, column, quicken

SCRATCH = [name for name in preset_names() if name.startswith("scratch-")]
SEQ_LEN = 24


class Rank(Ranks):
    """One of several, to be asked only what its share is."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world


def plan_over(data, domain="alpha", seed=0, packing="concat"):
    stream = data.stream(domain, "train")
    return SamplePlan({domain: stream}, Mixture({domain: 1.0}), Order(SEQ_LEN, seed, packing=packing))


def predicted(batch):
    """Return the rows of a batch of which something is predicted, as plain values."""
    rows = zip(batch.input_ids, batch.labels, strict=True)
    return [(ids.tobytes(), labels.tobytes()) for ids, labels in rows if (labels != IGNORE).any()]


def decays(recipe):
    """Return whether a rate ends at a tenth of its peak and is on its way there after a sixth of the tokens."""
    tokens, rates = 0, []
    for stage in recipe.resolved_stages:
        schedule = stage.build_schedule()
        for step in np.linspace(1, stage.total_steps, 200).astype(int):
            rates.append((tokens + step * stage.train.global_batch_tokens, schedule.at(int(step))))
        tokens += stage.total_steps * stage.train.global_batch_tokens
    early = min(value for at, value in rates if tokens / 6 <= at <= tokens / 5)
    return max(value for _, value in rates) > 0.99 and rates[-1][1] == pytest.approx(0.1) and early < 0.99


@pytest.mark.parametrize("name", SCRATCH)
def test_the_rate_falls_to_a_tenth_of_its_peak(name):
    """#27: min_lr was max_lr, so that the rate stood at its peak for the first 0.5T tokens."""
    assert decays(load_recipe(name))
    assert not decays(load_recipe(name, {"schedule.min_lr_ratio": 1.0}))


@pytest.mark.parametrize("world", [1, 2, 3, 8, 16])
def test_all_ranks_together_read_every_window_exactly_once_an_epoch(data_folder, world):
    """#67: each rank shuffled the files by a seed of its own and took its part: some were read twice, some never.

    The number of ranks need not divide the batch: what fills up the last ranks is not predicted.
    """
    plan, whole = plan_over(data_folder), plan_over(data_folder)
    num_windows = plan.num_windows("alpha")
    every = Counter(predicted(whole.batch(whole.take(num_windows))))
    assert set(every.values()) == {1}
    seen: Counter = Counter()
    for start in range(0, num_windows, 5):
        samples = plan.take(min(5, num_windows - start))
        for rank in range(world):
            seen.update(predicted(own_batch(plan, samples, Rank(rank, world))))
    assert seen == every

    as_it_was: Counter = Counter()
    for rank in range(world):
        own = plan_over(data_folder, seed=rank)
        mine = own.take(num_windows)[rank::world]
        as_it_was.update(predicted(own.batch(mine)))
    assert (as_it_was == every) == (world == 1)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("world", [1, 3])
def test_no_padding_is_ever_predicted_and_the_last_tokens_are_not_lost(data_folder, packing, world):
    """#83: a chunk that was not full was filled with BOS and trained on; then it was thrown away instead."""
    plan, stream = plan_over(data_folder, packing=packing), data_folder.stream("alpha", "train")
    separator, documents = data_folder.tokenizer.separator_id, len(stream.document_ends)
    assert (stream.num_tokens - 1) % SEQ_LEN  # the last window of the stream is not full
    samples = plan.take(plan.num_windows("alpha"))
    labels = np.concatenate([own_batch(plan, samples, Rank(rank, world)).labels for rank in range(world)])
    learned = labels[labels != IGNORE]
    text = stream.read(0, stream.num_tokens)
    first = 1 if packing == "concat" else 0  # the very first token of a stream has nothing before it to be told from
    assert Counter(learned.tolist()) == Counter(text[first:].tolist())
    assert np.count_nonzero(learned == separator) == documents
    if packing == "best_fit":
        filled = np.where(labels == IGNORE, separator, labels)  # as it was: padding is a token like any other
        assert np.count_nonzero(filled == separator) > documents


@pytest.mark.parametrize("bos", [None, "Q"])
def test_the_data_say_which_tokens_stand_around_a_document_and_have_one_of_each(tiny_folder, tmp_path, bos):
    """#40, #55, #76, #116: whether documents had a BOS or an end was a default that changed silently three times."""

    def prepared(name, **settings):
        path = corpora_file(tmp_path / name, tiny_folder, num_documents=20, words=30, **settings)
        prepare(load_corpora(path), path.parent, tmp_path / name / "data")
        return DataFolder(tmp_path / name / "data")

    data = prepared("asked", bos=bos)
    stated = data.tokenizer
    assert (stated.separator, stated.bos) == ("<|endoftext|>", bos)
    for split in ("train", "held_out"):
        stream = data.stream("alpha", split)
        tokens, documents = stream.read(0, stream.num_tokens), len(stream.document_ends)
        assert np.count_nonzero(tokens == stated.separator_id) == documents
        assert np.array_equal(np.flatnonzero(tokens == stated.separator_id) + 1, stream.document_ends)
        if bos is not None:
            starts = [0, *stream.document_ends[:-1]]
            assert np.flatnonzero(tokens == stated.bos_id).tolist() == starts
    other = prepared("other", bos="Z")  # never the same data by another policy: a run would refuse to go on with it
    assert other.fingerprint != data.fingerprint


def test_the_rate_is_one_for_a_whole_step_whatever_the_micro_batch(data_folder, tmp_path, monkeypatch):
    """#172: the rate moved with each micro-batch, so that an update was made with that of its last one."""
    quicken(monkeypatch.setattr)
    model = {"shape": "tinyllama-120m", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    train = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")}
    settings = train | {"data.dir": str(data_folder.path), "model": model, "schedule.warmup": 2}
    step, used, found = Optimizer.step, [], {}

    def watched(optimizer, lr, divisor=1.0):
        used.append(lr)
        return step(optimizer, lr, divisor)

    monkeypatch.setattr(Optimizer, "step", watched)
    for micro in (1, 2, SEQUENCES):
        used.clear()
        recipe = load_recipe("scratch", settings | {"train.micro_batch_size": micro})
        run_recipe(recipe, tmp_path / str(micro))
        found[micro] = list(used)
        assert column(tmp_path / str(micro), "optim/lr") == used
    schedule = recipe.resolved_stages[0].build_schedule()
    assert found[1] == found[2] == found[SEQUENCES] == [3e-3 * schedule.at(t) for t in range(1, recipe.total_steps + 1)]
    assert found[1][0] == 3e-3 / 2  # and the first update is made with a rate above zero
    per_micro_batch = [3e-3 * (t + 1 - 1 / SEQUENCES) / 2 for t in range(2)]  # as it was
    assert found[1][:2] != pytest.approx(per_micro_batch)


@pytest.mark.parametrize("name", ["scratch-tinyllama-1.1b", "scratch-pythia-410m"])
def test_the_batch_is_the_same_on_any_number_of_devices(name):
    """The batch was given for each machine: twice as many of them trained with twice the batch, unsaid."""
    (stage,) = load_recipe(name).resolved_stages
    assert stage.sequences_per_step == 1024
    for world in (1, 3, 8, 16, 64, 1000):
        shares = [len(Rank(rank, world).block_of(range(stage.sequences_per_step))[0]) for rank in range(world)]
        assert sum(shares) == stage.sequences_per_step
    plans = [plan_recipe(load_recipe(name), "a100", world) for world in (1, 8, 16)]
    assert len({(plan["num_steps"], plan["num_tokens"], plan["flops"]) for plan in plans}) == 1
