"""Llama and the families that are a few differences away from it."""

from dataclasses import replace

from scionlm.families.blocks import attention, ends, glu, layer_norm, linear, mlp, rms_norm
from scionlm.families.spec import FamilySpec, TensorSpec

_ENDS = ends("model.embed_tokens.weight", rms_norm("model.norm", "final_norm"))
_BEFORE_ATTENTION = rms_norm("input_layernorm", "attention_norm")
_BEFORE_MLP = rms_norm("post_attention_layernorm", "mlp_norm")
_HEAD_NORMS = (
    *rms_norm("self_attn.q_norm", "query_norm", "head_dim"),
    *rms_norm("self_attn.k_norm", "key_norm", "head_dim"),
)

# SmolLM2, TinyLlama and OpenLLaMA are of this type too.
LLAMA = FamilySpec(
    model_types=("llama",),
    layers="model.layers",
    outside=_ENDS,
    layer=(*_BEFORE_ATTENTION, *attention("attention_bias", "attention_bias"), *_BEFORE_MLP, *glu("mlp_bias")),
    defaults={"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
)
GRANITE = replace(LLAMA, model_types=("granite",), logits_divided_by="logits_scaling")

# transformers ignores bias keys here.
MISTRAL = replace(
    LLAMA,
    model_types=("mistral",),
    layer=(*_BEFORE_ATTENTION, *attention(), *_BEFORE_MLP, *glu()),
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 8},
)

QWEN2 = replace(
    LLAMA,
    model_types=("qwen2",),
    layer=(*_BEFORE_ATTENTION, *attention(qkv_bias=True), *_BEFORE_MLP, *glu()),
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 32},
    per_layer_config=("layer_types",),
    layer_count_config=("max_window_layers",),
)

QWEN3 = replace(
    QWEN2,
    model_types=("qwen3",),
    layer=(
        *_BEFORE_ATTENTION,
        *attention("attention_bias", "attention_bias"),
        *_HEAD_NORMS,
        *_BEFORE_MLP,
        *glu(),
    ),
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
)

SMOLLM3 = replace(
    LLAMA,
    model_types=("smollm3",),
    defaults={"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": False, "mlp_bias": False},
    per_layer_config=("layer_types", "no_rope_layers"),
    layer_count_config=("max_window_layers",),
)

# Norms stand behind attention and MLP, and those of query and key run over all heads together.
OLMO2 = replace(
    LLAMA,
    model_types=("olmo2",),
    layer=(
        *attention("attention_bias", "attention_bias"),
        *rms_norm("self_attn.q_norm", "query_norm", "heads"),
        *rms_norm("self_attn.k_norm", "key_norm", "kv_heads"),
        *rms_norm("post_attention_layernorm", "attention_norm"),
        *glu(),
        *rms_norm("post_feedforward_layernorm", "mlp_norm"),
    ),
    defaults={"tie_word_embeddings": False, "attention_bias": False},
)
OLMO3 = replace(OLMO2, model_types=("olmo3",), per_layer_config=("layer_types",))

PHI3 = replace(
    LLAMA,
    model_types=("phi3",),
    layer=(
        *_BEFORE_ATTENTION,
        *linear("self_attn.qkv_proj", "qkv", "heads+kv_heads+kv_heads", "hidden"),
        *linear("self_attn.o_proj", "attention_output", "hidden", "heads"),
        *_BEFORE_MLP,
        *linear("mlp.gate_up_proj", "gate_up", "ffn+ffn", "hidden"),
        *linear("mlp.down_proj", "mlp_output", "hidden", "ffn"),
    ),
    defaults={"tie_word_embeddings": False},
    has_head_dim=False,  # its configuration class checks rotary factors against hidden_size / num_attention_heads
)

STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    outside=ends("model.embed_tokens.weight", layer_norm("model.norm", "final_norm")),
    layer=(
        *layer_norm("input_layernorm", "attention_norm"),
        *attention("use_bias", "use_bias"),
        *layer_norm("post_attention_layernorm", "mlp_norm"),
        *mlp("mlp.c_fc", "mlp.c_proj", "use_bias"),
    ),
    defaults={"tie_word_embeddings": True, "num_key_value_heads": 2, "use_bias": True},
    norm_centered=True,
)

# Attention and MLP read the same norm, side by side.
COHERE2 = replace(
    LLAMA,
    model_types=("cohere2",),
    layer=(*_BEFORE_ATTENTION, *attention("attention_bias", "attention_bias"), *glu()),
    defaults={"tie_word_embeddings": True, "attention_bias": False, "logit_scale": 0.0625},
    per_layer_config=("layer_types",),
    logits_multiplied_by="logit_scale",
    norm_centered=True,
)

STABLELM = replace(
    LLAMA,
    model_types=("stablelm",),
    outside=ends("model.embed_tokens.weight", layer_norm("model.norm", "final_norm")),
    layer=(
        *layer_norm("input_layernorm", "attention_norm"),
        *attention(qkv_bias="use_qkv_bias"),
        TensorSpec(
            "self_attn.q_layernorm.norms.{head}.weight",
            "query_norm",
            ("head_dim",),
            requires="qk_layernorm",
            repeat="heads",
        ),
        TensorSpec(
            "self_attn.k_layernorm.norms.{head}.weight",
            "key_norm",
            ("head_dim",),
            requires="qk_layernorm",
            repeat="kv_heads",
        ),
        *layer_norm("post_attention_layernorm", "mlp_norm", requires="!use_parallel_residual"),
        *glu(),
    ),
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    has_head_dim=False,
    norm_centered=True,
)
