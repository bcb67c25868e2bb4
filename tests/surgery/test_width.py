"""Which heads and channels are chosen, and that exactly those are cut out of every layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factories import tiny_config, tiny_model
from scionlm.core.errors import DataError, UsageError
from scionlm.families import ModelShape, family_of
from scionlm.sources import open_folder
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.plan import LayerPlan, SurgeryPlan, same_for_all
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config
from scionlm.surgery.width import WidthTarget, plan_width, settle_heads


def shape(heads: int, groups: int, hidden: int = 64, layers: int = 2) -> ModelShape:
    return ModelShape(layers, hidden, 48, heads, groups, 8, 320, True)


@pytest.mark.parametrize(
    ("has", "asked", "settled"),
    [
        ((8, 4), (4, None), (4, 2)),  # the size of a group stays
        ((8, 4), (8, None), (8, 4)),
        ((8, 4), (2, None), (2, 1)),
        ((9, 3), (6, None), (6, 2)),
        ((9, 3), (3, None), (3, 1)),
        ((8, 2), (2, None), (2, 2)),  # no whole group is left: all groups stay
        ((8, 2), (6, None), (6, 2)),
        ((8, 4), (None, 2), (4, 2)),
        ((8, 1), (3, None), (3, 1)),  # MQA
        ((8, 8), (5, None), (5, 5)),  # no groups
        ((8, 4), (4, 4), (4, 4)),  # half of each group
        ((8, 4), (2, 2), (2, 2)),
        ((8, 4), (4, 1), None),  # four heads of a group of two
        ((8, 4), (3, None), None),
        ((8, 4), (6, 4), None),
        ((8, 2), (3, None), None),
        ((8, 2), (1, None), None),
        ((8, 4), (8, 3), None),
        ((9, 3), (2, None), None),
    ],
)
def test_the_two_numbers_of_heads_are_settled(has, asked, settled):
    target = WidthTarget(num_attention_heads=asked[0], num_key_value_heads=asked[1])
    if settled is None:
        with pytest.raises(UsageError, match="same number"):
            settle_heads(target, shape(*has))
    else:
        assert settle_heads(target, shape(*has)) == settled


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=200)
def test_what_is_settled_can_always_be_cut(groups, per_group, data):
    heads = groups * per_group
    target = WidthTarget(
        num_attention_heads=data.draw(st.none() | st.integers(1, heads)),
        num_key_value_heads=data.draw(st.none() | st.integers(1, groups)),
    )
    try:
        query, key = settle_heads(target, shape(heads, groups))
    except UsageError:
        assert target.num_attention_heads is not None  # a number of groups alone is always possible
        return
    assert target.num_attention_heads in (None, query)
    assert target.num_key_value_heads in (None, key)
    assert query % key == 0
    assert 1 <= query // key <= per_group
    assert key <= groups


def chosen(heads, groups, sizes, scores):
    found = plan_width(
        plan_depth(2, 2), family_of({"model_type": "llama"}), shape(heads, groups), WidthTarget(**sizes), scores, "test"
    )
    return found, found.layers


def test_the_best_groups_stay_and_the_best_heads_of_each():
    scores = {"heads": np.array([[5, 1, 0, 0, 2, 9, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]], dtype=float)}
    _, layers = chosen(8, 4, {"num_attention_heads": 4}, scores)
    assert [(layer.heads, layer.kv_heads) for layer in layers] == [((4, 5, 6, 7), (2, 3)), ((4, 5, 6, 7), (2, 3))]
    _, layers = chosen(8, 4, {"num_attention_heads": 4, "num_key_value_heads": 4}, scores)
    assert [(layer.heads, layer.kv_heads) for layer in layers] == [((0, 2, 5, 7), None), ((1, 3, 5, 7), None)]
    _, layers = chosen(8, 4, {"num_attention_heads": 2, "num_key_value_heads": 2}, scores)
    assert layers[0].heads == (5, 7)
    assert layers[0].kv_heads == (2, 3)


def test_ties_go_to_the_lower_number_and_no_scores_mean_the_first():
    flat = {"heads": np.ones((2, 8)), "ffn": np.ones((2, 48)), "hidden": np.ones(64)}
    sizes = {"num_attention_heads": 4, "intermediate_size": 10, "hidden_size": 20}
    with_ties, _ = chosen(8, 4, sizes, flat)
    without, layers = chosen(8, 4, sizes, None)
    assert with_ties == without
    assert layers[0] == LayerPlan(0, heads=(0, 1, 2, 3), kv_heads=(0, 1), ffn=tuple(range(10)))
    assert without.hidden == tuple(range(20))


def test_scores_of_the_source_layer_choose_also_when_layers_move():
    scores = {"ffn": np.stack([np.arange(48.0) * (1 if row % 2 else -1) for row in range(5)])}
    plan = plan_depth(5, keep=[3, 0, 3], repeat=True)
    source = shape(8, 4, layers=5)
    found = plan_width(
        plan, family_of({"model_type": "llama"}), source, WidthTarget(intermediate_size=3), scores, "test"
    )
    assert [layer.ffn for layer in found.layers] == [(45, 46, 47), (0, 1, 2), (45, 46, 47)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 48), st.integers(1, 64), st.sampled_from([(8, 4), (8, 2), (4, 1)]))
@settings(max_examples=100)
def test_what_stays_is_at_least_as_good_as_what_goes(seed, ffn, hidden, has):
    rng = np.random.default_rng(seed)
    scores = {"heads": rng.random((2, has[0])), "ffn": rng.integers(0, 5, (2, 48)) * 1.0, "hidden": rng.random(64)}
    heads = int(rng.integers(1, has[0] // has[1] + 1)) * has[1]
    sizes = {"intermediate_size": ffn, "hidden_size": hidden, "num_attention_heads": heads}
    sizes["num_key_value_heads"] = has[1]
    plan, layers = chosen(*has, sizes, scores)

    def best(values, kept, number):
        kept = range(number) if kept is None else kept
        assert list(kept) == sorted(set(kept))
        gone = [values[i] for i in range(len(values)) if i not in kept]
        assert not gone or min(values[i] for i in kept) >= max(gone)

    best(scores["hidden"], plan.hidden, 64)
    per_group = has[0] // has[1]
    for row, layer in enumerate(layers):
        best(scores["ffn"][row], layer.ffn, 48)
        kept = range(has[0]) if layer.heads is None else layer.heads
        for group in range(has[1]):
            inside = [h - group * per_group for h in kept if h // per_group == group]
            assert len(inside) == heads // has[1]
            best(scores["heads"][row][group * per_group :][:per_group], inside, per_group)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 65}, "hidden_size: 65"),
        ({"hidden_size": 0}, "hidden_size: 0"),
        ({"intermediate_size": -1}, "intermediate_size: -1"),
        ({"intermediate_size": 49}, "intermediate_size: 49"),
        ({"num_attention_heads": 9}, "num_attention_heads: 9"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
    ],
)
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(UsageError, match=words):
        chosen(8, 4, sizes, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["hidden", "heads", "ffn"])
def test_scores_that_are_no_numbers_are_refused(name, value):
    scores = {"hidden": np.ones(64), "heads": np.ones((2, 8)), "ffn": np.ones((2, 48))}
    scores[name].reshape(-1)[3] = value
    with pytest.raises(DataError, match=name):
        chosen(8, 4, {"hidden_size": 32}, scores)


@pytest.mark.parametrize(
    "scores",
    [
        {"hidden": np.ones(63)},
        {"hidden": np.ones((1, 64))},
        {"heads": np.ones((3, 8))},
        {"heads": np.ones((2, 4))},
        {"ffn": np.ones(48)},
        {"ffn": np.ones((48, 2))},
    ],
)
def test_scores_of_other_shapes_are_refused(scores):
    with pytest.raises(DataError, match="shape"):
        chosen(8, 4, {"hidden_size": 32, "intermediate_size": 7}, scores)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "stablelm"])
@pytest.mark.parametrize("sizes", [{"hidden_size": 16}, {"num_attention_heads": 2}, {"hidden_size": 20}])
def test_without_a_head_dim_setting_hidden_and_heads_go_together(model_type, sizes):
    config = tiny_config(model_type).to_dict()
    source = ModelShape.of(config)
    plan = plan_width(plan_depth(5, 5), family_of(config), source, WidthTarget(**sizes), None, "first")
    with pytest.raises(UsageError, match="head_dim"):
        target_config([config], plan)
    both = WidthTarget(hidden_size=16, num_attention_heads=2)
    found = ModelShape.of(
        target_config([config], plan_width(plan_depth(5, 5), family_of(config), source, both, None, "first"))
    )
    assert (found.hidden_size, found.num_attention_heads, found.head_dim) == (16, 2, 8)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt"])
def test_families_without_groups_have_no_number_of_them(model_type):
    config = tiny_config(model_type).to_dict()
    with pytest.raises(UsageError, match="no grouped heads"):
        plan_width(
            plan_depth(5, 5),
            family_of(config),
            ModelShape.of(config),
            WidthTarget(num_key_value_heads=2),
            None,
            "first",
        )


def test_layers_of_different_widths_are_refused():
    plan = plan_depth(5, 2)
    with pytest.raises(UsageError, match="same number"):
        same_for_all((replace(plan.layers[0], ffn=(0, 1)), plan.layers[1]), lambda layer: layer.ffn)
    config = tiny_config("llama").to_dict()
    uneven = SurgeryPlan(("a",), (5,), (LayerPlan(0, ffn=(0, 1)), LayerPlan(1, ffn=(0, 1, 2))))
    with pytest.raises(UsageError, match="same number"):
        target_config([config], uneven)


def test_nothing_asked_for_changes_nothing():
    plan = plan_depth(2, 2)
    family, source = family_of({"model_type": "llama"}), shape(8, 4)
    assert plan_width(plan, family, source, WidthTarget(), None, "first") is plan
    same = WidthTarget(64, 48, 8, 4)
    assert not plan_width(plan, family, source, same, None, "first").cuts_width


# --- what is cut: rows of each layout, by hand ---


def cut(tmp_path, model_type, sizes, scores=None, **changes):
    """Return (source's, target's) tensors."""
    tiny_model(model_type, **changes).save_pretrained(tmp_path / "source")
    source = open_folder(tmp_path / "source")
    family, found = family_of(source.config), ModelShape.of(source.config)
    plan = plan_width(plan_depth(5, keep=[1, 4]), family, found, WidthTarget(**sizes), scores, "test")
    (tmp_path / "out").mkdir()
    with open_surgery([source], plan) as surgery:
        surgery.write(tmp_path / "out")
    return load_file(tmp_path / "source" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")


def require(found, wanted):
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_half_width_of_gpt2_is_the_first_half_of_everything(tmp_path):
    """Inheritune's half-width baseline: the first half of heads, of the MLP and of the embeddings."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    source, found = cut(tmp_path, "gpt2", sizes)
    old, new = "transformer.h.4.", "transformer.h.1."
    query, key, value = source[f"{old}attn.c_attn.weight"][:16].split(32, dim=1)
    bias = [part[:16] for part in source[f"{old}attn.c_attn.bias"].split(32)]
    require(
        found,
        {
            "transformer.wte.weight": source["transformer.wte.weight"][:, :16],
            "transformer.wpe.weight": source["transformer.wpe.weight"][:, :16],
            "transformer.ln_f.bias": source["transformer.ln_f.bias"][:16],
            f"{new}attn.c_attn.weight": torch.cat([query[:, :16], key[:, :16], value[:, :16]], dim=1),
            f"{new}attn.c_attn.bias": torch.cat(bias),
            f"{new}attn.c_proj.weight": source[f"{old}attn.c_proj.weight"][:16, :16],
            f"{new}attn.c_proj.bias": source[f"{old}attn.c_proj.bias"][:16],
            f"{new}mlp.c_fc.weight": source[f"{old}mlp.c_fc.weight"][:16, :24],
            f"{new}mlp.c_fc.bias": source[f"{old}mlp.c_fc.bias"][:24],
            f"{new}mlp.c_proj.weight": source[f"{old}mlp.c_proj.weight"][:24, :16],
        },
    )


