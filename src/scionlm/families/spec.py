"""The form in which a family is written down.

Every tensor of a model of the family matches exactly one entry; a tensor that matches none is an error that names it.
Axes are what surgery cuts along and what parameters are counted from:

    hidden     the residual stream                      hidden_size
    heads      query heads times head_dim               num_attention_heads * head_dim
    kv_heads   key/value heads times head_dim           num_key_value_heads * head_dim
    qkv_heads  query, key and value of one head after another, head by head: heads * 3 * head_dim
    head_dim   channels inside one head                 head_dim
    ffn        channels inside the MLP                  intermediate_size
    vocab      tokens                                   vocab_size
    position   rows of a learned position table         max_position_embeddings + position_offset

A fused tensor's axis is a sum, in storage order: `heads+kv_heads+kv_heads`, `ffn+ffn`. Sizes go by Hugging Face's names
throughout; `FamilySpec.keys` says where a family calls one otherwise.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal[
    "embedding", "position", "final_norm", "head",
    "attention_norm", "query", "key", "value", "qkv", "query_norm", "key_norm", "attention_output",
    "mlp_norm", "gate", "up", "gate_up", "mlp_output",
]  # fmt: skip
Part = Literal["embedding", "position", "final_norm", "head", "attention_norm", "attention", "mlp_norm", "mlp"]

_PART_OF: dict[str, str] = {
    **dict.fromkeys(("query", "key", "value", "qkv", "query_norm", "key_norm", "attention_output"), "attention"),
    **dict.fromkeys(("gate", "up", "gate_up", "mlp_output"), "mlp"),
}
PARTS: tuple[Part, ...] = (
    "embedding", "position", "attention_norm", "attention", "mlp_norm", "mlp", "final_norm", "head",
)  # fmt: skip
"""What a model falls apart into: these cover every tensor and do not overlap."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name (inside the layer, for tensors of a layer), what it does, and its axes in storage order.

    Attributes:
        name: Name as in the state dict; for a layer's tensor without the layer's prefix. `{head}` stands for the number
            of a head where each has a tensor of its own.
        role: What the tensor does.
        axes: Its axes in storage order: `[out, in]` for a linear layer, `[in, out]` for GPT-2's Conv1D.
        requires: A config key that must be true for the tensor to exist, such as `attention_bias`; `!key`: false.
        repeat: `heads` or `kv_heads` where `name` has a `{head}`.
    """

    name: str
    role: Role
    axes: tuple[str, ...]
    requires: str | None = None
    repeat: str | None = None

    @property
    def part(self) -> Part:
        """The part of the model that it belongs to."""
        return _PART_OF.get(self.role, self.role)  # pyright: ignore[reportReturnType]

    @property
    def module(self) -> str:
        """Path of the module that holds it: where hooks attach."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class FamilySpec:
    """A family of decoders.

    Attributes:
        model_types: `model_type` values in `config.json` that it covers.
        layers: Module path of the list of layers; a layer's tensors are `{layers}.{index}.{name}`.
        outside: Tensors outside the layers.
        layer: Tensors of one layer.
        keys: Hugging Face's name of a size to the family's own key for it.
        defaults: Value of a key that `config.json` leaves out, as transformers fills it in.
        intermediate_ratio: intermediate_size over hidden_size where `config.json` does not say.
        packs_documents: Whether the model keeps attention inside documents where positions begin anew.
        has_head_dim: Whether `head_dim` is a setting; where it is not, it is hidden_size / num_attention_heads.
        has_kv_heads: Whether key and value may have fewer heads than query.
        position_offset: Rows of the position table in front of position 0.
        per_layer_config: Config keys that hold a list with one entry a layer.
        layer_count_config: Config keys that say how many of the first layers are of a kind.
        required_config: Config keys that must have this value (a name: that of another key); others are refused.
        embedding_scaled: Whether embeddings are multiplied by the root of hidden_size.
        norm_offset: What is added to a norm's weight to give its gain.
        norm_centered: Whether norms take the mean off first, as LayerNorm does; else they go by the mean square.
        inverse_layer_scale: Config key that divides attention scores by the number of the layer.
        logits_multiplied_by: Config key of a factor of the logits.
        logits_divided_by: Config key of a divisor of the logits.
        logits_capped_at: Config key of what logits are softly kept below.
        stored_as: Full name of a tensor to the name that files give it, where the two differ.
        prefix: Start of names that files written by the bare decoder leave out.
        constants: Patterns of tensors in old files that hold no weights and are computed on loading.
    """

    model_types: tuple[str, ...]
    layers: str
    outside: tuple[TensorSpec, ...]
    layer: tuple[TensorSpec, ...]
    keys: dict[str, str] = field(default_factory=lambda: {})
    defaults: dict[str, Any] = field(default_factory=lambda: {})
    intermediate_ratio: int | None = None
    has_head_dim: bool = True
    packs_documents: bool = True
    has_kv_heads: bool = True
    position_offset: int = 0
    per_layer_config: tuple[str, ...] = ()
    layer_count_config: tuple[str, ...] = ()
    required_config: dict[str, Any] = field(default_factory=lambda: {})
    embedding_scaled: bool = False
    norm_offset: float = 0.0
    norm_centered: bool = False
    inverse_layer_scale: str | None = None
    logits_multiplied_by: str | None = None
    logits_divided_by: str | None = None
    logits_capped_at: str | None = None
    stored_as: dict[str, str] = field(default_factory=lambda: {})
    prefix: str = "model."
    constants: tuple[str, ...] = (r"(^|\.)rotary_emb\.inv_freq$",)

    def key(self, name: str) -> str:
        """Return the config key of a size."""
        return self.keys.get(name, name)

    def get(self, config: dict[str, Any], name: str) -> Any:
        """Return a setting by Hugging Face's name, or what transformers takes where `config.json` leaves it out."""
        key = self.key(name)
        return config[key] if key in config else self.defaults.get(name)

    def has(self, spec: TensorSpec, config: dict[str, Any]) -> bool:
        """Return whether a model with this configuration has the tensor (a tied head aside)."""
        if spec.requires is None:
            return True
        wanted = not spec.requires.startswith("!")
        return bool(self.get(config, spec.requires.lstrip("!"))) == wanted

    def one(self, role: Role) -> TensorSpec:
        """Return the weight outside the layers with this role."""
        return next(spec for spec in self.outside if spec.role == role)
