"""Gates on models of every family: open ones change nothing, closed ones are what a cut takes away."""

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.core.errors import DivergenceError
from scionlm.families import ModelShape, family_of
from scionlm.families.models import assemble, layers_of
from scionlm.families.weights import StateWeights
from scionlm.recipes.masks_plan import plan_of_masks
from scionlm.schedules import Piece, Schedule
from scionlm.surgery.apply import whole
from scionlm.surgery.fresh import lazy_fresh
from scionlm.surgery.operations import operations
from scionlm.surgery.target import target_config
from scionlm.train.gates import concrete
from scionlm.train.gates.axes import Axis, axes_of
from scionlm.train.gates.constraint import ConstraintSettings
from scionlm.train.gates.fold import fold_gates
from scionlm.train.gates.gates import Gates, start_from_scores
from scionlm.train.gates.masks import Masks
from scionlm.train.gates.pruner import Pruner, PruneSettings
from scionlm.train.objective import Objective

IDS = torch.arange(24).view(2, 12) * 7 % 300


def one_probability(log_alpha: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probability that a gate is one: that of noise above where the stretched value reaches it."""
    return torch.sigmoid(log_alpha - temperature * math.log((1 - concrete.GAMMA) / (concrete.ZETA - 1)))


def target_of(shape: ModelShape, has_head_dim: bool) -> ModelShape:
    """Return a target that loses something on every axis that can lose something."""
    groups = max(1, shape.num_key_value_heads // 2)
    inside = max(1, shape.num_attention_heads // shape.num_key_value_heads // 2)
    heads = groups * inside
    hidden = shape.hidden_size - 8 if has_head_dim else heads * shape.head_dim
    return replace(
        shape,
        num_hidden_layers=3,
        hidden_size=hidden,
        intermediate_size=shape.intermediate_size - 11,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )


def random_gates(model, seed=0) -> Gates:
    config = model.config.to_dict()
    axes = axes_of(ModelShape.of(config), target_of(ModelShape.of(config), family_of(config).has_head_dim))
    generator = torch.Generator().manual_seed(seed)
    start = {a.name: torch.randn(a.rows, a.units, generator=generator) * 1.5 for a in axes}
    return Gates(axes, seed=seed, start=start)


def pruned(model, gates, values=None):
    """Return the model that is cut where masks are closed, with soft gates folded in."""
    model = copy.deepcopy(model)
    if values is not None:
        fold_gates(model, values)
    config = model.config.to_dict()
    kept = {name: rows.tolist() for name, rows in gates.kept().items()}
    plan = plan_of_masks(kept, ModelShape.of(config), "source", "masks")
    target = target_config([config], plan)
    donors = [StateWeights(config, dict(model.named_parameters()))]
    fresh = lazy_fresh(target, 0)
    state = {op.place.name: whole(op, donors, fresh) for op in operations([config], target, plan)}
    return assemble(target, state, torch.float32)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_open_gates_change_no_bit_and_are_taken_off_again(model_type, changes):
    model = tiny_model(model_type, **changes)
    before = logits(model)
    masks = Masks(model)
    assert torch.equal(logits(model), before)
    gates = random_gates(model)
    masks.set({name: torch.ones_like(p) for name, p in gates.log_alpha.items()})
    assert torch.equal(logits(model), before)
    masks.set(gates.settled(exact=True))
    assert not torch.equal(logits(model), before)
    masks.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_masked_is_pruned(model_type, changes, soft):
    model = tiny_model(model_type, **changes)
    gates = random_gates(model)
    values = gates.settled(exact=True) if soft else {n: kept.float() for n, kept in gates.kept().items()}
    small = pruned(model, gates, values if soft else None)
    masks = Masks(model)
    masks.set(values)
    found = logits(model)
    assert close(found, logits(small)) < 1e-5
    with torch.no_grad():  # the negative control: one weight of the small one
        small.get_submodule(family_of(small.config.to_dict()).one("final_norm").module).weight.mul_(1.01)
    assert close(found, logits(small)) > 1e-4


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_a_closed_layer_is_a_skipped_one_and_closed_channels_are_read_by_nobody(model_type, changes):
    model = tiny_model(model_type, **changes)
    shape = ModelShape.of(model.config.to_dict())
    masks = Masks(model)
    open_layers = torch.ones(1, shape.num_hidden_layers)
    open_layers[0, 1] = 0
    masks.set({"layers": open_layers})
    found = logits(model)
    with torch.no_grad():
        for parameter in layers_of(model)[1].parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(logits(model), found)
    hidden = torch.ones(1, shape.hidden_size)
    hidden[0, 3] = 0
    masks.set({"hidden": hidden})
    found = logits(model)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 3] = 1e4
        if model.get_output_embeddings().weight is not embedding:
            model.get_output_embeddings().weight[:, 3] = 1e4
    assert torch.equal(logits(model), found)


def test_gradients_reach_every_gate_and_none_that_is_cut_off():
    model = tiny_model("llama")
    gates = random_gates(model)
    masks = Masks(model)
    values = gates.draw(0, 0)
    masks.set(values)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in gates.log_alpha.items():
        inside = (values[name] > 0) & (values[name] < 1)
        assert (parameter.grad[~inside] == 0).all()
        assert (parameter.grad[inside] != 0).any(), name


@pytest.mark.parametrize("log_alpha", [-concrete.LIMIT, -1.0, 0.0, 2.0, concrete.LIMIT])
def test_draws_are_zero_and_one_as_often_as_the_formulas_say(log_alpha):
    number = 40_000
    alpha = torch.full((number,), log_alpha)
    noise = torch.rand(number, generator=torch.Generator().manual_seed(1))
    drawn = concrete.sample(alpha, noise, concrete.TEMPERATURE)
    for share, formula in (
        ((drawn != 0).float().mean(), concrete.open_probability),
        ((drawn == 1).float().mean(), one_probability),
    ):
        p = float(formula(alpha[:1].double(), concrete.TEMPERATURE))
        assert abs(float(share) - p) < 4 * math.sqrt(p * (1 - p) / number) + 1e-6


@pytest.mark.parametrize(
    ("log_alpha", "open_", "one", "by_code"),
    [(4.60517, 0.99798, 0.95287, 0.99603), (0.0, 0.83182, 0.16818, 0.5), (2.0, 0.97337, 0.59902, 0.91683),
     (-4.60517, 0.04713, 0.00202, 0.00397)],
)  # fmt: skip
def test_published_values(log_alpha, open_, one, by_code):
    alpha, t = torch.tensor(log_alpha, dtype=torch.float64), concrete.TEMPERATURE
    assert float(concrete.open_probability(alpha, t)) == pytest.approx(open_, abs=1e-5)
    assert float(one_probability(alpha, t)) == pytest.approx(one, abs=1e-5)
    assert float(concrete.settled_by_code(alpha, t)) == pytest.approx(by_code, abs=1e-5)


@pytest.mark.parametrize(
    ("units", "kept", "closed"),
    [
        (4096, 2048, 97.2),
        (4096, 2560, 70.7),
        (11008, 5504, 261.1),
        (11008, 6912, 188.4),
        (32, 16, 0.76),
        (32, 24, 0.35),
    ],
)
def test_as_many_of_what_is_kept_have_to_be_closed_for_the_published_count_to_be_met(units, kept, closed):
    low, high = concrete.reachable(concrete.TEMPERATURE)
    assert ((units - kept) * low - kept * (1 - high)) / (high - low) == pytest.approx(closed, abs=0.05)


@pytest.mark.parametrize(("units", "target", "closed"), [(4096, 2048, 8), (11008, 5504, 22)])
def test_gates_that_are_as_open_as_they_can_be_close_a_few_where_the_expected_number_decides(units, target, closed):
    gates = Gates([Axis("ffn", 1, units, target)])
    assert int((~gates.kept(exact=False)["ffn"]).sum()) == closed
    assert int((~gates.kept()["ffn"]).sum()) == units - target
    low, _ = concrete.reachable(concrete.TEMPERATURE)
    assert 1 - low == pytest.approx(0.9529, abs=5e-5)  # the most of an axis that can be taken


def test_as_many_of_each_row_stay_for_evaluation_as_are_expected_to_be_open():
    """Of ten with a probability of 0.83182 (at 0), 0.97337 (at 2) and 0.04713 (at the lower end); no row is empty."""
    start = torch.tensor([0.0, 2.0, -concrete.LIMIT]).view(3, 1).repeat(1, 10)
    gates = Gates([Axis("ffn", 3, 10, 5)], start={"ffn": start})
    assert gates.kept(exact=False)["ffn"].sum(1).tolist() == [8, 10, 1]


@pytest.mark.parametrize(
    ("by_code", "soft"), [(False, [1.0, 0.95696, 0.5]), (True, [0.99603, 0.91683, 0.5])], ids=["own", "code"]
)
def test_gates_without_noise_are_soft_where_they_stay_and_zero_elsewhere(by_code, soft):
    """0.99798 + 0.97337 + 0.83182 + 0.04713 = 2.85 are expected to be open: three, where the target is two."""
    start = {"ffn": torch.tensor([[-concrete.LIMIT, 2.0, concrete.LIMIT, 0.0]])}
    gates = Gates([Axis("ffn", 1, 4, 2)], start=start)
    largest, second, third = soft
    found = gates.settled(exact=False, by_code=by_code)["ffn"].tolist()[0]
    assert found == pytest.approx([0.0, second, largest, third], abs=1e-5)
    found = gates.settled(exact=True, by_code=by_code)["ffn"].tolist()[0]
    assert found == pytest.approx([0.0, second, largest, 0.0], abs=1e-5)


def test_the_calibrated_scale_goes_from_zero_to_one():
    ends = torch.tensor([-concrete.LIMIT, concrete.LIMIT], dtype=torch.float64)
    scaled = concrete.calibrated(concrete.open_probability(ends, 2 / 3), 2 / 3)
    assert scaled.tolist() == pytest.approx([0.0, 1.0])


def test_a_draw_depends_on_seed_step_and_place_alone():
    axes = [Axis("hidden", 1, 64, 32), Axis("ffn", 3, 20, 10)]

    def drawn(seed, step, row):
        return Gates(axes, seed=seed, start={a.name: torch.zeros(a.rows, a.units) for a in axes}).draw(step, row)

    first = drawn(1, 2, 3)
    assert all(torch.equal(first[name], drawn(1, 2, 3)[name]) for name in first)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not torch.equal(first["hidden"], drawn(*other)["hidden"])


@settings(max_examples=50)
@given(st.data())
def test_each_row_keeps_exactly_the_target_even_with_ties(data):
    rows, units = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    target = data.draw(st.integers(1, units - 1))
    levels = st.sampled_from([-4.0, 0.0, 1.0, 4.0])
    values = data.draw(st.lists(st.lists(levels, min_size=units, max_size=units), min_size=rows, max_size=rows))
    gates = Gates([Axis("ffn", rows, units, target)], start={"ffn": torch.tensor(values)})
    kept = gates.kept()["ffn"]
    assert (kept.sum(1) == target).all()
    for row, stays in zip(values, kept.tolist(), strict=True):
        lowest = min(v for v, s in zip(row, stays, strict=True) if s)
        assert all(v <= lowest for v, s in zip(row, stays, strict=True) if not s)


def test_apart_attention_and_mlp_of_a_layer_stay_together():
    axes = [Axis("attention", 1, 4, 2), Axis("mlp", 1, 4, 2)]
    start = {"attention": torch.tensor([[3.0, 2.0, -1.0, -4.0]]), "mlp": torch.tensor([[-4.0, 2.0, 3.0, -4.0]])}
    kept = Gates(axes, start=start).kept()
    assert kept["attention"].tolist() == kept["mlp"].tolist() == [[False, True, True, False]]
    apart = Gates(axes, start=start).kept(exact=False)
    assert apart["attention"].tolist() != apart["mlp"].tolist()


def test_gates_begin_in_the_order_of_scores():
    axis = Axis("ffn", 2, 4, 2)
    start = start_from_scores([axis], {"ffn": torch.tensor([[0.1, 9.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])}, 2.0)
    gates = Gates([axis], start=start)
    assert gates.kept()["ffn"].tolist() == [[False, True, True, False], [True, True, False, False]]
    assert float(start["ffn"].max() - start["ffn"].min()) == pytest.approx(2.0)


def test_only_what_shrinks_has_gates():
    shape = ModelShape.of(tiny_model("llama").config.to_dict())
    assert axes_of(shape, shape) == []
    assert [axis.name for axis in axes_of(shape, replace(shape, hidden_size=16))] == ["hidden"]


def objective_of(model, gates, checkpointing="none", **changes):
    schedule = Schedule((Piece("constant", "constant", 10, 1.0, 1.0),))
    pruner = Pruner(model, gates, PruneSettings(0.1, 1.0, schedule, 10, ConstraintSettings(warmup=4), **changes))
    return Objective(model, torch.float32, checkpointing=checkpointing, pruner=pruner)


def passed(objective) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients, of weights and gates, of a pass in training."""
    objective.train()
    objective.at_step(2)
    objective.at_row(1)
    loss, _, _ = objective(IDS, IDS)
    loss.backward()
    pruner = objective.pruner
    return float(loss.detach()), {
        n: p.grad for n, p in [*objective.model.named_parameters(), *pruner.gates.log_alpha.items()]
    }


COMPILED = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a compiler"),
]


