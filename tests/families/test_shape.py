"""Sizes, parameters, FLOPs and the check of tensors against a configuration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, MistralConfig

from factories import MODEL_IDS, MODELS, tiny_config, tiny_model
from scionlm.core.errors import DataError
from scionlm.families import ModelShape, count_parameters, family_of, flops_per_token
from scionlm.families.registry import FAMILIES
from scionlm.families.shape import check_tensors, expected_tensors
from scionlm.families.spec import PARTS

quick = settings(max_examples=60)

TINYLLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
VARIANTS = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True, "tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"num_key_value_heads": 1},
]


def tensors(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_formula_counts_what_a_real_model_has(family, changes):
    model = tiny_model(family, **changes)
    config = model.config.to_dict()
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"] == sum(number for part, number in counts.items() if part != "total")


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_names_and_shapes_are_those_of_a_real_model(family, changes):
    model = tiny_model(family, **changes)
    config = model.config.to_dict()
    assert {place.name: place.shape for place in expected_tensors(config)} == tensors(model)


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_every_family_names_and_counts_the_tensors_of_a_real_model(model_type, changes):
    model = tiny_model(model_type, **changes)
    config = model.config.to_dict()
    assert {place.name: place.shape for place in expected_tensors(config)} == tensors(model)
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert set(counts) - {"total"} <= set(PARTS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_what_config_json_leaves_out_is_what_transformers_fills_in(family):
    """A key that a file leaves out has a default, which differs from family to family."""
    for model_type in family.model_types:
        needed = {family.key(k): v for k, v in TINYLLAMA.items() if k not in ("model_type", "num_key_value_heads")}
        del needed["tie_word_embeddings"]
        bare = {"model_type": model_type} | needed
        full = AutoConfig.for_model(**bare).to_dict()
        for key, value in family.defaults.items():
            assert full[family.key(key)] == value, key
        own = {"num_key_value_heads"} if not family.has_kv_heads else set()
        bare_shape, full_shape = ModelShape.of(bare).to_dict(), ModelShape.of(full).to_dict()
        assert {k: v for k, v in bare_shape.items() if k not in own} == {
            k: v for k, v in full_shape.items() if k not in own
        }


def test_every_tensor_has_one_role_and_parts_cover_the_model():
    for family in FAMILIES:
        names = [spec.name for spec in (*family.outside, *family.layer)]
        assert len(set(names)) == len(names)
        assert {spec.part for spec in (*family.outside, *family.layer)} <= set(PARTS)


def test_parts_are_counted_where_they_belong():
    config = tiny_config(tie_word_embeddings=False).to_dict()
    assert count_parameters(config) == {
        "embedding": 320 * 32,
        "final_norm": 32,
        "attention_norm": 5 * 32,
        "mlp_norm": 5 * 32,
        "head": 320 * 32,
        "attention": 5 * (2 * 32 * 32 + 2 * 16 * 32),
        "mlp": 5 * 3 * 32 * 48,
        "total": 59232,
    }


def test_a_tied_head_counts_once_as_embedding():
    config = tiny_config().to_dict()
    counts = count_parameters(config)
    assert "head" not in counts
    assert counts["embedding"] == 320 * 32


def test_tinyllama_has_its_published_number_of_parameters():
    assert count_parameters(TINYLLAMA)["total"] == 1_100_048_384


def test_a_layer_of_tinyllama_has_as_many_as_it_should():
    shorter = TINYLLAMA | {"num_hidden_layers": TINYLLAMA["num_hidden_layers"] - 1}
    counts, fewer = (count_parameters(one) for one in (TINYLLAMA, shorter))
    assert counts["total"] - fewer["total"] == 44_044_288
    assert counts["total"] - counts["embedding"] - counts["head"] == 968_976_384


@pytest.mark.parametrize(
    ("width", "layers", "millions"),
    [(768, 12, 123.6), (768, 4, 67.0), (1024, 24, 353.6), (1024, 16, 252.9), (1280, 36, 772.3), (1600, 48, 1555.2)],
)
def test_gpt2_without_biases_and_positions_has_what_the_papers_logs_print(width, layers, millions):
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "vocab_size": 50304, "n_positions": 1024}
    config |= {"n_head": width // 64}
    tensors = [one for one in expected_tensors(config) if not one.name.endswith((".bias", "wpe.weight"))]
    count = sum(math.prod(one.shape) for one in tensors if one.name != "lm_head.weight")
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    layer = sum(math.prod(one.shape) for one in tensors if one.layer == 0)
    assert layer == 12 * width**2 + 2 * width


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_another_size_has_another_number_of_parameters(key):
    """The control for the count above."""
    other = TINYLLAMA | {key: TINYLLAMA[key] * 2}
    assert count_parameters(other)["total"] != 1_100_048_384


def test_the_shape_is_read_by_hugging_face_names():
    shape = ModelShape.of(TINYLLAMA)
    assert shape.to_dict() == {key: value for key, value in TINYLLAMA.items() if key != "model_type"} | {"head_dim": 64}


def test_absent_and_null_sizes_have_the_defaults_of_transformers():
    config = {
        key: value for key, value in TINYLLAMA.items() if key not in ("num_key_value_heads", "tie_word_embeddings")
    }
    assert ModelShape.of(config).num_key_value_heads == 32
    assert ModelShape.of(config | {"num_key_value_heads": None, "head_dim": None}).head_dim == 64
    assert ModelShape.of(config).tie_word_embeddings is False


def test_a_mistral_without_key_value_heads_has_the_default_of_transformers():
    config = {key: value for key, value in TINYLLAMA.items() if key != "num_key_value_heads"} | {
        "model_type": "mistral"
    }
    expected = MistralConfig(**{key: value for key, value in config.items() if key != "model_type"}).num_key_value_heads
    assert ModelShape.of(config).num_key_value_heads == expected


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, 2**40, [4]])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(key, value):
    with pytest.raises(DataError, match=rf"{key} is .*must be a positive integer") as caught:
        ModelShape.of(TINYLLAMA | {key: value})
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_a_size_that_is_missing_is_refused_by_name(key):
    with pytest.raises(DataError, match=rf"^m/config\.json: {key} is missing$"):
        ModelShape.of({name: value for name, value in TINYLLAMA.items() if name != key}, "m/config.json")


def test_heads_must_divide():
    with pytest.raises(DataError, match="hidden_size 2048 is not divisible by num_attention_heads 28"):
        ModelShape.of(TINYLLAMA | {"num_attention_heads": 28})
    with pytest.raises(DataError, match="num_attention_heads 32 is not a multiple of num_key_value_heads 5"):
        ModelShape.of(TINYLLAMA | {"num_key_value_heads": 5})
    with pytest.raises(DataError, match="not a multiple"):
        ModelShape.of(TINYLLAMA | {"num_key_value_heads": 64})
    assert ModelShape.of(TINYLLAMA | {"num_attention_heads": 28, "head_dim": 64}).head_dim == 64


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(DataError, match=r"model_type 'bert' .*llama, mistral.*CONTRIBUTING"):
        family_of({"model_type": "bert"})
    with pytest.raises(DataError, match="text_config: 'gemma3_text'"):
        family_of({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    with pytest.raises(DataError, match="word_embed_proj_dim = 512 is not supported"):
        family_of({"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512})
    with pytest.raises(DataError, match="model_type None"):
        family_of({})


@pytest.fixture(scope="module")
def llama():
    model = tiny_model()
    return model.config.to_dict(), tensors(model)


def check(config, found):
    check_tensors(config, found, "FOLDER")


def test_a_whole_model_passes_with_or_without_a_copy_of_the_tied_head(llama):
    config, found = llama
    check(config, found)
    check(config, found | {"lm_head.weight": (320, 32)})


def test_an_unknown_tensor_is_named(llama):
    config, found = llama
    for name in ("model.layers.5.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "model.surprise"):
        with pytest.raises(DataError, match=rf"FOLDER: tensor '{name}' is not one that model_type 'llama' has"):
            check(config, found | {name: (48, 32)})


def test_an_untied_model_needs_its_head(llama):
    config, found = llama
    with pytest.raises(DataError, match=r"tensor 'lm_head\.weight' is missing"):
        check(config | {"tie_word_embeddings": False}, found)


def test_each_missing_tensor_is_named(llama):
    config, found = llama
    for name in found:
        with pytest.raises(DataError, match=rf"tensor '{name}' is missing \(1 in all\)"):
            check(config, {other: shape for other, shape in found.items() if other != name})


def test_each_tensor_of_another_shape_is_named_with_both_shapes(llama):
    config, found = llama
    for name, shape in found.items():
        other = (shape[0] + 1, *shape[1:])
        with pytest.raises(DataError, match=rf"tensor '{name}' has shape \[{other[0]}.*asks for \[{shape[0]}"):
            check(config, found | {name: other})


def test_a_copy_of_the_tied_head_of_another_shape_is_refused(llama):
    config, found = llama
    with pytest.raises(DataError, match="lm_head"):
        check(config, found | {"lm_head.weight": (7, 7)})


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("seq_len", [33])
def test_the_flops_are_those_that_torch_counts(model_type, changes, seq_len):
    """Exactly: what the formula leaves out (norms, rotation, softmax) is no matrix product to torch either."""
    model = tiny_model(model_type, **changes)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 320, (2, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    config = model.config.to_dict()
    expected = flops_per_token(config, seq_len) * ids.numel()
    assert counter.get_total_flops() == expected


@quick
@given(st.integers(1, 40), st.integers(1, 4096))
def test_flops_grow_in_a_straight_line_with_layers_and_with_the_context(layers, seq_len):
    def flops(layers: int, seq_len: int) -> int:
        config = TINYLLAMA | {"num_hidden_layers": layers}
        return flops_per_token(config, seq_len)

    assert flops(layers + 2, seq_len) - flops(layers + 1, seq_len) == flops(layers + 1, seq_len) - flops(
        layers, seq_len
    )
    assert flops(layers, seq_len + 1) - flops(layers, seq_len) == 12 * layers * 2048


def test_tying_changes_the_parameters_but_not_the_flops():
    tied = TINYLLAMA | {"tie_word_embeddings": True}
    assert flops_per_token(tied, 128) == flops_per_token(TINYLLAMA, 128)
    assert count_parameters(tied)["total"] == count_parameters(TINYLLAMA)["total"] - 32000 * 2048
