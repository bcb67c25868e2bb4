"""Targets: known shapes, requests filled in, parameters, what gates reach, candidates in a budget, steps on a way."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, UsageError
from scionlm.families import ModelShape, count_parameters, family_of
from scionlm.families.models import assemble, random_model
from scionlm.families.registry import FAMILIES
from scionlm.families.weights import StateWeights
from scionlm.recipes.masks_plan import plan_of_masks
from scionlm.recipes.model_shapes import KNOWN_SHAPES, TargetShape
from scionlm.recipes.targets import (
    _WHOLE_HEADS,
    Budget,
    candidates,
    check_reach,
    complete_target,
    config_with,
    steps_between,
)
from scionlm.surgery.apply import whole
from scionlm.surgery.fresh import lazy_fresh
from scionlm.surgery.operations import operations
from scionlm.surgery.target import resolved_config, target_config
from scionlm.train.gates.axes import axes_of
from scionlm.train.gates.gates import Gates
from scionlm.train.gates.masks import Masks

quick = settings(max_examples=60)
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def config_of(model_type, layers, hidden, ffn, heads, groups=None, head_dim=None, vocab=32000, tied=False):
    family = family_of({"model_type": model_type})
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }
    if family.has_kv_heads:
        sizes["num_key_value_heads"] = groups or heads
    if family.has_head_dim and head_dim:
        sizes["head_dim"] = head_dim
    named = {family.key(name): size for name, size in sizes.items()}
    return {"model_type": model_type, "tie_word_embeddings": tied} | named


LLAMA2_7B = config_of("llama", 32, 4096, 11008, 32)
LLAMA3_8B = config_of("llama", 32, 4096, 14336, 32, 8, vocab=128256)
QWEN3_8B = config_of("qwen3", 36, 4096, 12288, 32, 8, 128, vocab=151936)
SMOL = config_of("llama", 30, 576, 1536, 9, 3, vocab=49152, tied=True)
NEOX = config_of("gpt_neox", 32, 2560, 10240, 32, vocab=50304)


def total(config):
    return count_parameters(config)["total"]


def complete(config, model_name="the-source", **asked):
    return complete_target(asked, ModelShape.of(config), family_of(config), model_name)


def values(shape):
    return tuple(getattr(shape, name) for name in SIZES)


def lowest(size, most):
    return min(math.ceil(size * (1 - most) - 1e-9), size - 1)


@st.composite
def sources(draw, most_heads=16):
    """Draw the configuration of a source, with and without grouped heads and a head size of its own."""
    model_type = draw(st.sampled_from(["llama", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox", "gpt2", "opt"]))
    family = family_of({"model_type": model_type})
    groups = draw(st.integers(1, most_heads if not family.has_kv_heads else 8))
    inside = draw(st.integers(1, 4)) if family.has_kv_heads else 1
    heads, head_dim = groups * inside, draw(st.sampled_from([8, 64, 80]))
    own = family.has_head_dim and draw(st.booleans())
    hidden = heads * (draw(st.sampled_from([16, 40, 96])) if own else head_dim)
    return config_of(
        model_type,
        layers=draw(st.integers(1, 40)),
        hidden=hidden,
        ffn=draw(st.sampled_from([hidden, 4 * hidden, hidden * 8 // 3])),
        heads=heads,
        groups=groups,
        head_dim=head_dim if own else None,
        vocab=draw(st.sampled_from([100, 5000])),
        tied=draw(st.booleans()),
    )


@st.composite
def cuts(draw):
    """Draw a source and a feasible target."""
    config = draw(sources())
    source, family = ModelShape.of(config), family_of(config)
    groups = draw(st.integers(1, source.num_key_value_heads))
    heads = groups * draw(st.integers(1, source.num_attention_heads // source.num_key_value_heads))
    if not family.has_head_dim:
        hidden = heads * source.head_dim
    elif draw(st.booleans()):
        hidden = heads * draw(st.integers(1, source.hidden_size // heads))
    else:
        hidden = draw(st.integers(1, source.hidden_size))
    assume(model_type_allows(config, hidden, heads))
    target = TargetShape(
        draw(st.integers(1, source.num_hidden_layers)),
        hidden,
        draw(st.integers(1, source.intermediate_size)),
        heads,
        groups,
        source.head_dim,
    )
    assume(values(target) != values(source))
    return config, target


def feasible_range(config):
    """Return what an error says of the number of parameters; zeros where nothing is feasible."""
    with pytest.raises(UsageError) as caught:
        candidates(config, Budget(parameters=total(config)))
    words = str(caught.value).split("feasible: ")[1].replace(",", "")
    return (0, 0) if words == "none" else tuple(map(int, words.split(" to ")))


def model_type_allows(config, hidden, heads):
    return config["model_type"] not in _WHOLE_HEADS or hidden % heads == 0


@pytest.mark.parametrize(
    ("name", "family", "vocab", "tied", "parameters"),
    [
        ("sheared-llama-1.3b", "llama", 32000, False, 1_345_423_360),
        ("sheared-llama-2.7b", "llama", 32000, False, 2_701_560_320),
        ("sheared-llama-370m", "llama", 32000, False, 373_867_520),
        ("tinyllama-1.1b", "llama", 32000, False, 1_100_048_384),
        ("llama-3.2-1b", "llama", 128256, True, 1_235_814_400),
        ("llama-3.2-3b", "llama", 128256, True, 3_212_749_824),
        ("qwen3-0.6b", "qwen3", 151936, True, 596_049_920),
        ("qwen3-1.7b", "qwen3", 151936, True, 1_720_574_976),
        ("qwen2.5-0.5b", "qwen2", 151936, True, 494_032_768),
        ("qwen2.5-1.5b", "qwen2", 151936, True, 1_543_714_304),
        ("smollm2-135m", "llama", 49152, True, 134_515_008),
        ("smollm2-360m", "llama", 49152, True, 361_821_120),
        ("smollm2-1.7b", "llama", 49152, True, 1_711_376_384),
        ("pythia-70m", "gpt_neox", 50304, False, 70_426_624),
        ("pythia-160m", "gpt_neox", 50304, False, 162_322_944),
        ("pythia-410m", "gpt_neox", 50304, False, 405_334_016),
        ("pythia-1b", "gpt_neox", 50304, False, 1_011_781_632),
        ("pythia-1.4b", "gpt_neox", 50304, False, 1_414_647_808),
    ],
)
def test_known_shapes_have_the_parameters_that_their_makers_publish(name, family, vocab, tied, parameters):
    shape = KNOWN_SHAPES[name]
    assert total(config_of(family, *values(shape), shape.head_dim, vocab, tied)) == parameters


@pytest.mark.parametrize(
    ("name", "share"),
    [("sheared-llama-1.3b", 0.1875), ("sheared-llama-2.7b", 0.391839), ("sheared-llama-370m", 0.0476036)],
)
def test_the_published_targets_keep_the_published_share_of_attention_and_mlp(name, share):
    configs = (config_with(LLAMA2_7B, KNOWN_SHAPES[name]), LLAMA2_7B)
    kept, before = (count_parameters(config) for config in configs)
    found = (kept["attention"] + kept["mlp"]) / (before["attention"] + before["mlp"])
    assert found == pytest.approx(share, rel=2e-6)


@pytest.mark.parametrize("name", ["sheared-llama-1.3b", "sheared-llama-2.7b", "sheared-llama-370m"])
def test_the_published_targets_are_cut_from_llama_2_and_found_by_their_size(name):
    shape = complete(LLAMA2_7B, **KNOWN_SHAPES[name].to_dict())
    assert shape == KNOWN_SHAPES[name]
    check_reach(shape, ModelShape.of(LLAMA2_7B), 0.9529)
    if name != "sheared-llama-370m":  # 24 layers where 25 leave less of the budget
        first = candidates(LLAMA2_7B, Budget(parameters=total(config_with(LLAMA2_7B, shape))))[0]
        assert first.shape == shape


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_are_whole(name):
    shape = KNOWN_SHAPES[name]
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    larger = config_of("qwen2", *(2 * size for size in values(shape)), shape.head_dim)
    assert complete(larger, **shape.to_dict()) == shape


def test_what_is_left_open_is_as_in_the_source():
    assert values(complete(SMOL, num_hidden_layers=15)) == (15, 576, 1536, 9, 3)
    assert values(complete(SMOL, num_hidden_layers=None, num_attention_heads=6)) == (30, 576, 1536, 6, 2)
    assert values(complete(SMOL, num_key_value_heads=1, hidden_size=300)) == (30, 300, 1536, 3, 1)
    assert complete(SMOL, num_hidden_layers=15).head_dim == 64
    pythia = complete(config_of("gpt_neox", 24, 1024, 4096, 16), **KNOWN_SHAPES["pythia-160m"].to_dict())
    assert values(pythia) == (12, 768, 3072, 12, 12)


@pytest.mark.parametrize(
    ("config", "asked", "says"),
    [
        (SMOL, {}, "nothing would be pruned"),
        (SMOL, {"hidden_size": 576, "num_attention_heads": 9}, "nothing would be pruned"),
        (SMOL, {"hidden_size": 3000}, "hidden_size 3000 is more than the source's 576; feasible: 1 to 576"),
        (SMOL, {"num_hidden_layers": 0}, "num_hidden_layers 0 is not a whole number above 0; feasible: 1 to 30"),
        (SMOL, {"num_hidden_layers": True}, "True is not a whole number"),
        (SMOL, {"num_key_value_heads": 4}, "num_key_value_heads 4 is more than the source's 3"),
        (SMOL, {"num_attention_heads": 7}, "query heads; feasible: 3 to 9 in steps of 3"),
        (SMOL, {"num_attention_heads": 4, "num_key_value_heads": 3}, "3 to 9 in steps of 3, or num_key_value_heads 2"),
        (SMOL, {"hidden_size": 500, "num_attention_heads": 6}, "llama needs a multiple of num_attention_heads 6"),
        (SMOL, {"head_dim": 32}, "head_dim 32: heads keep the source's width; feasible: 64"),
        (SMOL, {"layers": 3}, "layers is not a size; sizes are num_hidden_layers"),
        (NEOX, {"hidden_size": 2400}, "feasible: 2560, or num_attention_heads 30"),
        (NEOX, {"num_attention_heads": 16}, "hidden_size 2560: gpt_neox has no head_dim setting"),
        (NEOX, {"num_key_value_heads": 8}, "gpt_neox has no grouped heads; set num_attention_heads only"),
    ],
)
def test_what_cannot_be_is_refused_and_says_what_can(config, asked, says):
    with pytest.raises(UsageError) as caught:
        complete(config, **asked)
    assert says in str(caught.value)
    assert "the-source" in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(UsageError) as caught:
        complete(SMOL, num_hidden_layers=31, hidden_size=0, intermediate_size=-1, num_attention_heads=7, head_dim=1)
    for name in (
        "num_hidden_layers 31",
        "hidden_size 0",
        "intermediate_size -1",
        "num_attention_heads 7",
        "head_dim 1",
    ):
        assert name in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_which_families_want_whole_heads_is_as_in_transformers(family):
    """Of the families with a head size of their own: the others have hidden_size from it."""
    if not family.has_head_dim:
        return
    for model_type in family.model_types:
        config = config_of(model_type, 4, 50, 64, 4, 2, 8, vocab=60_000)
        if model_type in _WHOLE_HEADS:
            with pytest.raises(DataError, match="multiple of the number of attention"):
                resolved_config(config)
        else:
            assert resolved_config(config)["hidden_size"] == 50


@quick
@given(cuts())
def test_a_feasible_target_is_taken_as_it_is(cut):
    config, target = cut
    assert complete(config, **target.to_dict()) == target
    open_ones = {name: size for name, size in target.to_dict().items() if size != getattr(ModelShape.of(config), name)}
    if "num_attention_heads" not in open_ones:
        open_ones["num_attention_heads"] = target.num_attention_heads
    if family_of(config).has_kv_heads:
        open_ones["num_key_value_heads"] = target.num_key_value_heads
    assert complete(config, **open_ones) == target
    shape = ModelShape.of(config_with(config, target))
    assert values(shape) == values(target)
    assert shape.head_dim == target.head_dim


@st.composite
def gated(draw):
    """Draw a tiny source, with one query head a group or several, tied or not, a feasible target, and a seed."""
    groups, inside, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    heads = groups * inside
    model_type, tied = draw(st.sampled_from(["llama", "qwen3"])), draw(st.booleans())
    sizes = draw(st.integers(1, 3)), heads * draw(st.integers(4, 6)), draw(st.integers(2, 12)), heads, groups
    config = resolved_config(config_of(model_type, *sizes, head_dim, vocab=7, tied=tied))
    kept_groups = draw(st.integers(1, groups))
    kept_heads = kept_groups * draw(st.integers(1, inside))
    hidden = kept_heads * draw(st.integers(-(-4 // kept_heads), sizes[1] // kept_heads))
    layers, ffn = draw(st.integers(1, sizes[0])), draw(st.integers(1, sizes[2]))
    target = TargetShape(layers, hidden, ffn, kept_heads, kept_groups, head_dim)
    assume(values(target) != sizes)
    return config, target, draw(st.integers(0, 1000))


def by_formula(config, target):
    """Return the parameters of a llama or a qwen3 (which norms each query and key too), written out."""
    d, m, tables = target.hidden_size, target.intermediate_size, 1 if config["tie_word_embeddings"] else 2
    heads, kv_heads = (target.head_dim * n for n in (target.num_attention_heads, target.num_key_value_heads))
    norms = 2 * d + (2 * target.head_dim if config["model_type"] == "qwen3" else 0)
    a_layer = 2 * d * heads + 2 * d * kv_heads + 3 * d * m + norms
    return tables * config["vocab_size"] * d + target.num_hidden_layers * a_layer + d


def under_masks(model, gates):
    """Return how many parameters of a source reach the output under hard masks: one by one, those with a gradient."""
    masks = Masks(model)
    masks.set({name: kept.to(torch.float64) for name, kept in gates.kept().items()})
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 3, 0, 2, 5, 1, 4]])
    model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    masks.remove()
    return sum(0 if grad is None else int(grad.count_nonzero()) for grad in found)


@settings(quick, max_examples=25)
@given(gated())
def test_what_counts_under_hard_masks_is_what_the_target_has(cut):
    config, target, seed = cut
    shape = replace(ModelShape.of(config), **{name: getattr(target, name) for name in SIZES})
    axes = axes_of(ModelShape.of(config), shape)
    generator = torch.Generator().manual_seed(seed)
    start = {axis.name: torch.randn(axis.rows, axis.units, generator=generator) for axis in axes}
    gates = Gates(axes, start=start)
    source = random_model(config, seed=seed).to(torch.float64)
    with torch.no_grad():
        for parameter in source.parameters():  # far from zero, for all of them to matter
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    number = by_formula(config, target)
    assert under_masks(source, gates) == number
    assert total(config_with(config, target)) == number
    kept = {name: rows.tolist() for name, rows in gates.kept().items()}
    plan = plan_of_masks(kept, ModelShape.of(config), "source", "masks")
    small, weights = target_config([config], plan), StateWeights(config, dict(source.named_parameters()))
    fresh = lazy_fresh(small, 0)
    state = {op.place.name: whole(op, [weights], fresh) for op in operations([config], small, plan)}
    child = assemble(small, state, torch.float64)
    assert sum(parameter.numel() for parameter in child.parameters()) == number
    assert values(ModelShape.of(child.config.to_dict())) == values(target)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_transformers_takes_a_config_with_other_sizes(family):
    for model_type in family.model_types:
        config = resolved_config(config_of(model_type, 6, 256, 512, 8, 4, vocab=60_000))
        for candidate in candidates(config, Budget(parameters=total(config) * 3 // 4), limit=5):
            assert values(ModelShape.of(resolved_config(config_with(config, candidate.shape)))) == values(
                candidate.shape
            )


def test_what_gates_reach():
    source = ModelShape.of(LLAMA2_7B)
    check_reach(complete(LLAMA2_7B, num_attention_heads=2, hidden_size=194, num_hidden_layers=2), source, 0.9529)
    with pytest.raises(UsageError) as caught:
        check_reach(complete(LLAMA2_7B, num_attention_heads=1, hidden_size=192, intermediate_size=518), source, 0.9529)
    for part in (
        "num_attention_heads 1 of 32 (feasible: 2 or more)",
        "hidden_size 192 of 4096 (feasible: 193 or more)",
        "intermediate_size 518 of 11008 (feasible: 519 or more)",
    ):
        assert part in str(caught.value)
    assert "num_hidden_layers" not in str(caught.value)
    check_reach(complete(LLAMA2_7B, num_attention_heads=1, hidden_size=1, num_hidden_layers=1), source, 1.0)


def test_gates_of_groups_and_inside_them_are_rows_of_their_own():
    source = ModelShape.of(LLAMA3_8B)
    check_reach(complete(LLAMA3_8B, num_attention_heads=1, num_key_value_heads=1), source, 0.9529)  # 1 of 8, 1 of 4
    with pytest.raises(UsageError, match=r"num_key_value_heads 1 of 8 \(feasible: 2 or more\)") as caught:
        check_reach(complete(LLAMA3_8B, num_attention_heads=1, num_key_value_heads=1), source, 0.8)
    assert "of 4" not in str(caught.value)


@quick
@given(cuts(), st.floats(0, 1))
def test_the_least_that_is_named_is_reached(cut, max_sparsity):
    config, target = cut
    source = ModelShape.of(config)
    check_reach(target, source, 1.0)
    inside, kept = (one.num_attention_heads // one.num_key_value_heads for one in (source, target))
    shares = [getattr(target, name) / getattr(source, name) for name in SIZES if name != "num_attention_heads"]
    reached = min(*shares, kept / inside)
    if reached > 1 - max_sparsity:
        check_reach(target, source, max_sparsity)
    elif reached < 1 - max_sparsity - 1e-6:
        with pytest.raises(UsageError, match="feasible"):
            check_reach(target, source, max_sparsity)


@quick
@given(sources(), st.floats(0, 1), st.integers(1, 30))
def test_every_candidate_is_feasible_and_within_the_budget(config, share, limit):
    least, most = feasible_range(config)
    assume(least)
    budget = Budget(parameters=round(least + share * (most - least)), bandwidth=1e9, peak_flops=1e12)
    found = candidates(config, budget, limit)
    source = ModelShape.of(config)
    assert 1 <= len(found) <= limit
    assert len({one.shape for one in found}) == len(found)
    left = [1 - one.num_parameters / budget.parameters for one in found]
    bands = [sum(each > edge for edge in (0.02, 0.05, 0.1)) for each in left]
    assert bands == sorted(bands)
    assert bands[0] < 3 or left == sorted(left)
    for one in found:
        assert complete(config, **one.shape.to_dict()) == one.shape
        check_reach(one.shape, source, 0.9529)
        assert one.num_parameters == total(config_with(config, one.shape)) <= budget.parameters
        assert one.weight_bytes == 2 * one.num_parameters
        assert one.seconds_per_token == pytest.approx(one.weight_bytes / 1e9)
        assert 2 * one.shape.num_hidden_layers >= source.num_hidden_layers
        for name in ("hidden_size", "intermediate_size"):
            size = getattr(one.shape, name)
            assert size == getattr(source, name) or size % 8 == 0


@quick
@given(sources())
def test_the_range_that_an_error_names_is_the_feasible_one(config):
    least, most = feasible_range(config)
    assume(least)
    assert most == total(config) - 1
    assert candidates(config, Budget(parameters=least))[0].num_parameters == least
    assert candidates(config, Budget(parameters=most))
    with pytest.raises(UsageError, match=f"feasible: {least:,} to {most:,}"):
        candidates(config, Budget(parameters=least - 1))


@pytest.mark.parametrize("config", [LLAMA2_7B, LLAMA3_8B, QWEN3_8B, NEOX], ids=lambda config: config["model_type"])
def test_gates_as_published_reach_the_smallest_candidate(config):
    least, _ = feasible_range(config)
    smallest = candidates(config, Budget(parameters=least))[0].shape
    check_reach(smallest, ModelShape.of(config), 0.9529)
    with pytest.raises(UsageError, match="hidden_size"):
        check_reach(smallest, ModelShape.of(config), 0.8)


def test_a_budget_of_bytes_or_seconds_is_one_of_parameters():
    wanted = candidates(LLAMA3_8B, Budget(parameters=4_000_000_000))
    in_bytes = candidates(LLAMA3_8B, Budget(memory_bytes=2_000_000_000, bytes_per_parameter=0.5))
    read = candidates(LLAMA3_8B, Budget(seconds_per_token=0.008, bandwidth=1e12, peak_flops=1e18))
    multiplied = candidates(LLAMA3_8B, Budget(seconds_per_token=0.008, bandwidth=1e18, peak_flops=1e12))
    assert [one.shape for one in wanted] == [one.shape for one in in_bytes] == [one.shape for one in read]
    assert [one.shape for one in wanted] == [one.shape for one in multiplied]
    assert wanted[0].seconds_per_token is None
    assert multiplied[0].seconds_per_token == pytest.approx(2e-12 * wanted[0].num_parameters)
    assert in_bytes[0].weight_bytes == math.ceil(wanted[0].num_parameters / 2)
    narrow = candidates(LLAMA3_8B, Budget(parameters=7_000_000_000, memory_bytes=8_000_000_000))
    assert [one.shape for one in narrow] == [one.shape for one in wanted]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(), "nothing is limited"),
        (Budget(parameters=0), "parameters 0 must be a positive number"),
        (Budget(parameters=5, bytes_per_parameter=-1.0), "bytes_per_parameter -1.0 must be"),
        (Budget(seconds_per_token=math.nan, bandwidth=1e9, peak_flops=1e9), "seconds_per_token nan must be"),
        (Budget(seconds_per_token=1.0, bandwidth=1e9), "needs bandwidth (bytes a second) and peak_flops"),
        (Budget(parameters=1000), "parameters 1,000 allows 1,000 of the source's 6,738,415,616 parameters; feasible: "),
        (Budget(memory_bytes=10**12), "to 13,476,831,230"),
        (Budget(seconds_per_token=1e-9, bandwidth=1e12, peak_flops=1e15), "seconds_per_token 1e-09 allows 500 of"),
    ],
)
def test_a_budget_that_is_none_is_refused(budget, says):
    with pytest.raises(UsageError) as caught:
        candidates(LLAMA2_7B, budget)
    assert says in str(caught.value)


@pytest.mark.parametrize("config", [LLAMA2_7B, LLAMA3_8B, QWEN3_8B, NEOX], ids=lambda config: config["model_type"])
def test_candidates_are_what_hardware_likes_and_rather_narrow_than_shallow(config):
    source = ModelShape.of(config)
    found = candidates(config, Budget(parameters=total(config) * 6 // 10))
    assert len(found) == 20
    for one in found:
        assert one.num_parameters >= 0.98 * 0.6 * total(config) - 1
        assert one.shape.hidden_size % (128 if config is not NEOX else 320) == 0
        assert one.shape.intermediate_size % 128 == 0
    best = found[0].shape
    assert best.num_hidden_layers / source.num_hidden_layers > best.hidden_size / source.hidden_size
    assert best.num_key_value_heads % 4 == 0
    ratio = source.intermediate_size / source.hidden_size
    assert best.intermediate_size / best.hidden_size == pytest.approx(ratio, rel=0.1)
    assert f"{100 * found[0].num_parameters / (total(config) * 6 // 10):.1f} % of the budget" in found[0].why


def test_steps_from_llama_2_to_its_sheared_ones():
    source = ModelShape.of(LLAMA2_7B)
    steps = {name: steps_between(source, KNOWN_SHAPES[f"sheared-llama-{name}"]) for name in ("2.7b", "1.3b", "370m")}
    assert {name: len(found) for name, found in steps.items()} == {"2.7b": 2, "1.3b": 2, "370m": 4}
    assert values(steps["1.3b"][0]) == (28, 3072, 7808, 24, 24)
    assert steps_between(source, replace(KNOWN_SHAPES["sheared-llama-2.7b"], num_hidden_layers=31), 0.4) == [
        replace(KNOWN_SHAPES["sheared-llama-2.7b"], num_hidden_layers=31)
    ]


def test_a_short_axis_loses_one_at_a_time():
    source, target = ModelShape.of(SMOL), complete(SMOL, num_key_value_heads=1, hidden_size=192)
    assert [one.num_key_value_heads for one in steps_between(source, target)] == [2, 1]
    assert [one.num_attention_heads for one in steps_between(source, target)] == [6, 3]
    one_layer = replace(target, num_hidden_layers=1)
    layers = [one.num_hidden_layers for one in steps_between(source, one_layer, 0.5)]
    assert layers[-2:] == [2, 1]
    assert len(layers) == 5


def test_heads_on_the_way_divide_what_has_to_be_divided():
    """Between 24 and 12 heads of a llama whose hidden_size stays, 16 divide it; 17 would be nearer."""
    config = config_of("llama", 8, 3072, 8192, 24, head_dim=64)
    source, target = ModelShape.of(config), complete(config, num_attention_heads=12)
    assert [one.num_attention_heads for one in steps_between(source, target)] == [16, 12]
    free = config | {"model_type": "qwen3"}
    assert [one.num_attention_heads for one in steps_between(source, target, 1 / 3, family_of(free))][1:] == [12]


def test_many_small_steps():
    source, target = ModelShape.of(LLAMA2_7B), KNOWN_SHAPES["sheared-llama-1.3b"]
    steps = steps_between(source, target, 0.001)
    assert steps[-1] == target
    assert len(steps) > 690


@pytest.mark.parametrize("most", [0, 1, -0.5, 2])
def test_a_step_takes_a_share(most):
    with pytest.raises(UsageError, match="above 0 and below 1"):
        steps_between(ModelShape.of(SMOL), complete(SMOL, num_hidden_layers=3), most)


@quick
@given(cuts(), st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]), st.booleans())
def test_steps_go_down_to_the_target_and_each_is_feasible(cut, most, by_family):
    config, target = cut
    source, family = ModelShape.of(config), family_of(config)
    steps = steps_between(source, target, most, family if by_family else None)
    assert steps[-1] == target
    before = source
    for step in steps:
        assert complete(config, **step.to_dict()) == step
        assert values(step) != values(before)
        assert all(now <= then for now, then in zip(values(step), values(before), strict=True))
        before = step
    source_tied, tied = (one.hidden_size == one.num_attention_heads * source.head_dim for one in (source, target))
    free = by_family and family.has_head_dim and config["model_type"] not in _WHOLE_HEADS
    if not free and not (tied and source_tied):
        return  # what hidden_size and heads have to share may leave no way but a jump
    before = source
    for step in steps:
        groups = step.num_key_value_heads, before.num_key_value_heads
        inside = step.num_attention_heads // groups[0], before.num_attention_heads // groups[1]
        others = [name for name in SIZES[:3] if free or name != "hidden_size"]
        pairs = [groups, inside, *((getattr(step, name), getattr(before, name)) for name in others)]
        assert all(now >= lowest(then, most) for now, then in pairs)
        least = (1 - most) * before.num_attention_heads - 1e-6
        assert step.num_attention_heads >= least or groups[0] == groups[1] - 1 or inside[0] == inside[1] - 1
        before = step


@quick
@given(cuts(), st.sampled_from([0.2, 1 / 3, 0.5]))
def test_depth_and_mlp_alone_take_the_fewest_steps(cut, most):
    config, target = cut
    source = ModelShape.of(config)
    alone = TargetShape(target.num_hidden_layers, *values(source)[1:], head_dim=source.head_dim)
    alone = replace(alone, intermediate_size=target.intermediate_size)
    assume(values(alone) != values(source))
    layers, ffn, fewest = source.num_hidden_layers, source.intermediate_size, 0
    while layers > alone.num_hidden_layers or ffn > alone.intermediate_size:
        layers, ffn, fewest = lowest(layers, most), lowest(ffn, most), fewest + 1
    assert len(steps_between(source, alone, most)) == fewest
