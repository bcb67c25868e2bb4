"""The pieces that decoders are made of, so that a family is a few lines."""

from scionlm.families.spec import Role, TensorSpec

Specs = tuple[TensorSpec, ...]


def linear(name: str, role: Role, out: str, into: str, bias: str | bool = False) -> Specs:
    """Return a linear layer `[out, in]`; `bias` is whether it has one, or the config key that says so."""
    weight = TensorSpec(f"{name}.weight", role, (out, into))
    return (weight,) if bias is False else (weight, _bias(name, role, out, bias))


def conv1d(name: str, role: Role, into: str, out: str) -> Specs:
    """Return GPT-2's transposed linear layer `[in, out]` with a bias."""
    return TensorSpec(f"{name}.weight", role, (into, out)), _bias(name, role, out, True)


def _bias(name: str, role: Role, out: str, bias: str | bool) -> TensorSpec:
    return TensorSpec(f"{name}.bias", role, (out,), requires=bias if isinstance(bias, str) else None)


def rms_norm(name: str, role: Role, axis: str = "hidden") -> Specs:
    """Return a norm with a weight."""
    return (TensorSpec(f"{name}.weight", role, (axis,)),)


def layer_norm(name: str, role: Role, requires: str | None = None) -> Specs:
    """Return a norm with weight and bias."""
    return tuple(TensorSpec(f"{name}.{kind}", role, ("hidden",), requires=requires) for kind in ("weight", "bias"))


def attention(qkv_bias: str | bool = False, output_bias: str | bool = False, output: str = "o_proj") -> Specs:
    """Return separate query, key, value and output projections."""
    return (
        *linear("self_attn.q_proj", "query", "heads", "hidden", qkv_bias),
        *linear("self_attn.k_proj", "key", "kv_heads", "hidden", qkv_bias),
        *linear("self_attn.v_proj", "value", "kv_heads", "hidden", qkv_bias),
        *linear(f"self_attn.{output}", "attention_output", "hidden", "heads", output_bias),
    )


def glu(bias: str | bool = False) -> Specs:
    """Return a gated MLP."""
    return (
        *linear("mlp.gate_proj", "gate", "ffn", "hidden", bias),
        *linear("mlp.up_proj", "up", "ffn", "hidden", bias),
        *linear("mlp.down_proj", "mlp_output", "hidden", "ffn", bias),
    )


def mlp(up: str, down: str, bias: str | bool) -> Specs:
    """Return an MLP of two layers."""
    return (*linear(up, "up", "ffn", "hidden", bias), *linear(down, "mlp_output", "hidden", "ffn", bias))


def ends(embedding: str, norm: Specs) -> Specs:
    """Return what stands outside the layers: embedding, final norm, output projection."""
    return (
        TensorSpec(embedding, "embedding", ("vocab", "hidden")),
        *norm,
        TensorSpec("lm_head.weight", "head", ("vocab", "hidden")),
    )
