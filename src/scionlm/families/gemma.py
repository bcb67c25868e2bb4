"""Gemma: norms before and behind each half of a layer, gains stored as an offset from one, scaled embeddings."""

from scionlm.families.blocks import attention, ends, glu, rms_norm
from scionlm.families.spec import FamilySpec, TensorSpec


def _layer(*head_norms: TensorSpec) -> tuple[TensorSpec, ...]:
    return (
        *rms_norm("input_layernorm", "attention_norm"),
        *attention("attention_bias", "attention_bias"),
        *head_norms,
        *rms_norm("post_attention_layernorm", "attention_norm"),
        *rms_norm("pre_feedforward_layernorm", "mlp_norm"),
        *glu(),
        *rms_norm("post_feedforward_layernorm", "mlp_norm"),
    )


GEMMA2 = FamilySpec(
    model_types=("gemma2",),
    layers="model.layers",
    outside=ends("model.embed_tokens.weight", rms_norm("model.norm", "final_norm")),
    layer=_layer(),
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "final_logit_softcapping": 30.0,
    },
    per_layer_config=("layer_types",),
    embedding_scaled=True,
    norm_offset=1.0,
    logits_capped_at="final_logit_softcapping",
)

GEMMA3 = FamilySpec(
    model_types=("gemma3_text",),
    layers="model.layers",
    outside=GEMMA2.outside,
    layer=_layer(
        *rms_norm("self_attn.q_norm", "query_norm", "head_dim"), *rms_norm("self_attn.k_norm", "key_norm", "head_dim")
    ),
    defaults=GEMMA2.defaults | {"final_logit_softcapping": None},
    per_layer_config=("layer_types",),
    embedding_scaled=True,
    norm_offset=1.0,
    logits_capped_at="final_logit_softcapping",
)
