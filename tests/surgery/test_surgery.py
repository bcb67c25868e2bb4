"""Depth surgery: invariants I1 to I4, I6, I8 to I10 of the Inheritune study, with negative controls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import tiny_model
from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.families import count_parameters, family_of
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.apply import inherit_model, random_model, target_config
from scionlm.surgery.depth import STRATEGIES, parse_keep, plan_depth
from scionlm.surgery.export import save_model
from scionlm.surgery.verify import Proof, identity_logits, verify_export, verify_inheritance

SHAPES = [
    {"family": "llama"},
    {"family": "llama", "tie_word_embeddings": False},
    {"family": "llama", "attention_bias": True, "mlp_bias": True},
    {"family": "mistral", "tie_word_embeddings": False, "sliding_window": 8},
]
IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def source(request):
    return tiny_model(**request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request, source):
    source.set_attn_implementation(request.param)
    return request.param


@torch.no_grad()
def test_inheriting_all_layers_gives_the_source_bitwise(source, attention):
    target = inherit_model(source, plan_depth(5, 5))
    assert target.config._attn_implementation == attention
    assert torch.equal(source(IDS).logits, target(IDS).logits)
    mine, theirs = source.state_dict(), target.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_first_n_layers_give_head_of_norm_of_hidden_state_n_bitwise(source, attention, layers):
    target = inherit_model(source, plan_depth(5, layers))
    hidden = source(IDS, output_hidden_states=True).hidden_states[layers]
    expected = source.lm_head(source.model.norm(hidden))
    assert torch.equal(expected, target(IDS).logits)
    # Negative control: one weight a little off must show.
    target.model.layers[layers - 1].mlp.down_proj.weight[0, 0] += 0.01
    assert not torch.equal(expected, target(IDS).logits)


@torch.no_grad()
def test_a_wrong_layer_is_far_from_the_oracle(source):
    right, wrong = plan_depth(5, keep=[0, 2, 4]), plan_depth(5, keep=[0, 3, 4])
    expected = identity_logits(source, right, IDS)
    assert torch.equal(expected, inherit_model(source, right)(IDS).logits)
    assert (expected - inherit_model(source, wrong)(IDS).logits).abs().max() > 1e-3
    with pytest.raises(ScionError, match="bitwise"):
        verify_inheritance(source, inherit_model(source, wrong), right)


@pytest.mark.parametrize("spoil", ["norm", "embed"])
def test_the_proof_sees_a_fresh_norm_or_embedding(source, spoil):
    """What the published Inheritune code leaves at random (its faults A1 and A2)."""
    plan = plan_depth(5, 3)
    target = inherit_model(source, plan)
    with torch.no_grad():
        (target.model.norm if spoil == "norm" else target.model.embed_tokens).weight.mul_(1.5).add_(0.1)
    with pytest.raises(ScionError, match="failed its own proof"):
        verify_inheritance(source, target, plan)


def test_the_source_is_untouched_and_shares_nothing(source):
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    config = source.config.to_dict()
    target = inherit_model(source, plan_depth(5, 2))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.config.num_hidden_layers = 99
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    assert source.config.to_dict() == config


def test_the_proof_sees_shared_storage(source):
    plan = plan_depth(5, 5)
    with pytest.raises(ScionError, match="shared"):
        verify_inheritance(source, source, plan)


def test_ties_stay_ties_and_untied_stays_untied(source):
    target = inherit_model(source, plan_depth(5, 2))
    tied = target.lm_head.weight.data_ptr() == target.model.embed_tokens.weight.data_ptr()
    assert tied == source.config.tie_word_embeddings
    assert torch.equal(target.lm_head.weight, source.lm_head.weight)


@torch.no_grad()
def test_cached_generation_equals_uncached_for_layers_out_of_order(source):
    proof = verify_inheritance(
        source, inherit_model(source, plan_depth(5, keep=[4, 0, 2])), plan_depth(5, keep=[4, 0, 2])
    )
    assert "cached greedy generation equals uncached" in proof.checks


def test_cached_generation_with_a_stale_layer_index_is_caught(source):
    plan = plan_depth(5, 3)
    target = inherit_model(source, plan)
    target.model.layers[1].self_attn.layer_idx = 0  # what naive slicing leaves behind
    with pytest.raises(ScionError, match="cached"):
        verify_inheritance(source, target, plan)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_parameter_count_equals_the_formula(source, layers):
    target = inherit_model(source, plan_depth(5, layers))
    config = target.config.to_dict()
    assert sum(p.numel() for p in target.parameters()) == count_parameters(family_of(config), config)["total"]


def test_cuts_compose(source):
    once = inherit_model(source, plan_depth(5, 2)).state_dict()
    twice = inherit_model(inherit_model(source, plan_depth(5, 4)), plan_depth(4, 2)).state_dict()
    listed = inherit_model(source, plan_depth(5, keep=[0, 1])).state_dict()
    assert all(torch.equal(once[name], twice[name]) and torch.equal(once[name], listed[name]) for name in once)


def test_save_and_reload_are_bitwise_equal(source, tmp_path):
    plan, folder = plan_depth(5, keep=[0, 1, 4]), tmp_path / "source"
    source.save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")
    target = inherit_model(source, plan)
    out = tmp_path / "out"
    out.mkdir()
    save_model(target, out, open_folder(folder), "card", {"plan": plan.to_dict()})
    verify_export(target, out, Proof())
    again = load_hf_model(open_folder(out))
    assert torch.equal(target(IDS).logits, again(IDS).logits)
    assert (out / "LICENSE").read_text() == "terms"
    with torch.no_grad():
        target.model.norm.weight[0] += 1e-6
    with pytest.raises(ScionError, match="reloaded"):
        verify_export(target, out, Proof())


def test_saving_in_bfloat16_keeps_the_model_in_float32(source, tmp_path):
    (tmp_path / "s").mkdir()
    source.save_pretrained(tmp_path / "s")
    (tmp_path / "out").mkdir()
    before = next(source.parameters()).clone()
    save_model(source, tmp_path / "out", open_folder(tmp_path / "s"), "", {}, torch.bfloat16)
    verify_export(source, tmp_path / "out", Proof(), torch.bfloat16)
    assert torch.equal(before, next(source.parameters()))
    assert load_hf_model(open_folder(tmp_path / "out")).dtype == torch.bfloat16


def test_the_control_has_the_same_shape_and_none_of_the_weights(source):
    plan = plan_depth(5, 3)
    child, control = inherit_model(source, plan), random_model(source.config.to_dict(), plan, seed=3)
    assert {n: t.shape for n, t in child.state_dict().items()} == {n: t.shape for n, t in control.state_dict().items()}
    assert not torch.equal(child.model.embed_tokens.weight, control.model.embed_tokens.weight)
    again = random_model(source.config.to_dict(), plan, seed=3)
    assert torch.equal(control.model.embed_tokens.weight, again.model.embed_tokens.weight)
    other = random_model(source.config.to_dict(), plan, seed=4)
    assert not torch.equal(control.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_making_a_control_leaves_the_random_state_alone():
    config = tiny_model().config.to_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random_model(config, plan_depth(5, 1), seed=3)
    assert torch.equal(expected, torch.rand(3))


def test_an_unknown_per_layer_list_is_an_error_that_names_it():
    config = tiny_model().config.to_dict() | {"no_rope_layers": [0, 1, 0, 1, 0]}
    with pytest.raises(DataError, match="no_rope_layers"):
        target_config(config, plan_depth(5, 2))


@pytest.mark.parametrize("layers", [0, -1, 6, 31])
def test_a_number_of_layers_out_of_range_is_refused(layers):
    with pytest.raises(UsageError, match="5 layers"):
        plan_depth(5, layers)


@pytest.mark.parametrize("keep", [[5], [-1], [0, 0], []])
def test_impossible_lists_are_refused(keep):
    with pytest.raises(UsageError, match="keep"):
        plan_depth(5, keep=keep)


@pytest.mark.parametrize("keep", ["", "a", "3-1", "1,,2", "0-", "-1", "1;2"])
def test_keep_that_is_not_a_list_of_layers_is_refused(keep):
    with pytest.raises(UsageError):
        parse_keep(keep)


def test_keep_reads_ranges_and_single_layers_in_order():
    assert parse_keep("0-3, 12,7-8") == [0, 1, 2, 3, 12, 7, 8]


def test_strategies_need_a_number_and_a_known_name():
    with pytest.raises(UsageError, match="first_last"):
        plan_depth(30, 8, strategy="first_lats")
    with pytest.raises(UsageError, match="leave strategy out"):
        plan_depth(30, keep=[1], strategy="first")
    with pytest.raises(UsageError):
        plan_depth(30)


def test_first_last_of_fifteen_is_twelve_and_three():
    assert plan_depth(30, 15, strategy="first_last").keep == (*range(12), 27, 28, 29)


@given(st.integers(1, 80), st.data(), st.sampled_from(sorted(STRATEGIES)))
@settings(max_examples=300, deadline=None)
def test_every_strategy_keeps_that_many_different_layers_in_order(total, data, strategy):
    layers = data.draw(st.integers(1, total))
    keep = plan_depth(total, layers, strategy=strategy).keep
    assert len(keep) == layers
    assert list(keep) == sorted(set(keep))
    assert keep[0] == 0
    if layers > 1 and strategy != "first":
        assert keep[-1] == total - 1
