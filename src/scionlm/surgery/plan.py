"""The plan: what each part of the target is made of. Plain values, plain JSON, and plans compose.

A plan says nothing about files or tensors; `surgery.operations` turns it into one operation a tensor with the help of
the family's data.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from scionlm.core.errors import DataError, UsageError
from scionlm.families.spec import PARTS, Part
from scionlm.surgery.indices import format_indices, parse_indices

Indices = tuple[int, ...]
Init = Literal["source", "zero_output", "random"]


@dataclass(frozen=True)
class LayerPlan:
    """Where one layer of the target comes from.

    Attributes:
        index: Layer of the donor: its weights, or, for a fresh layer, only its entry in per-layer config lists.
        donor: Which of the plan's donors.
        init: `source` takes the donor's weights; `random` is fresh by the family's initialization; `zero_output` is
            fresh with output projections of zero, so that the layer passes its input on.
        heads: Query heads to keep, key/value group by group; None keeps all.
        kv_heads: Key/value heads to keep.
        ffn: Channels of the MLP to keep.
    """

    index: int
    donor: int = 0
    init: Init = "source"
    heads: Indices | None = None
    kv_heads: Indices | None = None
    ffn: Indices | None = None


@dataclass(frozen=True)
class SurgeryPlan:
    """What a target is made of.

    Attributes:
        donors: Names of the models that it is made from; the first gives everything outside the layers.
        donor_layers: Layers of each donor.
        layers: The target's layers in order.
        hidden: Channels of the residual stream to keep; None keeps all.
        vocab: For each token of the target its row in the source; None keeps all.
        vocab_padding: Rows added behind the vocabulary; no token, so they are made never to be the most likely one.
        fresh: Parts that are not inherited but initialized anew, in every layer.
        seed: Of everything fresh.
        strategy: How the layers were chosen.
        width: How heads and channels were chosen.
    """

    donors: tuple[str, ...]
    donor_layers: Indices
    layers: tuple[LayerPlan, ...]
    hidden: Indices | None = None
    vocab: Indices | None = None
    vocab_padding: int = 0
    fresh: tuple[Part, ...] = ()
    seed: int = 0
    strategy: str = "explicit"
    width: str | None = None

    @property
    def keep(self) -> Indices:
        """The donor's index of each layer of the target."""
        return tuple(layer.index for layer in self.layers)

    @property
    def num_source_layers(self) -> int:
        """Layers of the first donor."""
        return self.donor_layers[0]

    @property
    def cuts_width(self) -> bool:
        """Whether heads or channels are cut."""
        layered = any((layer.heads, layer.kv_heads, layer.ffn) != (None, None, None) for layer in self.layers)
        return self.hidden is not None or layered

    @property
    def is_subset(self) -> bool:
        """Whether the layers are those of one donor, each at most once, in its order."""
        plain = all(layer.donor == 0 and layer.init == "source" for layer in self.layers)
        return plain and list(self.keep) == sorted(set(self.keep))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; lists of channels as `0-7,12`."""
        layers = [
            {k: format_indices(v) if isinstance(v, tuple) else v for k, v in asdict(layer).items() if v is not None}
            for layer in self.layers
        ]
        return {
            "keep": list(self.keep),
            "num_source_layers": self.num_source_layers,
            "strategy": self.strategy,
            "donors": [
                {"name": n, "num_hidden_layers": k} for n, k in zip(self.donors, self.donor_layers, strict=True)
            ],
            "layers": layers,
            "hidden": None if self.hidden is None else format_indices(self.hidden),
            "vocab": None if self.vocab is None else format_indices(self.vocab),
            "vocab_padding": self.vocab_padding,
            "fresh": list(self.fresh),
            "seed": self.seed,
            "width": self.width,
        }

    def _checked(self) -> "SurgeryPlan":
        """Return the plan itself if it hangs together.

        Raises:
            ValueError: It does not.
        """
        if not self.donors or not self.layers:
            raise ValueError("it names no donor or no layer")
        for layer in self.layers:
            if layer.init not in ("source", "zero_output", "random"):
                raise ValueError(f"init {layer.init!r} is unknown")
            if layer.donor >= len(self.donors) or layer.index >= self.donor_layers[layer.donor]:
                raise ValueError(f"layer {layer.index} of donor {layer.donor} does not exist")
        cuts = [kept for layer in self.layers for kept in (layer.heads, layer.kv_heads, layer.ffn)]
        if () in (self.hidden, self.vocab, *cuts):
            raise ValueError("a selection is empty")
        return self

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "SurgeryPlan":
        """Return the plan that `to_dict` gave.

        Raises:
            DataError: It is not one.
        """

        def indices(value: str | None) -> Indices | None:
            return None if value is None else tuple(parse_indices(value, "plan") if value else ())

        try:
            fresh = record["fresh"]
            if not isinstance(fresh, list):
                raise TypeError("fresh is not a list")
            layers = tuple(
                LayerPlan(
                    _whole(layer["index"]),
                    _whole(layer["donor"]),
                    layer["init"],
                    *(indices(layer.get(key)) for key in ("heads", "kv_heads", "ffn")),
                )
                for layer in record["layers"]
            )
            return cls(
                donors=tuple(str(donor["name"]) for donor in record["donors"]),
                donor_layers=tuple(_whole(donor["num_hidden_layers"]) for donor in record["donors"]),
                layers=layers,
                hidden=indices(record["hidden"]),
                vocab=indices(record["vocab"]),
                vocab_padding=_whole(record["vocab_padding"]),
                fresh=parse_parts(",".join(fresh)) if fresh else (),
                seed=_whole(record["seed"]),
                strategy=str(record["strategy"]),
                width=_name(record["width"]),
            )._checked()
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise DataError(f"this is not a surgery plan: {type(error).__name__} {error}") from error


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number from 0 on")
    return value


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def parse_parts(text: str) -> tuple[Part, ...]:
    """Return the parts that a list such as `mlp,mlp_norm` names, in the model's order.

    Raises:
        UsageError: A name is not a part.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UsageError(f"fresh: {unknown[0]!r} is not a part of a model (parts: {', '.join(PARTS)})")
    return tuple(part for part in PARTS if part in names)


