"""Which models are known, which are refused and why; names of tensors in files that others wrote."""

import json
import re
from collections import Counter

import pytest
from transformers import AutoConfig

from factories import NUM_LAYERS, tiny_config, tiny_model
from scionlm.core.errors import DataError
from scionlm.families import family_of
from scionlm.families.registry import FAMILIES
from scionlm.families.shape import ModelShape, axis_size, canonical_names, expected_tensors
from scionlm.families.spec import PARTS

PROMISED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "starcoder2",
    "granite",
    "cohere2",
    "olmo3",
    "stablelm",
]
TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


def test_all_seventeen_families_are_there_each_once():
    assert sorted(TYPES) == sorted(PROMISED)
    assert set(Counter(TYPES).values()) == {1}


@pytest.mark.parametrize("model_type", ["mixtral", "bert", "t5", "mamba", "falcon", "", "LLAMA", None, 3])
def test_an_unknown_family_is_refused_and_how_to_add_one_is_said(model_type):
    with pytest.raises(DataError, match=r"not a family that Scion knows.*CONTRIBUTING\.md"):
        family_of({"model_type": model_type})
    with pytest.raises(DataError, match="not a family"):
        family_of({})


def test_contributing_says_how_to_add_a_family(request):
    text = (request.config.rootpath / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "families/" in text
    assert "family" in text


@pytest.mark.parametrize("outer", ["gemma3", "llava", "mistral3", "llama4"])
def test_a_model_of_pictures_and_text_is_refused_and_its_inner_model_named(outer):
    with pytest.raises(DataError, match=rf"'{outer}' holds a language model inside.*'gemma3_text'"):
        family_of({"model_type": outer, "text_config": {"model_type": "gemma3_text"}})


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gpt2", "add_cross_attention", True),
        ("opt", "do_layer_norm_before", False),
        ("opt", "_remove_final_layer_norm", True),
        ("opt", "layer_norm_elementwise_affine", False),
        ("opt", "word_embed_proj_dim", 16),
    ],
)
def test_a_setting_that_a_family_leaves_out_is_refused_by_name(model_type, key, value):
    config = tiny_config(model_type).to_dict()
    assert family_of(config).model_types == (model_type,)
    with pytest.raises(DataError, match=rf"{key} = {re.escape(repr(value))} is not supported"):
        family_of(config | {key: value})


@pytest.mark.parametrize("model_type", TYPES)
def test_each_per_layer_list_is_one_that_transformers_has_and_none_is_missing(model_type):
    """A list as long as the model has layers, that the family does not name, would be left uncut."""
    family = family_of({"model_type": model_type})
    sizes = {"num_hidden_layers": 7, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    full = AutoConfig.for_model(model_type, **{family.key(k): v for k, v in sizes.items()}).to_dict()
    lists = {key for key, value in full.items() if isinstance(value, list) and len(value) == 7}
    assert lists == set(family.per_layer_config)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_axis_is_one_that_has_a_size_and_every_part_is_a_part(model_type):
    family = family_of({"model_type": model_type})
    config = tiny_config(model_type).to_dict()
    shape = ModelShape.of(config)
    for spec in (*family.outside, *family.layer):
        assert spec.part in PARTS
        assert all(axis_size(axis, family, config, shape) > 0 for axis in spec.axes)
        assert spec.requires is None or spec.requires.lstrip("!") in family.defaults
        assert ("{head}" in spec.name) == (spec.repeat is not None)
    assert [spec.role for spec in family.outside].count("embedding") == 1
    assert [spec.role for spec in family.outside].count("head") == 1


@pytest.mark.parametrize("model_type", TYPES)
def test_the_hook_points_are_modules_of_a_real_model(model_type):
    family = family_of({"model_type": model_type})
    model = tiny_model(model_type)
    layers = model.get_submodule(family.layers)
    assert len(layers) == NUM_LAYERS
    for place in expected_tensors(model.config.to_dict()):
        owner = layers[place.layer] if place.layer is not None else model
        module = place.spec.module.replace("{head}", str(place.head))
        assert owner.get_submodule(module).get_parameter(place.spec.name.rpartition(".")[2]).shape == place.shape


# Names.


@pytest.mark.parametrize("model_type", TYPES)
def test_full_bare_and_stored_names_are_the_same_tensors(model_type, tmp_path):
    family = family_of({"model_type": model_type})
    config = tiny_config(model_type, tie_word_embeddings=False).to_dict()
    full = [place.name for place in expected_tensors(config)]
    head = family.one("head").name
    assert canonical_names(family, full) == {name: name for name in full}
    bare = {name: name if name == head else name.removeprefix(family.prefix) for name in full}
    assert all(bare[name] != name for name in full if name != head)
    assert canonical_names(family, list(bare.values())) == bare
    tiny_model(model_type, tie_word_embeddings=False).save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    written = set(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])) - {"__metadata__"}
    assert set(canonical_names(family, list(written))) == set(full)  # the names that transformers itself writes


@pytest.mark.parametrize(
    ("model_type", "constants"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ],
        ),
    ],
)
def test_constants_in_old_files_are_left_out_and_nothing_else_is(model_type, constants):
    family = family_of({"model_type": model_type})
    full = [place.name for place in expected_tensors(tiny_config(model_type).to_dict())]
    assert set(canonical_names(family, [*full, *constants])) == set(full)
    bare = [name.removeprefix(family.prefix) for name in [*full, *constants] if name != family.one("head").name]
    assert set(canonical_names(family, bare)) == set(full) - {family.one("head").name}
    assert "model.extra" in canonical_names(family_of({"model_type": "llama"}), ["model.extra", "model.norm.weight"])
