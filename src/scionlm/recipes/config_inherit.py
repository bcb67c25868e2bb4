"""The section of a recipe that says what is inherited: which layers, how many, which parts and what width of them."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from scionlm.core.config import Section, nearest
from scionlm.families.spec import PARTS
from scionlm.recipes.measured import DEPTHS, HALF, MEASURED
from scionlm.surgery.depth import STRATEGIES
from scionlm.surgery.request import Importance

Fidelity = Literal["recommended", "paper-text", "paper-code"]
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def _number(value: Any) -> Any:
    if isinstance(value, str) and value != HALF:
        raise ValueError("neither a number of layers nor `half`")
    return value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class InheritConfig(Section):
    """What the child takes from the source."""

    layers: Annotated[int | Literal["half"] | None, BeforeValidator(_number)] = None
    """How many layers; `half` of the source's, rounded down. Null where `keep` names them or the strategy says how
    many, and keeps all of them where only parts or width are chosen."""
    keep: Annotated[str | list[int] | None, BeforeValidator(_as_text)] = None
    """Which layers, as `0`, `0-7,12` or a list."""
    repeat: bool = False
    """Whether `keep` may name a layer twice: for stacked models, and those that begin like DistilBERT."""
    strategy: str | None = None
    """How to choose `layers` of them; null is `first`. Beside those of `scion inherit`, what the source's layers are
    worth on the text that is trained on: `removal`, `taylor`, `block_influence`, `angular_distance`, `update_norm`,
    `cka_distance`, `lens`, `weight_norm`, `max_rank`, `mean_mass`, `angular_block`, `greedy`, `lazy`. `potent_prefix`
    and `before_lazy_group` also say how many: `layers` is then the most there may be."""
    analysis: str | None = None
    """Folder of a finished `scion analyze` of the source, to choose by instead of measuring."""
    fresh: list[str] = Field(default=[])
    """Parts that are not inherited but initialized anew: `embedding`, `position`, `attention_norm`, `attention`,
    `mlp_norm`, `mlp`, `final_norm`, `head`."""
    width: Literal["half"] | None = None
    """`half` is Inheritune's baseline: half of the heads, of the MLP's channels and of the hidden size."""
    hidden_size: int | None = None
    """Channels of the residual stream; null keeps all, as for the other sizes."""
    intermediate_size: int | None = None
    """Channels of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads."""
    importance: Importance = "first"
    """Which heads and channels stay: the first ones, ones drawn at random, or the most important ones by their weights
    (`magnitude`) or on the text (`activation`, `taylor`)."""
    init: Literal["source", "random"] = "source"
    """`random` is the control: the same shape from the family's own initialization."""

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str | None) -> str | None:
        name = value if value is None or value in MEASURED else value.partition(":")[0]
        if name is not None and name not in MEASURED and name not in STRATEGIES:
            raise ValueError(_unknown(name, [*STRATEGIES, *MEASURED]))
        if name is not None and name != value and name in MEASURED:
            raise ValueError(f"{name} takes nothing behind a colon")
        return value

    @field_validator("fresh")
    @classmethod
    def _known_parts(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in PARTS:
                raise ValueError(_unknown(name, list(PARTS)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "InheritConfig":
        named = self.keep is not None
        if named and (self.layers is not None or self.strategy is not None):
            raise ValueError("keep names the layers already; set either it or layers and strategy, the others null")
        if not says_how_many(self.model_dump()):
            raise ValueError(
                "set either layers (how many) or keep (which), or a strategy that says how many: "
                f"{', '.join(DEPTHS)}, every:K"
            )
        if self.repeat and not named:
            raise ValueError("repeat lets keep name a layer twice; without keep it means nothing")
        if self.analysis is not None and not self.is_measured:
            raise ValueError(f"strategy {self.strategy or 'first'} is not measured; leave analysis out")
        sizes = [name for name in SIZES if getattr(self, name) is not None]
        if self.width is not None and sizes:
            raise ValueError(f"width: {self.width} says every size; leave {sizes[0]} out")
        if self.importance != "first" and not self.cuts_width:
            raise ValueError(
                "importance chooses heads and channels, but no size is to be cut; say which (hidden_size, ...)"
            )
        return self

    @property
    def is_measured(self) -> bool:
        """Whether the layers are chosen by an analysis."""
        return self.strategy in MEASURED

    @property
    def cuts_width(self) -> bool:
        """Whether heads or channels are cut."""
        return self.width is not None or any(getattr(self, name) is not None for name in SIZES)


def says_how_many(inherit: Mapping[str, Any]) -> bool:
    """Return whether a section, checked or not, says how many layers are kept: by width or parts alone it is all."""
    strategy = inherit.get("strategy")
    if inherit.get("layers") is not None or inherit.get("keep") is not None:
        return True
    if strategy is not None:
        return strategy in DEPTHS or str(strategy).startswith("every:")
    return bool(inherit.get("fresh")) or any(inherit.get(name) is not None for name in ("width", *SIZES))


def cleared_by(own: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Return the keys of a section that those that were just set in it, with the values in `own`, exclude."""
    cleared: list[str] = []
    depth = {"layers", "strategy"} & set(given)
    if "keep" in given and not depth:
        cleared += ["layers", "strategy", "analysis"]
    if depth and "keep" not in given:
        cleared += ["keep", "repeat"]
    named = isinstance(own.get("strategy"), str)  # else what it is is refused later
    if "strategy" in given and "layers" not in given and named and says_how_many({"strategy": own["strategy"]}):
        cleared += ["layers"]  # the number that another strategy was given
    sizes = [name for name in SIZES if name in given]
    if ("width" in given) != bool(sizes):
        cleared += ["width"] if sizes else SIZES
    return [name for name in cleared if name not in given]


def settle_inherit(inherit: dict[str, Any], given: list[str]) -> None:
    """Clear what the keys that were just set in a section exclude."""
    for name in cleared_by(inherit, given):
        if name in inherit:
            inherit[name] = False if name == "repeat" else None


def _unknown(name: str, known: list[str]) -> str:
    return f"{name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})"
