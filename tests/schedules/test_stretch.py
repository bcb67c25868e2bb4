"""Stretches: several stages, of different batches, on one schedule of the whole run."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import UsageError
from scionlm.recipes.presets import load_recipe
from scionlm.schedules import Sizes, build_schedule, describe

quick = settings(max_examples=100)
LLAMA = {"model_type": "llama", "vocab_size": 64}


def of_run(stages, schedule, **settings):
    """Return a recipe whose schedule goes over all of its stages."""
    base = {"model": LLAMA, "data.dir": "data", "data.seq_len": 16, "train.tokens": None, "train.steps": None}
    return load_recipe("scratch", base | {"stages": stages, "schedule": schedule | {"over": "run"}} | settings)


def rates(recipe):
    """Return (tokens after the update, multiplier) of every update of a recipe."""
    tokens, found = 0, []
    for stage in recipe.resolved_stages:
        schedule = stage.build_schedule()
        for step in range(stage.total_steps):
            tokens += stage.train.global_batch_tokens
            found.append((tokens, schedule(step)))
    return found


@quick
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([32, 64, 96, 256])), min_size=1, max_size=4),
    st.sampled_from(["cosine", "linear", "wsd", "inverse_sqrt", "neox_cosine"]),
)
def test_every_rate_is_that_of_one_schedule_at_as_many_tokens(stages, name):
    config = [
        {"name": f"s{n}", "train": {"steps": steps, "global_batch_tokens": batch}}
        for n, (steps, batch) in enumerate(stages)
    ]
    recipe = of_run(config, {"name": name, "warmup": 0.1, "min_lr_ratio": 0.1})
    unit = 32
    total = recipe.total_tokens // unit
    divisor = recipe.resolved_stages[0].span.unit // unit
    whole = build_schedule(
        name, Sizes(total // divisor, round(total // divisor * 0.1), 0.0, 0.1, round(total // divisor * 0.1),
                    decay_shape="one_minus_sqrt")
    )  # fmt: skip
    assert [value for _, value in rates(recipe)] == [
        whole.at(tokens // (unit * divisor)) for tokens, _ in rates(recipe)
    ]
    assert rates(recipe)[-1][1] == whole.at(whole.total_steps)


def test_lengths_in_steps_are_steps_of_the_first_stage():
    stages = [
        {"name": "warm", "train": {"steps": 20, "global_batch_tokens": 64}},
        {"name": "large", "train": {"steps": 10, "global_batch_tokens": 96}},  # the unit is 32: half of a first step
    ]
    found = rates(of_run(stages, {"name": "linear", "warmup": 8, "min_lr_ratio": 0.0}))
    assert [value for _, value in found[:8]] == [step / 8 for step in range(1, 9)]
    assert found[-1][1] == 0.0


def test_a_warmup_may_go_on_into_the_next_stage():
    stages = [{"name": name, "train": {"steps": 5, "global_batch_tokens": 64}} for name in "ab"]
    found = rates(of_run(stages, {"name": "constant", "warmup": 8}))
    assert [value for _, value in found] == [min(step / 8, 1) for step in range(1, 11)]


def test_a_stage_with_its_own_schedule_starts_anew_beside_it():
    stages = [
        {"name": "a", "train": {"steps": 10, "global_batch_tokens": 64}},
        {"name": "b", "train": {"steps": 10, "global_batch_tokens": 64}, "schedule": {"over": "stage", "warmup": 0}},
    ]
    found = [value for _, value in rates(of_run(stages, {"name": "linear", "warmup": 0, "min_lr_ratio": 0.0}))]
    assert found[:10] == pytest.approx([1 - step / 20 for step in range(1, 11)])
    assert found[10:] == pytest.approx([1 - step / 10 for step in range(1, 11)])


def test_what_is_longer_than_the_run_is_refused():
    stages = [{"name": name, "train": {"steps": 5, "global_batch_tokens": 64}} for name in "ab"]
    with pytest.raises(UsageError, match="longer than its 10 steps"):
        of_run(stages, {"name": "cosine", "warmup": 11})


def test_a_stretch_is_plain_values_and_has_words():
    whole = build_schedule("linear", Sizes(100, 10, floor=0.0))
    one, other = whole.stretch(40, 10), whole.stretch(40, 10, stride=2)
    assert json.loads(json.dumps(one.to_list())) == one.to_list()
    assert len({json.dumps(schedule.to_list()) for schedule in (whole, one, other)}) == 3
    assert [one.total_steps, one.at(0), one.at(10), one.at(99)] == [10, whole.at(40), whole.at(50), whole.at(50)]
    assert other.at(10) == whole.at(60)
    assert one.phase(1) == "decay"
    assert describe(one, 1.0).startswith("10 steps from 0.667 to 0.556, a stretch of: warmup 10 steps to 1, decay")
