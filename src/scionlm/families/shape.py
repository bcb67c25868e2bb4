"""Sizes of a model, and what follows from them: parameters and FLOPs. From the configuration alone, without torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from scionlm.core.errors import DataError
from scionlm.families.spec import FamilySpec, TensorSpec


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, by Hugging Face's names."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "ModelShape":
        """Read and check the sizes in a `config.json`.

        Raises:
            DataError: A size is missing, not a positive integer, or does not divide.
        """

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
                raise DataError(f"config.json: {key} is {value!r}, but must be a positive integer")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        # transformers' own defaults for a key that is absent; they differ by family.
        kv_default = 8 if config.get("model_type") == "mistral" else heads
        absent = "num_key_value_heads" not in config
        kv_heads = size("num_key_value_heads", kv_default if absent else heads)
        if config.get("head_dim") is None and hidden % heads:
            raise DataError(f"config.json: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        if heads % kv_heads:
            raise DataError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        return cls(
            num_hidden_layers=size("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return asdict(self)

    def axis(self, name: str) -> int:
        """Return the length of an axis of `families.spec`."""
        return {
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads * self.head_dim,
            "kv_heads": self.num_key_value_heads * self.head_dim,
            "ffn": self.intermediate_size,
            "vocab": self.vocab_size,
            "head_dim": self.head_dim,
        }[name]


def expected_tensors(family: FamilySpec, config: dict[str, Any]) -> Iterator[tuple[str, TensorSpec, tuple[int, ...]]]:
    """Yield (name, spec, shape) of every tensor of a model in storage order; the head only where it is not tied."""
    shape = ModelShape.of(config)

    def exists(spec: TensorSpec) -> bool:
        return spec.requires is None or bool(config.get(spec.requires))

    for spec in family.outside:
        if exists(spec) and not (spec.name == family.head and shape.tie_word_embeddings):
            yield spec.name, spec, tuple(shape.axis(axis) for axis in spec.axes)
    for index in range(shape.num_hidden_layers):
        for spec in family.layer:
            if exists(spec):
                yield f"{family.layers}.{index}.{spec.name}", spec, tuple(shape.axis(axis) for axis in spec.axes)


def count_parameters(family: FamilySpec, config: dict[str, Any]) -> dict[str, int]:
    """Return the number of parameters by part, and their `total`; a tied head counts once, as embedding."""
    counts: Counter[str] = Counter()
    for _, spec, shape in expected_tensors(family, config):
        counts[spec.part] += prod(shape)
    return dict(counts) | {"total": counts.total()}


def flops_per_token(family: FamilySpec, config: dict[str, Any], seq_len: int) -> int:
    """Return the floating-point operations of one training token, forward and backward.

    Six for each parameter that is multiplied (the head once, tied or not; the embedding look-up not), and
    12 * layers * heads * head_dim * seq_len for attention scores and values, the causal half not discounted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, arXiv:2204.02311.
    """
    shape = ModelShape.of(config)
    matmul = sum(prod(s) for _, spec, s in expected_tensors(family, config) if len(s) == 2 and spec.part != "embedding")
    if shape.tie_word_embeddings:
        matmul += shape.vocab_size * shape.hidden_size
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * seq_len
    return 6 * matmul + attention


def check_tensors(family: FamilySpec, config: dict[str, Any], found: dict[str, tuple[int, ...]], where: str) -> None:
    """Check that a model has exactly the tensors, in the shapes, that its configuration promises.

    Args:
        family: The model's family.
        config: Its `config.json`.
        found: Name to shape of the tensors that are there.
        where: Folder or file, for messages.

    Raises:
        DataError: A tensor is unknown, missing, or of another shape.
    """
    expected = {name: shape for name, _, shape in expected_tensors(family, config)}
    for name, shape in found.items():
        tied_copy = name == family.head and bool(config.get("tie_word_embeddings"))
        if name not in expected and not tied_copy:
            raise DataError(f"{where}: tensor {name!r} is not one that model_type {config['model_type']!r} has")
        wanted = expected.get(family.embedding if tied_copy else name)
        if shape != wanted:
            raise DataError(
                f"{where}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(wanted or ())}"
            )
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
