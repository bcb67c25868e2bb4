"""Llama and the models of its exact shape (SmolLM2, Llama 1 to 3, TinyLlama, OpenLLaMA), and Mistral."""

from dataclasses import replace

from scionlm.families.spec import FamilySpec, TensorSpec

_LAYER = (
    TensorSpec("input_layernorm.weight", "norm", ("hidden",)),
    TensorSpec("self_attn.q_proj.weight", "attention", ("heads", "hidden")),
    TensorSpec("self_attn.k_proj.weight", "attention", ("kv_heads", "hidden")),
    TensorSpec("self_attn.v_proj.weight", "attention", ("kv_heads", "hidden")),
    TensorSpec("self_attn.o_proj.weight", "attention", ("hidden", "heads")),
    TensorSpec("post_attention_layernorm.weight", "norm", ("hidden",)),
    TensorSpec("mlp.gate_proj.weight", "mlp", ("ffn", "hidden")),
    TensorSpec("mlp.up_proj.weight", "mlp", ("ffn", "hidden")),
    TensorSpec("mlp.down_proj.weight", "mlp", ("hidden", "ffn")),
)
_BIASES = (
    TensorSpec("self_attn.q_proj.bias", "attention", ("heads",), requires="attention_bias"),
    TensorSpec("self_attn.k_proj.bias", "attention", ("kv_heads",), requires="attention_bias"),
    TensorSpec("self_attn.v_proj.bias", "attention", ("kv_heads",), requires="attention_bias"),
    TensorSpec("self_attn.o_proj.bias", "attention", ("hidden",), requires="attention_bias"),
    TensorSpec("mlp.gate_proj.bias", "mlp", ("ffn",), requires="mlp_bias"),
    TensorSpec("mlp.up_proj.bias", "mlp", ("ffn",), requires="mlp_bias"),
    TensorSpec("mlp.down_proj.bias", "mlp", ("hidden",), requires="mlp_bias"),
)

LLAMA = FamilySpec(
    model_types=("llama",),
    layers="model.layers",
    body="model",
    final_norm="model.norm",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    outside=(
        TensorSpec("model.embed_tokens.weight", "embedding", ("vocab", "hidden")),
        TensorSpec("model.norm.weight", "norm", ("hidden",)),
        TensorSpec("lm_head.weight", "head", ("vocab", "hidden")),
    ),
    layer=_LAYER + _BIASES,
)

# The same tensors, never with biases: transformers ignores those keys here.
MISTRAL = replace(LLAMA, model_types=("mistral",), layer=_LAYER)
