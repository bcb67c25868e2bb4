"""Averages of the weights: which ones, how much of each, and that training does not notice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import STEPS, Run, equal
from torch import nn

from scionlm.core.errors import StoppedError
from scionlm.train.average import Average, AverageSettings
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.shards import InMemory

quick = settings(max_examples=60)


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def values(model: nn.Module) -> np.ndarray:
    """Return all weights as one row of float64."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy()


def bits(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors}


def mean_of(average: Average, model: nn.Module) -> np.ndarray:
    with average.in_place():
        return values(model)


def walk(model: nn.Module, average: Average, steps: range) -> list[np.ndarray]:
    """Move the weights at random, with a drift, and show them to the average; return them after each step."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 + torch.randn(parameter.shape, generator=generator))
        average.update(step)
        seen.append(values(model))
    return seen


@quick
@given(start=st.integers(0, 12), every=st.integers(1, 7), steps=st.integers(1, 40))
def test_uniform_is_the_plain_mean_of_the_weights_at_the_right_steps(start, every, steps):
    model = small_model()
    before = values(model)
    average = Average(model, AverageSettings("uniform", 0.9, start, every))
    seen = walk(model, average, range(1, steps + 1))
    taken = [seen[step - 1] for step in range(start + every, steps + 1, every)]
    assert average.count == len(taken)
    found = mean_of(average, model)
    if not taken:
        assert (found == seen[-1]).all()
        return
    np.testing.assert_allclose(found, np.mean(taken, axis=0), rtol=1e-5, atol=1e-5)
    for wrong in ([before, *taken], seen[start:], taken[1:]):  # the control: other sets of steps have other means
        if wrong and len(wrong) != len(taken):
            assert np.abs(found - np.mean(wrong, axis=0)).max() > 1e-2


@quick
@given(
    decay=st.sampled_from([0.0, 0.3, 0.9, 0.999]),
    start=st.integers(0, 5),
    every=st.integers(1, 4),
    steps=st.integers(1, 30),
)
def test_ema_is_its_recursion_and_at_first_a_plain_mean(decay, start, every, steps):
    model = small_model()
    average = Average(model, AverageSettings("ema", decay, start, every))
    seen = walk(model, average, range(1, steps + 1))
    expected, count = None, 0
    for step in range(start + every, steps + 1, every):
        count += 1
        kept = 0.0 if expected is None else min(decay, 1 - 1 / count)
        expected = kept * (0.0 if expected is None else expected) + (1 - kept) * seen[step - 1]
    assert average.count == count
    if expected is not None:
        np.testing.assert_allclose(mean_of(average, model), expected, rtol=1e-5, atol=1e-5)
    if expected is not None and decay == 0:
        assert (mean_of(average, model) == seen[start + count * every - 1]).all()


def test_ema_forgets_and_uniform_does_not():
    """The control of the two above: on a long walk the methods do not agree."""
    found = []
    for method in ("ema", "uniform"):
        model = small_model()
        average = Average(model, AverageSettings(method, 0.5, 0, 1))
        walk(model, average, range(1, 30))
        found.append(mean_of(average, model))
    assert np.abs(found[0] - found[1]).max() > 1


@pytest.mark.parametrize("fails", [False, True])
def test_in_place_gives_the_weights_back_to_the_bit_also_after_an_exception(fails):
    model = small_model()
    average = Average(model, AverageSettings("uniform", 0.9, 0, 1))
    walk(model, average, range(1, 5))
    with torch.no_grad():
        model[0].weight[0, :4] = torch.tensor([-0.0, 1e-40, 3e38, float("inf")])
    before, objects = bits(model.named_parameters()), [id(p) for p in model.parameters()]
    mean = bits(average.tensors().items())
    try:
        with average.in_place():
            assert bits(model.named_parameters()) == mean
            assert mean != before
            with torch.no_grad():
                model[2].weight.zero_()
            if fails:
                raise KeyError("anything")
    except KeyError:
        assert fails
    assert bits(model.named_parameters()) == before
    assert bits(average.tensors().items()) == mean
    assert [id(p) for p in model.parameters()] == objects


@pytest.mark.parametrize("method", ["ema", "uniform"])
def test_with_nothing_taken_in_the_weights_stay(method):
    model = small_model()
    average = Average(model, AverageSettings(method, 0.9, 10, 5))
    walk(model, average, range(1, 15))
    before = bits(model.named_parameters())
    with average.in_place():
        assert bits(model.named_parameters()) == before
    assert bits(model.named_parameters()) == before
    assert average.count == 0
    walk(model, average, range(15, 16))
    assert average.count == 1
    assert (mean_of(average, model) == values(model)).all()


@pytest.mark.parametrize("method", ["ema", "uniform"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_saved_average_goes_on_as_if_it_had_never_been_saved(tmp_path, method, cut):
    settings = AverageSettings(method, 0.7, 2, 2)
    whole = small_model()
    average = Average(whole, settings)
    walk(whole, average, range(1, cut + 1))
    CheckpointStore(tmp_path, 1).save({"step": cut, "count": average.count}, {"average": average.tensors()})
    checkpoint = CheckpointStore(tmp_path, 1).newest()
    second, other = small_model(seed=1), small_model(seed=2)
    for model in (second, other):
        model.load_state_dict(whole.state_dict())
    loaded, fresh = Average(second, settings), Average(other, settings)
    loaded.load(checkpoint.saved("average"), checkpoint.state["count"])
    for model, one in ((whole, average), (second, loaded), (other, fresh)):
        walk(model, one, range(cut + 1, 16))
    assert loaded.count == average.count
    assert bits(loaded.tensors().items()) == bits(average.tensors().items())
    if cut >= 4:  # the control: by then there is something to lose
        assert bits(fresh.tensors().items()) != bits(average.tensors().items())


def test_loading_does_not_share_what_was_loaded():
    model = small_model()
    average = Average(model, AverageSettings("uniform", 0.9, 0, 1))
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.load(InMemory(source), 3)
    before = bits(source.items())
    walk(model, average, range(1, 4))
    assert bits(source.items()) == before


@pytest.mark.parametrize("method", ["ema", "uniform"])
def test_a_run_with_an_average_stopped_and_resumed_has_the_same_average_bitwise(tmp_path, data_folder, method):
    def run(folder, stop_after=None):
        one = Run(tmp_path / folder, data_folder)
        one.learner.average = Average(one.objective.model, AverageSettings(method, 0.8, 2, 2))
        if stop_after:
            with pytest.raises(StoppedError):
                one.fit(stop_after=stop_after)
        else:
            one.fit()
        return one

    whole = run("whole")
    assert whole.learner.average.count == (STEPS - 2) // 2
    assert not equal(whole.learner.average.tensors(), whole.weights)
    for stop_after in (1, 4, 5):
        run(f"parts{stop_after}", stop_after)
        again = run(f"parts{stop_after}")
        assert again.learner.average.count == whole.learner.average.count
        assert equal(again.learner.average.tensors(), whole.learner.average.tensors())
        assert equal(again.weights, whole.weights)


def test_averaging_does_not_move_training(tmp_path, data_folder):
    plain, averaged = Run(tmp_path / "a", data_folder), Run(tmp_path / "b", data_folder)
    averaged.learner.average = Average(averaged.objective.model, AverageSettings("ema", 0.9, 0, 1))
    plain.fit()
    averaged.fit()
    assert averaged.learner.average.count == STEPS
    assert equal(plain.weights, averaged.weights)
