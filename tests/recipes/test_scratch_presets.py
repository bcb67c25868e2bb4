"""The presets that train from scratch: what was published of their models, tokens and learning rates."""

import math

import pytest

from scionlm.families import count_parameters
from scionlm.recipes.origin import open_source
from scionlm.recipes.presets import load_recipe, preset_names
from scionlm.schedules import Sizes, build_schedule

SCRATCH = [name for name in preset_names() if name.startswith("scratch-")]


def rates(name):
    """Return the learning rate by number of update, of a preset of one stage."""
    (stage,) = load_recipe(name).resolved_stages
    return lambda t: stage.optimizer.lr * stage.build_schedule().at(t)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("scratch-tinyllama-1.1b", 1_100_048_384, 1024 * 2048 * 1_430_512),
        ("scratch-tinyllama-120m", 121_129_728, None),
        ("scratch-pythia-410m", 405_334_016, 299_892_736_000),
        ("scratch-gpt2", 124_439_808, 600_000 * 491_520),
    ],
)
def test_models_and_tokens_are_the_published_ones(name, parameters, tokens):
    recipe = load_recipe(name)
    config = open_source(recipe, None, weights=False).config
    assert count_parameters(config)["total"] == parameters
    assert recipe.total_tokens == tokens or tokens is None
    if tokens is None:
        assert recipe.total_tokens / parameters == pytest.approx(20, rel=2e-3)


def test_the_first_version_of_tinyllama_sees_three_trillion_tokens():
    assert load_recipe("scratch-tinyllama-1.1b").total_tokens == pytest.approx(3.000001e12, rel=1e-7)


@pytest.mark.parametrize(
    ("sequences", "steps", "tokens"),
    [(1024, 1_430_512, 3_000_001_101_824), (1104, 132_366, 299_278_467_072), (1024, 143_000, 299_892_736_000)],
)
def test_tokens_are_sequences_times_their_length_times_steps(sequences, steps, tokens):
    """Of TinyLlama, of the studies of re-warming, and of Pythia; from a budget in tokens the same steps follow."""
    settings = {"model": "pythia-410m", "data.dir": "data", "data.seq_len": 2048}
    settings["train.global_batch_tokens"] = sequences * 2048
    assert load_recipe("scratch", settings | {"train.steps": steps}).total_tokens == tokens
    assert load_recipe("scratch", settings | {"train.tokens": tokens}).total_steps == steps
    assert load_recipe("scratch", settings | {"train.tokens": tokens + 1}).total_steps == steps + 1


def test_the_rates_of_tinyllama_are_those_that_its_code_computes():
    """At the steps of its released checkpoints; update 1 has a two-thousandth of the peak, never none."""
    steps = [1000, 2000, 50_000, 240_000, 480_000, 715_256, 955_000, 1_195_000, 1_430_512]
    wanted = [2.000e-4, 4.000e-4, 3.990e-4, 3.759e-4, 3.094e-4, 2.204e-4, 1.298e-4, 6.361e-5, 4.000e-5]
    rate = rates("scratch-tinyllama-1.1b")
    assert [rate(step) for step in steps] == pytest.approx(wanted, rel=3e-4)
    assert rate(1) == pytest.approx(4e-4 / 2000)


def test_the_rates_of_pythia_are_those_of_the_scheduler_of_its_time():
    rate = rates("scratch-pythia-410m")
    warm, end = 1430, 143_000
    for step in (warm, 30_000, 71_500, 110_000):
        theirs = max(3e-5, 1.5e-4 * (1 + math.cos(math.pi * (step - warm) / end)))
        assert rate(step) == pytest.approx(theirs, rel=1e-12)
    reached = next(step for step in range(100_000, end) if rate(step) <= 3.0000001e-5)
    assert reached / end == pytest.approx(0.8052, abs=1e-3)
    correct = load_recipe("scratch-pythia-410m", {"schedule.name": "cosine"}).resolved_stages[0].build_schedule()
    assert 3e-4 * correct.at(reached) > 5e-5


def test_the_three_stages_of_the_second_tinyllama_follow_one_cosine_over_their_tokens():
    recipe = load_recipe("scratch-tinyllama-1.1b-v1.1")
    stages = recipe.resolved_stages
    unit = 896 * 2048
    whole = build_schedule("cosine", Sizes(recipe.total_tokens // unit, 2000, floor=0.1))
    tokens = 0
    for stage in stages:
        schedule, batch = stage.build_schedule(), stage.train.global_batch_tokens
        assert schedule.total_steps == stage.total_steps
        for step in (1, 2, 1000, 2000, 2001, 10_000, stage.total_steps // 2, stage.total_steps):
            assert schedule.at(step) == whole.at((tokens + step * batch) // unit)
        tokens += stage.total_steps * batch
        assert schedule.at(stage.total_steps) == whole.at(tokens // unit)
    assert tokens == pytest.approx(2e12, rel=1e-5)
    assert stages[-1].build_schedule().at(stages[-1].total_steps) == 0.1
    assert stages[-1].train.global_batch_tokens == 4 * stages[0].train.global_batch_tokens == 4 * unit
    # Each stage on its own, as it would be without `over: run`, would warm up and fall to the floor three times.
    alone = load_recipe("scratch-tinyllama-1.1b-v1.1", {"schedule.over": "stage"}).resolved_stages
    assert [stage.build_schedule().at(stage.total_steps) for stage in alone] == [0.1] * 3


def test_the_mixture_of_the_second_tinyllama_moves_over_six_billion_tokens():
    basic, continual, cooldown = load_recipe("scratch-tinyllama-1.1b-v1.1").resolved_stages
    assert basic.data.mixture == {"slimpajama": 1.0}
    assert continual.data.mixture == cooldown.data.mixture == {"slimpajama": 0.75, "starcoder": 0.15, "proofpile": 0.1}
    assert continual.data.ramp.start == {"slimpajama": 1.0}
    assert continual.steps(continual.data.ramp.over) * continual.train.global_batch_tokens == pytest.approx(
        6e9, rel=1e-3
    )
    assert cooldown.data.ramp is None


@pytest.mark.parametrize("name", [name for name in SCRATCH if not name.endswith("-mini")])
def test_small_twins_have_what_matters_of_the_large_ones(name):
    large, small = load_recipe(name), load_recipe(f"{name}-mini")
    assert large.initialization == small.initialization
    assert (large.schedule.name, large.schedule.over) == (small.schedule.name, small.schedule.over)
    keys = ("name", "betas", "eps", "weight_decay", "decay", "grad_clip")
    assert all(getattr(large.optimizer, key) == getattr(small.optimizer, key) for key in keys)
    assert [stage.name for stage in large.stages] == [stage.name for stage in small.stages]
    assert open_source(large, None).config["model_type"] == open_source(small, None).config["model_type"]
    if name == "scratch-tinyllama-1.1b":
        config = open_source(small, None).config
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        assert (heads // config["num_key_value_heads"], hidden // heads) == (8, 64)
        assert config["intermediate_size"] == 2.75 * hidden
        assert small.data.mixture == {"prose": 0.7, "code": 0.3}
