"""The sections of a recipe that make rounds of it: the reference that is to be matched, and how the child grows."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from scionlm.core.config import Mapping, Section
from scionlm.core.quantities import Count
from scionlm.recipes.model_shapes import read_model
from scionlm.surgery.depth import GrowthInit


class ReferenceConfig(Section):
    """A model that is trained from scratch first and is the source of what follows, on the same text."""

    model: Mapping
    """A known model, or a configuration by transformers' keys, as `model` of recipe scratch."""
    data: Mapping | None = None
    """Keys of `data` that differ: what the model is to know before."""
    train: Mapping | None = None
    """Keys of `train` that differ from the child's: its own budget above all."""
    optimizer: Mapping | None = None
    """Keys of `optimizer` that differ."""
    schedule: Mapping | None = None
    """Keys of `schedule` that differ."""

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, value: Any) -> Any:
        return read_model(value)

    @model_serializer(mode="wrap")
    def _what_was_set(self, serialize: SerializerFunctionWrapHandler) -> Mapping:
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}


class GrowConfig(Section):
    """Rounds of training, each of a deeper child, until the source's held-out loss is matched.

    Source: Sanyal et al., arXiv:2404.08634, algorithm 1.
    Differs: What the paper leaves open is a choice here (docs/decisions/0012-inheritune.md).
    """

    model_config = ConfigDict(validate_by_name=False, serialize_by_alias=True)

    base: Literal["source", "student"] = Field(default="source", alias="from")
    """What a further round begins with: the `source`'s layers alone, anew; or the trained `student` and more layers."""
    init: GrowthInit = "source_next"
    """What the added layers are: the source's next ones, copies of the child's (`stack`), `random` ones, or ones that
    pass their input on (`zero_output`)."""
    by: int = Field(default=2, ge=1)
    """Layers that are added in a round."""
    max_layers: int | None = Field(default=None, ge=1)
    """Most layers; null is as many as the source has."""
    max_rounds: int | None = Field(default=None, ge=1)
    """Most rounds, the first included."""
    max_tokens: Count | None = None
    """Most tokens over all rounds: a round that would go beyond is not begun."""
    until: Literal["matched", "end"] = "matched"
    """`matched` stops with the first round that matches the source; `end` goes on to the last, whatever the losses."""
    tolerance: float = Field(default=0.0, ge=0)
    """How far above the source's loss still counts as a match, nats."""
    criterion: Literal["mean", "upper"] = "mean"
    """What has to be within the tolerance: the `mean` difference, or the `upper` end of its confidence interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the interval."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """from: student: whether layers that were trained keep the optimizer's state; new ones have none."""
    tokens_per_domain: Count | None = None
    """Held-out tokens of each domain that decide; null is all of them."""
