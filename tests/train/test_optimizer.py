"""Which weights decay, which go to Muon, how fast each moves, and what a saved state gives back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from factories import MODEL_IDS, MODELS, NUM_LAYERS, tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.shards import InMemory

LR = 3e-3
UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
quick = settings(max_examples=10)


def give_gradients(model: nn.Module, seed: int) -> None:
    """Put the same random gradients into every copy of a model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def some_steps(model: nn.Module, optimizer: Optimizer, seeds: range, lr: float = LR) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step(lr)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Compare bits, so that -0.0 is not 0.0."""
    return a.keys() == b.keys() and all(a[n].numpy().tobytes() == b[n].numpy().tobytes() for n in a)


def looked_up(model: nn.Module) -> set[str]:
    """Return the names of the weights of all embeddings, by the kind of their module."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name for name, p in model.named_parameters() if id(p) in tables}


def matrices(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim == 2} - looked_up(model)


def in_layers(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def decayed(model: nn.Module, optimizer: Optimizer, lr: float, decay: float) -> set[str]:
    """Return which weights a step with gradients of zero shrinks by `lr * decay`; the others may not move at all."""
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lr)
    shrunk = set()
    for name, after in weights_of(model).items():
        if not torch.equal(after, before[name]):
            torch.testing.assert_close(after, before[name] * (1 - lr * decay), rtol=1e-6, atol=0)
            shrunk.add(name)
    return shrunk


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(model_type, changes, name):
    model = tiny_model(model_type, **changes)
    settings = OptimizerSettings(name=name, weight_decay=0.5)
    assert decayed(model, Optimizer(model, settings), 0.1, 0.5) == matrices(model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_divisor_is_as_if_gradients_had_been_divided(name):
    found = []
    for divided, divisors in ((True, (1.0, 8.0, 2.0)), (False, (1.0, 8.0, 2.0)), (False, (1.0, 1.0, 1.0))):
        model = tiny_model(seed=1)
        optimizer = Optimizer(model, OptimizerSettings(name=name))
        for seed, divisor in enumerate(divisors):
            give_gradients(model, seed)
            for parameter in model.parameters():
                parameter.grad /= 1.0 if divided else divisor
            optimizer.step(LR, divisor if divided else 1.0)
        found.append(weights_of(model) | optimizer.tensors())
    assert same_bits(found[0], found[1])
    assert not any(torch.equal(found[0][key], found[2][key]) for key in weights_of(model))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_untied_head_decays_and_a_tied_one_does_not(name):
    settings = OptimizerSettings(name=name, weight_decay=0.5)
    untied, tied = tiny_model(tie_word_embeddings=False), tiny_model()
    assert "lm_head.weight" in decayed(untied, Optimizer(untied, settings), 0.1, 0.5)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & decayed(tied, Optimizer(tied, settings), 0.1, 0.5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_all_weights_decay_where_that_is_asked_for(name):
    model = tiny_model(**UNTIED)
    optimizer = Optimizer(model, OptimizerSettings(name=name, weight_decay=0.5, decay="all"))
    assert decayed(model, optimizer, 0.1, 0.5) == set(weights_of(model))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_every_weight_is_in_exactly_one_group_and_is_counted_there(model_type, changes, name):
    model = tiny_model(model_type, **changes)
    optimizer = Optimizer(model, OptimizerSettings(name=name))
    assert sorted(map(id, optimizer.parameters)) == sorted(map(id, model.parameters()))
    counts = {}
    for group in optimizer.groups():
        key = (group["optimizer"], group["weight_decay"] > 0)
        assert key not in counts
        assert group["lr_scale"] == 1.0
        counts[key] = group["num_parameters"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    to_muon = {n for n in matrices(model) if in_layers(n)} if name == "muon" else set()
    expected = {
        ("adamw", False): sum(sizes[n] for n in sizes if n not in matrices(model)),
        ("adamw", True): sum(sizes[n] for n in matrices(model) - to_muon),
        ("muon", True): sum(sizes[n] for n in to_muon),
    }
    assert counts == {key: count for key, count in expected.items() if count}


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_muon_takes_exactly_the_matrices_inside_the_layers(model_type, changes):
    model = tiny_model(model_type, **changes)
    optimizer = Optimizer(model, OptimizerSettings(name="muon"))
    some_steps(model, optimizer, range(1))
    kinds = {}
    for key in optimizer.tensors():
        name, _, kind = key.rpartition("/")
        kinds.setdefault(name, set()).add(kind)
    inside = {name for name in matrices(model) if in_layers(name)}
    assert inside
    assert {name for name, found in kinds.items() if found == {"momentum_buffer"}} == inside
    others = {name for name, found in kinds.items() if found == {"exp_avg", "exp_avg_sq", "step"}}
    assert others == set(weights_of(model)) - inside


def test_the_groups_are_a_record_that_nobody_can_change():
    optimizer = Optimizer(tiny_model(), OptimizerSettings())
    optimizer.groups()[0]["num_parameters"] = -1
    assert all(group["num_parameters"] > 0 for group in optimizer.groups())


def reference_adamw(model: nn.Module, names: set[str], settings: OptimizerSettings, lr: float) -> torch.optim.AdamW:
    """Return torch's AdamW with those of `names` decayed that are matrices and not looked up."""
    decays = matrices(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in names & decays], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n in names - decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)


def test_steps_of_adamw_are_torchs_own_to_the_bit():
    settings = OptimizerSettings()
    mine = tiny_model(**UNTIED)
    theirs, wrong = copy.deepcopy(mine), copy.deepcopy(mine)
    optimizer, reference = Optimizer(mine, settings), reference_adamw(theirs, set(weights_of(theirs)), settings, LR)
    everything = torch.optim.AdamW(wrong.parameters(), lr=LR, betas=settings.betas, weight_decay=0.1, fused=True)
    for seed in range(3):
        for model in (mine, theirs, wrong):
            give_gradients(model, seed)
        optimizer.step(LR)
        reference.step()
        everything.step()
    assert same_bits(weights_of(mine), weights_of(theirs))
    assert not same_bits(weights_of(mine), weights_of(wrong))  # the control: decay in the wrong places would show


def test_steps_of_adamw_are_the_formula():
    """In float64, from the paper's equations: moments, their bias taken out, decay apart from the gradient."""
    settings = OptimizerSettings(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    model = tiny_model(**UNTIED)
    weights = {name: p.double() for name, p in weights_of(model).items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = Optimizer(model, settings)
    for step in (1, 2, 3):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            decay = 0.2 if name in matrices(model) else 0.0
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            weights[name] = weights[name] * (1 - LR * decay) - LR * update
        optimizer.step(LR)
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight.double(), weights[name], rtol=1e-5, atol=1e-6)


def test_steps_of_muon_on_matrices_are_torchs_own_to_the_bit():
    settings = OptimizerSettings(name="muon", momentum=0.9)
    mine = tiny_model(**UNTIED)
    theirs, wrong = copy.deepcopy(mine), copy.deepcopy(mine)
    inside = {name for name in matrices(mine) if in_layers(name)}
    rest = set(weights_of(mine)) - inside

    def muon(model, **changes):
        chosen = [p for name, p in model.named_parameters() if name in inside]
        return torch.optim.Muon(chosen, lr=LR, weight_decay=0.1, momentum=0.9, **changes)

    optimizer = Optimizer(mine, settings)
    references = [muon(theirs, adjust_lr_fn="match_rms_adamw"), reference_adamw(theirs, rest, settings, LR)]
    other = muon(wrong, adjust_lr_fn="original")
    for seed in range(3):
        for model in (mine, theirs, wrong):
            give_gradients(model, seed)
        optimizer.step(LR)
        for reference in (*references, other):
            reference.step()
    assert same_bits(weights_of(mine), weights_of(theirs))
    left = weights_of(wrong)
    assert not any(torch.equal(weights_of(mine)[name], left[name]) for name in inside)


def test_an_update_of_muon_is_as_large_as_one_of_adamw():
    """Its root mean square is a fifth of the learning rate, whatever the shape and however large the gradient."""
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings(name="muon", weight_decay=0.0))
    before = weights_of(model)
    give_gradients(model, 0)
    for parameter in model.parameters():
        parameter.grad *= 1000
    optimizer.step(LR)
    for name in (n for n in matrices(model) if in_layers(n)):
        moved = (weights_of(model)[name] - before[name]).square().mean().sqrt()
        assert 0.1 * LR < moved < 0.3 * LR, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_scale_of_zero_freezes_a_layer_to_the_bit(name):
    model = tiny_model(**UNTIED)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, :3] = torch.tensor([0.0, 1e-40, -1e30])
    before = weights_of(model)
    some_steps(model, Optimizer(model, OptimizerSettings(name=name, decay="all", lr_scales={1: 0.0})), range(3))
    after = weights_of(model)
    frozen = {n for n in before if n.startswith("model.layers.1.")}
    assert same_bits({n: before[n] for n in frozen}, {n: after[n] for n in frozen})
    assert not any(torch.equal(before[n], after[n]) for n in before.keys() - frozen)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@quick
@given(scales=st.dictionaries(st.sampled_from([0, 3, 4, "embedding", "final_norm", "head"]), st.floats(0, 4)))
def test_a_scale_is_a_multiplier_of_the_learning_rate(name, scales):
    model = tiny_model(**UNTIED)
    start = copy.deepcopy(model)
    optimizer = Optimizer(model, OptimizerSettings(name=name, lr_scales=scales))
    some_steps(model, optimizer, range(2))
    after = weights_of(model)
    parts = {"embedding": "model.embed_tokens.", "final_norm": "model.norm.", "head": "lm_head."}
    seen = set()
    for scale in {1.0, *scales.values()}:
        plain = copy.deepcopy(start)
        some_steps(plain, Optimizer(plain, OptimizerSettings(name=name)), range(2), lr=LR * scale)
        prefixes = [parts.get(where, f"model.layers.{where}.") for where in scales if scales[where] == scale]
        if scale == 1.0:
            prefixes += [f"model.layers.{i}." for i in range(NUM_LAYERS) if i not in scales]
            prefixes += [prefix for part, prefix in parts.items() if part not in scales]
        for key, weight in weights_of(plain).items():
            if key.startswith(tuple(prefixes)):
                assert torch.equal(weight, after[key]), (key, scale)
                seen.add(key)
    assert seen == set(after)
    assert {group["lr_scale"] for group in optimizer.groups()} <= {1.0, *scales.values()}


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({NUM_LAYERS: 0.5}, "5"),
        ({-1: 0.5}, "-1"),
        ({"attention": 0.5}, "'attention'"),
        ({"emebdding": 0.5}, "'emebdding'"),
        ({"head": 0.5}, "'head'"),  # tied
    ],
)
def test_a_scale_of_what_the_model_has_not_is_refused_and_says_what_it_has(scales, words):
    with pytest.raises(UsageError, match=rf"no {words} .*layers, embedding, final_norm"):
        Optimizer(tiny_model(), OptimizerSettings(lr_scales=scales))