@pytest.mark.parametrize(
    "how",
    ["selective", "full", pytest.param("compiled", marks=COMPILED), pytest.param("compiled and full", marks=COMPILED)],
)
def test_what_is_made_again_or_compiled_sees_the_same_gates(how):
    plain, other = tiny_model("llama"), tiny_model("llama")
    objective = objective_of(other, random_gates(other), how.split()[-1] if how != "compiled" else "none")
    if "compiled" in how:
        torch._dynamo.reset()
        objective.compile()
    loss, gradients = passed(objective)
    expected, theirs = passed(objective_of(plain, random_gates(plain)))
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in theirs.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name
    if how == "compiled":  # other gates, the same graph
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        objective.at_step(3)
        objective(IDS, IDS)[0].backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before < 3


def test_evaluation_has_no_noise_and_training_has():
    model = tiny_model("llama")
    objective = objective_of(model, random_gates(model))
    objective.at_step(1)
    first, again = (objective.token_nll(IDS, IDS) for _ in range(2))
    assert torch.equal(first, again)
    losses = set()
    for row in (0, 1):
        objective.at_row(row)
        losses.add(float(objective(IDS, IDS)[0].detach()))
    assert len(losses) == 2
    objective.at_step(10)  # hard masks: no noise in training either
    a, b = (float(objective(IDS, IDS)[0].detach()) for _ in range(2))
    assert a == b


