"""The form in which a family is written down.

Every tensor of a model of the family matches exactly one entry; a tensor that matches none is an error that names it.
Axes are what surgery cuts along and what parameters are counted from:

    hidden     the residual stream              hidden_size
    heads      query heads times head_dim       num_attention_heads * head_dim
    kv_heads   key/value heads times head_dim   num_key_value_heads * head_dim
    ffn        channels inside the MLP          intermediate_size
    vocab      tokens                           vocab_size
    head_dim   channels inside one head         head_dim
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["hidden", "heads", "kv_heads", "ffn", "vocab", "head_dim"]
Part = Literal["embedding", "attention", "mlp", "norm", "head"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name (inside the layer, for tensors of a layer), what it belongs to, and its axes in order.

    Attributes:
        name: Name as in the state dict; for a layer's tensor without the layer's prefix.
        part: What the tensor belongs to, for counting and for inheriting parts.
        axes: Its axes in storage order (`[out, in]` for a linear layer).
        requires: A config key that must be true for the tensor to exist, such as `attention_bias`.
    """

    name: str
    part: Part
    axes: tuple[Axis, ...]
    requires: str | None = None


@dataclass(frozen=True)
class FamilySpec:
    """A family of decoders.

    Attributes:
        model_types: `model_type` values in `config.json` that it covers.
        layers: Module path of the list of layers; a layer's tensors are `{layers}.{index}.{name}`.
        body: Module path of the decoder without its head: token ids in, final hidden states out.
        final_norm: Module path of the norm before the head.
        embedding: Name of the token embedding's weight.
        head: Name of the output projection's weight; the embedding's when tied.
        outside: Tensors outside the layers.
        layer: Tensors of one layer.
        per_layer_config: Config keys that hold a list with one entry a layer.
    """

    model_types: tuple[str, ...]
    layers: str
    body: str
    final_norm: str
    embedding: str
    head: str
    outside: tuple[TensorSpec, ...]
    layer: tuple[TensorSpec, ...]
    per_layer_config: tuple[str, ...] = ()
