"""Sizes of a model, and what follows from them: parameters and FLOPs. From the configuration alone, without torch."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError
from scionlm.families.registry import family_of
from scionlm.families.spec import FamilySpec, TensorSpec

# No decoder has nearly as many; a file that says so is broken, and would keep everything busy for minutes.
MAX_LAYERS = 10_000


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
    def of(cls, config: dict[str, Any], where: str | Path = "config.json") -> "ModelShape":
        """Read and check the sizes in a `config.json`.

        Args:
            config: What it holds.
            where: The file, for messages.

        Raises:
            DataError: A size is missing, not a positive integer, or does not divide; the family is unknown.
        """
        family = family_of(config)

        def size(name: str, default: int | None = None) -> int:
            value = family.get(config, name)
            value = default if value is None else value
            if value is None:
                raise DataError(f"{where}: {family.key(name)} is missing")
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
                raise DataError(f"{where}: {family.key(name)} is {value!r}, but must be a positive integer")
            return value

        ratio = family.intermediate_ratio
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads) if family.has_kv_heads else heads
        own_head_dim = family.has_head_dim and family.get(config, "head_dim") is not None
        if not own_head_dim and hidden % heads:
            raise DataError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        layers = size("num_hidden_layers")
        if layers > MAX_LAYERS:
            raise DataError(f"{where}: {family.key('num_hidden_layers')} is {layers}; no model has that many")
        if heads % kv_heads:
            raise DataError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        return cls(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=size("intermediate_size", ratio and ratio * hidden),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=size("head_dim") if own_head_dim else hidden // heads,
            vocab_size=size("vocab_size"),
            tie_word_embeddings=bool(family.get(config, "tie_word_embeddings")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return asdict(self)


def context_length(config: dict[str, Any]) -> int | None:
    """Return how many positions a model has been made for; None where it does not say."""
    value = family_of(config).get(config, "max_position_embeddings")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def learned_positions(config: dict[str, Any]) -> int | None:
    """Return how many positions have weights of their own, beyond which there is nothing; None where there are none."""
    return context_length(config) if any(spec.role == "position" for spec in family_of(config).outside) else None


def axis_size(axis: str, family: FamilySpec, config: dict[str, Any], shape: ModelShape) -> int:
    """Return the length of an axis of `families.spec`, fused ones included."""

    def one(name: str) -> int:
        if name == "position":
            positions = context_length(config)
            if positions is None:
                key = family.key("max_position_embeddings")
                raise DataError(f"config.json: {key} is {config.get(key)!r}, but must be a positive integer")
            return positions + family.position_offset
        return {
            "hidden": shape.hidden_size,
            "heads": shape.num_attention_heads * shape.head_dim,
            "kv_heads": shape.num_key_value_heads * shape.head_dim,
            "qkv_heads": 3 * shape.num_attention_heads * shape.head_dim,
            "ffn": shape.intermediate_size,
            "vocab": shape.vocab_size,
            "head_dim": shape.head_dim,
        }[name]

    return sum(one(name) for name in axis.split("+"))


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a particular model.

    Attributes:
        name: Its full name.
        spec: Its entry in the family.
        shape: Its shape.
        layer: Index of its layer; None outside the layers.
        head: Which head's it is, where each has its own.
    """

    name: str
    spec: TensorSpec
    shape: tuple[int, ...]
    layer: int | None = None
    head: int | None = None


def expected_tensors(config: dict[str, Any]) -> Iterator[TensorPlace]:
    """Yield every tensor of a model in storage order; the head only where it is not tied."""
    family, shape = family_of(config), ModelShape.of(config)
    repeats = {"heads": shape.num_attention_heads, "kv_heads": shape.num_key_value_heads}

    def sizes(spec: TensorSpec) -> tuple[int, ...]:
        return tuple(axis_size(axis, family, config, shape) for axis in spec.axes)

    for spec in family.outside:
        if family.has(spec, config) and not (spec.role == "head" and shape.tie_word_embeddings):
            yield TensorPlace(spec.name, spec, sizes(spec))
    specs = [(spec, sizes(spec)) for spec in family.layer if family.has(spec, config)]
    for layer in range(shape.num_hidden_layers):
        for spec, lengths in specs:
            name = f"{family.layers}.{layer}.{spec.name}"
            if spec.repeat is None:
                yield TensorPlace(name, spec, lengths, layer)
            else:
                for head in range(repeats[spec.repeat]):
                    yield TensorPlace(name.replace("{head}", str(head)), spec, lengths, layer, head)


def count_parameters(config: dict[str, Any]) -> dict[str, int]:
    """Return the number of parameters by part, and their `total`; a tied head counts once, as embedding."""
    counts: Counter[str] = Counter()
    for place in expected_tensors(config):
        counts[place.spec.part] += prod(place.shape)
    return dict(counts) | {"total": counts.total()}


def flops_per_token(config: dict[str, Any], seq_len: int) -> int:
    """Return the floating-point operations of one training token, forward and backward.

    Six for each parameter that is multiplied (the head once, tied or not; the embedding look-up not), and
    12 * layers * heads * head_dim * seq_len for attention scores and values, the causal half not discounted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, arXiv:2204.02311.
    """
    shape = ModelShape.of(config)
    looked_up = ("embedding", "position")
    matmul = sum(prod(p.shape) for p in expected_tensors(config) if len(p.shape) == 2 and p.spec.role not in looked_up)
    if shape.tie_word_embeddings:
        matmul += shape.vocab_size * shape.hidden_size
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * seq_len
    return 6 * matmul + attention


def canonical_names(family: FamilySpec, names: list[str]) -> dict[str, str]:
    """Return full name to name in the file, for the tensors that hold weights.

    Files written by the bare decoder leave the first part of each name out, and old ones also hold constants.
    """
    prefix = family.prefix
    bare = not any(name.startswith(prefix) for name in names)
    full = {stored: name for name, stored in family.stored_as.items()}
    head = family.one("head").name
    result: dict[str, str] = {}
    for stored in names:
        if not any(re.search(pattern, stored) for pattern in family.constants):
            name = full.get(stored, stored)
            result[prefix + name if bare and name != head else name] = stored
    return result


def check_tensors(config: dict[str, Any], found: dict[str, tuple[int, ...] | None], where: str) -> None:
    """Check that a model has exactly the tensors, in the shapes, that its configuration promises.

    Args:
        config: The model's `config.json`.
        found: Full name to shape of the tensors that are there; None for one whose file is not here.
        where: Folder or file, for messages.

    Raises:
        DataError: A tensor is unknown, missing, or of another shape.
    """
    family = family_of(config)
    expected = {place.name: place.shape for place in expected_tensors(config)}
    embedding, head = family.one("embedding").name, family.one("head").name
    for name, shape in found.items():
        tied_copy = name == head and name not in expected
        if name not in expected and not tied_copy:
            raise DataError(f"{where}: tensor {name!r} is not one that model_type {config['model_type']!r} has")
        wanted = expected[embedding if tied_copy else name]
        if shape is not None and shape != wanted:
            raise DataError(f"{where}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(wanted)}")
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