def saved(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return a state after its way through a safetensors file."""
    return load(save({key: value.contiguous() for key, value in optimizer.tensors().items()}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_after_loading_is_the_step_of_the_one_never_saved(name):
    settings = OptimizerSettings(name=name, lr_scales={2: 0.5, "head": 2.0})
    whole = tiny_model(**UNTIED)
    optimizer = Optimizer(whole, settings)
    some_steps(whole, optimizer, range(3))
    state, second, forgetful = saved(optimizer), copy.deepcopy(whole), copy.deepcopy(whole)
    loaded, fresh = Optimizer(second, settings), Optimizer(forgetful, settings)
    some_steps(second, loaded, range(90, 91), lr=0.0)  # a state of its own, which loading has to replace
    second.load_state_dict(whole.state_dict())
    loaded.load(InMemory(state))
    assert same_bits(loaded.tensors(), optimizer.tensors())
    for model, one in ((whole, optimizer), (second, loaded), (forgetful, fresh)):
        some_steps(model, one, range(3, 6))
    assert same_bits(weights_of(whole), weights_of(second))
    assert same_bits(loaded.tensors(), optimizer.tensors())
    assert not same_bits(weights_of(whole), weights_of(forgetful))  # the control


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_loading_copies_so_that_two_optimizers_never_share_a_state(name):
    model, other = tiny_model(), tiny_model()
    optimizer, loaded = (Optimizer(m, OptimizerSettings(name=name)) for m in (model, other))
    some_steps(model, optimizer, range(2))
    loaded.load(InMemory(optimizer.tensors()))
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    some_steps(other, loaded, range(2, 4))
    assert same_bits(before, optimizer.tensors())


def test_a_state_is_empty_before_the_first_step_and_an_empty_one_can_be_loaded():
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings())
    assert optimizer.tensors() == {}
    some_steps(model, optimizer, range(1))
    optimizer.load(InMemory({}))
    assert optimizer.tensors() == {}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_reset_leaves_nothing_of_the_state(name):
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings(name=name))
    some_steps(model, optimizer, range(2))
    optimizer.load(InMemory(saved(optimizer)), carry="reset")
    assert optimizer.tensors() == {}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_carrying_moments_keeps_the_second_and_the_count_and_forgets_the_first(name):
    model = tiny_model(**UNTIED)
    optimizer = Optimizer(model, OptimizerSettings(name=name))
    some_steps(model, optimizer, range(3))
    before = saved(optimizer)
    optimizer.load(InMemory(before), carry="moments")
    after = optimizer.tensors()
    assert after.keys() == before.keys()
    kinds = set()
    for key, value in after.items():
        kind = key.rpartition("/")[2]
        kinds.add(kind)
        if kind in ("exp_avg", "momentum_buffer"):
            assert before[key].abs().sum() > 0
            assert value.shape == before[key].shape
            assert not value.any()
        else:
            assert kind in ("exp_avg_sq", "step")
            assert torch.equal(value, before[key])
    assert kinds == {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if name == "muon" else set())


def stage_change(carry: str) -> tuple[nn.Module, dict[str, torch.Tensor], Optimizer]:
    """Return a model after some steps and a change of optimizer, as at the end of a stage."""
    model = tiny_model()
    settings = OptimizerSettings(weight_decay=0.0)
    learner = Learner(Objective(model, torch.float32), Optimizer(model, settings), Guard(0))
    some_steps(model, learner.optimizer, range(4))
    learner.change_optimizer(Optimizer(model, settings), carry)
    return model, weights_of(model), learner.optimizer


def test_the_first_step_after_a_reset_is_the_learning_rate_times_the_gradients_sign():
    def direction(carry):
        model, before, optimizer = stage_change(carry)
        give_gradients(model, 50)
        for parameter in model.parameters():
            parameter.grad[parameter.grad.abs() < 1e-3] = 1e-3  # where eps does not matter
        signs = {name: p.grad.sign() for name, p in model.named_parameters()}
        optimizer.step(LR)
        return {name: (before[name] - w) / LR - signs[name] for name, w in weights_of(model).items()}

    assert all(off.abs().max() < 1e-3 for off in direction("reset").values())
    assert all(off.abs().max() > 0.1 for off in direction("keep").values())  # the control: without the reset it is not
    assert all(off.abs().max() > 0.1 for off in direction("moments").values())


def test_keeping_the_state_over_a_stage_is_going_on():
    whole = tiny_model()
    optimizer = Optimizer(whole, OptimizerSettings(weight_decay=0.0))
    some_steps(whole, optimizer, range(6))
    model, _, other = stage_change("keep")
    some_steps(model, other, range(4, 6))
    assert same_bits(weights_of(model), weights_of(whole))


@pytest.mark.parametrize(("before", "now"), [("adamw", "muon"), ("muon", "adamw")])
@pytest.mark.parametrize("carry", ["keep", "moments"])
def test_the_state_of_another_optimizer_is_refused_with_what_to_do(before, now, carry):
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings(name=before))
    some_steps(model, optimizer, range(1))
    with pytest.raises(UsageError, match=r"another optimizer; set optimizer_state: reset, or keep optimizer\.name"):
        Optimizer(model, OptimizerSettings(name=now)).load(InMemory(saved(optimizer)), carry)
    fresh = Optimizer(model, OptimizerSettings(name=now))
    fresh.load(InMemory(saved(optimizer)), "reset")
    assert fresh.tensors() == {}


@pytest.mark.parametrize(
    "other",
    [{"intermediate_size": 40}, {"num_hidden_layers": 6}, {"num_hidden_layers": 4}, {"tie_word_embeddings": False}],
    ids=str,
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_of_another_model_is_refused(name, other):
    model = tiny_model(**other)
    optimizer = Optimizer(model, OptimizerSettings(name=name))
    some_steps(model, optimizer, range(1))
    with pytest.raises(DataError, match="another model"):
        Optimizer(tiny_model(), OptimizerSettings(name=name)).load(InMemory(saved(optimizer)))


def test_gradients_are_dropped_when_asked():
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings(name="muon"))
    give_gradients(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_trained_beside_a_model_never_decays(name):
    model, beside = tiny_model(), torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Optimizer(model, OptimizerSettings(name=name, decay="all", weight_decay=0.1), {"beside": beside})
    settled = [facts for facts in optimizer.groups() if facts["weight_decay"] == 0]
    assert [facts["num_parameters"] for facts in settled] == [6]
    assert sum(facts["num_parameters"] for facts in optimizer.groups()) == 6 + sum(
        p.numel() for p in model.parameters()
    )