@pytest.mark.parametrize("by_code", [False, True], ids=["own", "code"])
def test_evaluation_has_as_many_units_as_are_open_while_gates_are_learned_and_the_targets_at_the_end(by_code):
    model, plain = tiny_model("llama"), tiny_model("llama")
    gates = random_gates(model)
    objective = objective_of(model, gates, by_code=by_code)
    masks = Masks(plain)

    def masked(values):
        masks.set(values)
        return torch.nn.functional.cross_entropy(logits(plain).flatten(0, 1), IDS.flatten(), reduction="none")

    def evaluated(step):
        objective.at_step(step)
        return objective.token_nll(IDS, IDS).flatten()

    now, exact, other_kind = (
        masked(gates.settled(exact, by_code=kind))
        for exact, kind in ((False, by_code), (True, by_code), (False, not by_code))
    )
    last = exact if by_code else masked({name: kept.float() for name, kept in gates.kept().items()})
    for step, expected, others in ((1, now, (exact, other_kind, last)), (9, now, (last,)), (10, last, (now,))):
        assert close(evaluated(step), expected) < 1e-5
        for other in others:
            assert close(other, expected) > 1e-3


def test_a_gate_that_is_not_a_number_ends_the_run():
    gates = Gates([Axis("hidden", 1, 4, 2)], start={"hidden": torch.tensor([[1.0, 2.0, 3.0, 0.0]])})
    with torch.no_grad():
        gates.log_alpha["hidden"][0, 1] = math.nan
    with pytest.raises(DivergenceError, match="not a number"):
        gates.kept()
