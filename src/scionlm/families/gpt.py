"""GPT-2, GPT-NeoX (Pythia) and OPT: LayerNorms with biases, no grouped key/value heads, no head_dim setting."""

from scionlm.families.blocks import attention, conv1d, ends, layer_norm, linear, mlp
from scionlm.families.spec import FamilySpec, TensorSpec

GPT2 = FamilySpec(
    model_types=("gpt2",),
    layers="transformer.h",
    outside=(
        TensorSpec("transformer.wpe.weight", "position", ("position", "hidden")),
        *ends("transformer.wte.weight", layer_norm("transformer.ln_f", "final_norm")),
    ),
    layer=(
        *layer_norm("ln_1", "attention_norm"),
        *conv1d("attn.c_attn", "qkv", "hidden", "heads+kv_heads+kv_heads"),
        *conv1d("attn.c_proj", "attention_output", "heads", "hidden"),
        *layer_norm("ln_2", "mlp_norm"),
        *conv1d("mlp.c_fc", "up", "hidden", "ffn"),
        *conv1d("mlp.c_proj", "mlp_output", "ffn", "hidden"),
    ),
    keys={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 1024},
    intermediate_ratio=4,
    has_head_dim=False,
    has_kv_heads=False,
    required_config={"add_cross_attention": False},
    inverse_layer_scale="scale_attn_by_inverse_layer_idx",
    prefix="transformer.",
    constants=(r"\.attn\.(bias|masked_bias)$",),
    norm_centered=True,
)

GPT_NEOX = FamilySpec(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    outside=ends("gpt_neox.embed_in.weight", layer_norm("gpt_neox.final_layer_norm", "final_norm")),
    layer=(
        *layer_norm("input_layernorm", "attention_norm"),
        *linear("attention.query_key_value", "qkv", "qkv_heads", "hidden", "attention_bias"),
        *linear("attention.dense", "attention_output", "hidden", "heads", "attention_bias"),
        *layer_norm("post_attention_layernorm", "mlp_norm"),
        *mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", True),
    ),
    defaults={"tie_word_embeddings": False, "attention_bias": True},
    has_head_dim=False,
    has_kv_heads=False,
    stored_as={"lm_head.weight": "embed_out.weight"},
    prefix="gpt_neox.",
    constants=(r"\.attention\.(bias|masked_bias)$", r"(^|\.)rotary_emb\.inv_freq$"),
    norm_centered=True,
)

OPT = FamilySpec(
    model_types=("opt",),
    layers="model.decoder.layers",
    outside=(
        TensorSpec("model.decoder.embed_positions.weight", "position", ("position", "hidden")),
        *ends("model.decoder.embed_tokens.weight", layer_norm("model.decoder.final_layer_norm", "final_norm")),
    ),
    layer=(
        *layer_norm("self_attn_layer_norm", "attention_norm"),
        *attention("enable_bias", "enable_bias", output="out_proj"),
        *layer_norm("final_layer_norm", "mlp_norm"),
        *mlp("fc1", "fc2", "enable_bias"),
    ),
    keys={"intermediate_size": "ffn_dim"},
    defaults={"tie_word_embeddings": True, "enable_bias": True, "max_position_embeddings": 2048},
    has_head_dim=False,
    packs_documents=False,
    has_kv_heads=False,
    position_offset=2,
    # The 350M model norms behind its layers and projects its embeddings; no other OPT does.
    required_config={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": "hidden_size",
    },
    norm_centered=True,
)