HEADS = {"heads": np.tile([1.0, 4.0, 2.0, 3.0], (5, 1))}  # heads 1 and 3 are the best, one of each group of two


def test_fused_query_key_value_of_phi3(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 10}
    source, found = cut(tmp_path, "phi3", sizes, HEADS)
    source = {name: t[..., :16] if "o_proj" not in name else t[:16] for name, t in source.items()}
    qkv = source["model.layers.1.self_attn.qkv_proj.weight"]  # 4 query, 2 key, 2 value heads of 8
    kept = [*range(8, 16), *range(24, 32), *range(32, 64)]
    gate_up = source["model.layers.1.mlp.gate_up_proj.weight"]
    require(
        found,
        {
            "model.layers.0.self_attn.qkv_proj.weight": qkv[kept],
            "model.layers.0.self_attn.o_proj.weight": source["model.layers.1.self_attn.o_proj.weight"][:, kept[:16]],
            "model.layers.0.mlp.gate_up_proj.weight": torch.cat([gate_up[:10], gate_up[48:58]]),
        },
    )
    one = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # the second group: heads 2 and 3
    _, found = cut(tmp_path / "one", "phi3", one, {"heads": np.tile([1.0, 1.0, 2.0, 2.0], (5, 1))})
    kept = [*range(16, 32), *range(40, 48), *range(56, 64)]
    require(found, {"model.layers.0.self_attn.qkv_proj.weight": qkv[kept]})


