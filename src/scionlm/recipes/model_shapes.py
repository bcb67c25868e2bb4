"""Known small models: the sizes that others are pruned to, and whole configurations to train from scratch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from scionlm.core.config import Mapping, nearest
from scionlm.families import FamilySpec, family_of
from scionlm.families.initialization import Init

SHAPE = "shape"
"""The key of a model that names a known one."""


@dataclass(frozen=True)
class TargetShape:
    """The sizes that a pruned model is to have, by Hugging Face's names; head_dim None is the source's."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """Return the sizes as plain values, as `complete_target` takes them."""
        return asdict(self)


KNOWN_SHAPES = {
    "sheared-llama-2.7b": TargetShape(32, 2560, 6912, 20, 20, 128),
    "sheared-llama-1.3b": TargetShape(24, 2048, 5504, 16, 16, 128),
    "sheared-llama-370m": TargetShape(24, 1024, 2816, 8, 8, 128),
    "llama-3.1-minitron-4b-width": TargetShape(32, 3072, 9216, 32, 8, 128),
    "llama-3.2-3b": TargetShape(28, 3072, 8192, 24, 8, 128),
    "llama-3.2-1b": TargetShape(16, 2048, 8192, 32, 8, 64),
    "tinyllama-1.1b": TargetShape(22, 2048, 5632, 32, 4, 64),
    "tinyllama-120m": TargetShape(12, 768, 2048, 12, 1, 64),
    "qwen3-1.7b": TargetShape(28, 2048, 6144, 16, 8, 128),
    "qwen3-0.6b": TargetShape(28, 1024, 3072, 16, 8, 128),
    "qwen2.5-1.5b": TargetShape(28, 1536, 8960, 12, 2, 128),
    "qwen2.5-0.5b": TargetShape(24, 896, 4864, 14, 2, 64),
    "smollm2-1.7b": TargetShape(24, 2048, 8192, 32, 32, 64),
    "smollm2-360m": TargetShape(32, 960, 2560, 15, 5, 64),
    "smollm2-135m": TargetShape(30, 576, 1536, 9, 3, 64),
    "pythia-1.4b": TargetShape(24, 2048, 8192, 16, 16, 128),
    "pythia-1b": TargetShape(16, 2048, 8192, 8, 8, 256),
    "pythia-410m": TargetShape(24, 1024, 4096, 16, 16, 64),
    "pythia-160m": TargetShape(12, 768, 3072, 12, 12, 64),
    "pythia-70m": TargetShape(6, 512, 2048, 8, 8, 64),
    "gpt2-xl": TargetShape(48, 1600, 6400, 25, 25, 64),
    "gpt2-large": TargetShape(36, 1280, 5120, 20, 20, 64),
    "gpt2-medium": TargetShape(24, 1024, 4096, 16, 16, 64),
    "gpt2": TargetShape(12, 768, 3072, 12, 12, 64),
}
"""Shapes of known small models; a source reaches those with heads of its own size."""


@dataclass(frozen=True)
class Architecture:
    """What models of one make have in common beside their sizes.

    Attributes:
        model_type: Their family.
        vocab_size: As published, padding included.
        init: How their first weights were drawn.
        settings: The rest of `config.json`, written out so that no default of transformers decides it.
    """

    model_type: str
    vocab_size: int
    init: Init = "transformers"
    settings: Mapping = field(default_factory=lambda: {})


# config.json of TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T; the 120M model is `tiny_LLaMA_120M` of its code.
_TINYLLAMA = Architecture("llama", 32000, "tinyllama", {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
})  # fmt: skip
# config.json of EleutherAI/pythia-410m; its tokenizer has fewer ids, and the table is padded.
_PYTHIA = Architecture("gpt_neox", 50304, "gpt_neox", {
    "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
})  # fmt: skip
# config.json of openai-community/gpt2. Its first weights are what transformers draws: 0.02, projections that add to the
# residual stream divided by the root of their number (Radford et al. 2019, section 2.3).
_GPT2 = Architecture("gpt2", 50257, "transformers", {
    "activation_function": "gelu_new", "n_positions": 1024, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "tie_word_embeddings": True,
})  # fmt: skip
# config.json of HuggingFaceTB/SmolLM2-135M.
_SMOLLM2 = Architecture("llama", 49152, "transformers", {
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "initializer_range": 0.041666666666666664,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
})  # fmt: skip

KNOWN_MODELS: dict[str, Architecture] = {
    **dict.fromkeys(("tinyllama-1.1b", "tinyllama-120m"), _TINYLLAMA),
    **dict.fromkeys(("pythia-1.4b", "pythia-1b", "pythia-410m", "pythia-160m", "pythia-70m"), _PYTHIA),
    **dict.fromkeys(("gpt2-xl", "gpt2-large", "gpt2-medium", "gpt2"), _GPT2),
    "smollm2-135m": _SMOLLM2,
}
"""Those of the shapes whose whole configuration is known here."""


def read_model(value: Any) -> Any:
    """Return a `model` as a recipe holds it: the name of a known one becomes a mapping that names it.

    Raises:
        ValueError: No model has that name, or it is of another family than a key beside it says.
    """
    value = {SHAPE: value} if isinstance(value, str) else value
    if not isinstance(value, dict) or SHAPE not in value:
        return value
    name, known = value[SHAPE], list(KNOWN_MODELS)
    if name not in known:
        raise ValueError(f"{SHAPE} {name!r} is unknown{nearest(str(name), known)} (known: {', '.join(known)})")
    family = KNOWN_MODELS[name].model_type
    if value.get("model_type", family) != family:
        raise ValueError(f"model_type {value['model_type']!r}: {SHAPE} {name} is of {family}; leave it out")
    return value


def model_config(model: Mapping, vocab_size: int | None = None) -> Mapping:
    """Return a model's keys as transformers has them: those of the known one that it names, under its own.

    The vocabulary is what the model says, else the data's, else the published one.

    Args:
        model: `model` of a recipe.
        vocab_size: Ids of the data's tokenizer, where there is one.

    Example:
        >>> model_config({"shape": "gpt2", "n_layer": 6})["n_layer"]
        6
    """
    own = {key: value for key, value in model.items() if key != SHAPE and (key, value) != ("vocab_size", None)}
    name = model.get(SHAPE)
    if name is None:
        return own if vocab_size is None else {"vocab_size": vocab_size} | own
    made = KNOWN_MODELS[name]
    first = {"model_type": made.model_type, "vocab_size": vocab_size or made.vocab_size}
    sizes = _sizes(KNOWN_SHAPES[name], family_of({"model_type": made.model_type}))
    return first | sizes | made.settings | own


def _sizes(shape: TargetShape, family: FamilySpec) -> Mapping:
    """Return the sizes by the family's keys; what follows from another size is left to follow from it."""
    follows = shape.head_dim == shape.hidden_size // shape.num_attention_heads
    has = {
        "head_dim": family.has_head_dim and not follows,
        "num_key_value_heads": family.has_kv_heads,
        "intermediate_size": shape.intermediate_size != (family.intermediate_ratio or 0) * shape.hidden_size,
    }
    return {family.key(name): size for name, size in shape.to_dict().items() if has.get(name, True)}


def init_of(model: Mapping | None) -> Init:
    """Return how the first weights of a `model` are drawn where nothing else is said."""
    name = (model or {}).get(SHAPE)
    return KNOWN_MODELS[name].init if name is not None else "transformers"