def _through(first: Sequence[int] | None, second: Sequence[int] | None) -> Indices | None:
    """Return what a selection of a selection keeps of the whole."""
    if first is None or second is None:
        kept = first if second is None else second
        return None if kept is None else tuple(kept)
    return tuple(first[i] for i in second)


def compose(first: SurgeryPlan, second: SurgeryPlan) -> SurgeryPlan:
    """Return the one plan that does what `first` and then `second` do, from the donors of `first`.

    Raises:
        UsageError: `second` has several donors, was made for another number of layers, or one of them makes fresh
            weights that the other's choice of layers would make differently.
    """
    if len(second.donors) != 1 or second.donor_layers != (len(first.layers),):
        raise UsageError(f"the second plan is for {second.donor_layers} layers, the first gives {len(first.layers)}")
    if first.vocab_padding and second.vocab is not None:
        raise UsageError("a padded vocabulary cannot be trimmed again; trim first and pad afterwards")
    if first.fresh or any(first.layers[layer.index].init != "source" for layer in second.layers):
        raise UsageError("fresh weights of the first plan cannot be carried into another in one step")
    layers: list[LayerPlan] = []
    for layer in second.layers:
        below = first.layers[layer.index]
        cut = {key: _through(getattr(below, key), getattr(layer, key)) for key in ("heads", "kv_heads", "ffn")}
        layers.append(replace(below, init=below.init if layer.init == "source" else layer.init, **cut))
    return replace(
        first,
        layers=tuple(layers),
        hidden=_through(first.hidden, second.hidden),
        vocab=_through(first.vocab, second.vocab),
        vocab_padding=first.vocab_padding + second.vocab_padding,
        fresh=second.fresh,
        seed=second.seed,
        strategy=f"{first.strategy}, then {second.strategy}",
        width=", then ".join(rule for rule in (first.width, second.width) if rule) or None,
    )


def plan_without_fresh(plan: SurgeryPlan) -> SurgeryPlan:
    """Return the same plan with all parts inherited, and random layers as ones that pass their input on."""
    layers = (replace(layer, init="zero_output") if layer.init == "random" else layer for layer in plan.layers)
    return replace(plan, fresh=(), layers=tuple(layers))


def same_for_all(layers: Sequence[LayerPlan], of: Callable[[LayerPlan], Indices | None]) -> int | None:
    """Return how many units every layer keeps (None: all of them).

    Raises:
        UsageError: Layers keep different numbers, which no Hugging Face configuration can say.
    """
    counts = {None if (kept := of(layer)) is None else len(kept) for layer in layers}
    if len(counts) > 1:
        raise UsageError(f"layers keep different numbers of units ({counts}); each must keep the same number")
    return counts.pop()