def test_interleaved_query_key_value_of_gpt_neox(tmp_path):
    sizes = {"num_attention_heads": 2, "hidden_size": 16}
    source, found = cut(tmp_path, "gpt_neox", sizes, HEADS)
    name = "gpt_neox.layers.{}.attention.{}"
    kept = [*range(24, 48), *range(72, 96)]  # each head's query, key and value stand together
    require(
        found,
        {
            name.format(1, "query_key_value.weight"): source[name.format(4, "query_key_value.weight")][kept][:, :16],
            name.format(1, "query_key_value.bias"): source[name.format(4, "query_key_value.bias")][kept],
            name.format(1, "dense.weight"): source[name.format(4, "dense.weight")][:16][
                :, [*range(8, 16), *range(24, 32)]
            ],
            "embed_out.weight": source["embed_out.weight"][:, :16],
        },
    )


def test_norms_of_single_heads_of_stablelm(tmp_path):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    source, found = cut(tmp_path, "stablelm", sizes, HEADS, qk_layernorm=True)
    name = "model.layers.{}.self_attn.{}_layernorm.norms.{}.weight"
    require(found, {name.format(0, "q", i): source[name.format(1, "q", h)] for i, h in enumerate((1, 3))})
    require(found, {name.format(0, "k", i): source[name.format(1, "k", i)] for i in (0, 1)})
    assert name.format(0, "q", 2) not in found
    assert not torch.equal(source[name.format(1, "q", 1)], source[name.format(1, "q", 0)])


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_scaled_embeddings_of_gemma_keep_their_size(tmp_path, model_type, tied):
    source, found = cut(tmp_path, model_type, {"hidden_size": 12}, hidden_size=48, tie_word_embeddings=tied)
    embedding = source["model.embed_tokens.weight"][:, :12].double() * 2  # the root of 48 / 12
    assert torch.equal(found["model.embed_tokens.weight"], embedding.float())
    gain = 1 + source["model.norm.weight"][:12].double()
    assert torch.allclose(1 + found["model.norm.weight"].double(), gain / 2 if tied else gain, atol=1e-6)
    if not tied:
        assert torch.equal(found["lm_head.weight"], source["lm_head.weight"][:, :12])
