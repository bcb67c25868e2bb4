"""The section of a recipe that says what is learned from a teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scionlm.core.config import Section
from scionlm.core.duration import Duration
from scionlm.core.quantities import Steps
from scionlm.schedules import Piece, Schedule

SOURCE = "source"
_Layer = Annotated[int, Field(strict=True)]


class HiddenConfig(Section):
    """Learning what layers give out, beside what the head does."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the error, which is added to the loss."""
    loss: Literal["mse", "cosine"] = "mse"
    """`mse`: squared difference over the teacher's squared length; `cosine`: one minus the cosine."""
    layers: Literal["next", "same", "uniform"] | Annotated[list[tuple[_Layer, _Layer]], Field(min_length=1)] = "next"
    """Which layer learns from which, where the teacher is what the layers were taken from: `next` gives each what the
    layer that now follows it used to read, `same` what itself gave out. `uniform` goes by relative depth, which is what
    the two others do with another teacher. Or pairs `[layer, teacher's layer]`."""


class DistillConfig(Section):
    """Learning from a teacher."""

    teacher: str = SOURCE
    """MODEL with the same tokenizer; `source` is the one that is inherited from."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the divergence in the loss; the rest is cross-entropy."""
    temperature: float = Field(default=2.0, gt=0, le=20)
    """Of both softmaxes in the divergence."""
    loss: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """The divergence: of the student from the teacher, of the teacher from the student, or of both from their mean."""
    top_k: int | None = Field(default=None, ge=1)
    """Tell only so many of the teacher's most likely tokens apart, and take all others as one; null tells all."""
    hidden: HiddenConfig | None = None
    """Learning what layers give out; null does not."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both weights move, by step of the run, down or up to `final_ratio`."""
    final_ratio: Annotated[float, Field(ge=0)] = 0.0
    """linear, cosine: multiplier of both weights at the end of the way. At 0 the teacher is no longer asked."""
    until: Steps | None = None
    """linear, cosine: length of the way, after which they stay; null is the whole run."""

    @model_validator(mode="after")
    def _consistent(self) -> "DistillConfig":
        if self.weight * max(self.final_ratio, 1.0) > 1:
            raise ValueError(f"weight {self.weight} times final_ratio {self.final_ratio} is a share beyond 1")
        if self.schedule == "constant" and (self.until is not None or self.final_ratio):
            raise ValueError("until and final_ratio are for schedule linear or cosine")
        return self

    @property
    def hidden_error(self) -> str | None:
        """How the error of hidden states is measured; None where they are not learned."""
        return self.hidden.loss if self.hidden else None

    def build_schedule(self, total_steps: int, tokens_per_step: int) -> Schedule:
        """Return the multiplier of both weights, by finished steps of the run.

        Raises:
            ValueError: The way is longer than the run, or shorter than a step.
        """
        if self.schedule == "constant":
            return Schedule((Piece("constant", "constant", total_steps, 1.0, 1.0),))
        way = total_steps if self.until is None else Duration.parse(self.until).in_steps(total_steps, tokens_per_step)
        if way < 1:
            raise ValueError(f"distill.until {self.until} is less than a step of {total_steps}")
        if way > total_steps:
            raise ValueError(f"distill.until {self.until} is longer than the run of {total_steps} steps")
        rest = Piece("constant", "constant", total_steps - way, self.final_ratio, self.final_ratio)
        return Schedule((Piece("decay", self.schedule, way, 1.0, self.final_ratio), rest))
