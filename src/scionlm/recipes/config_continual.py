"""The section of a recipe that says what a model knew before it goes on with other text."""

from pydantic import Field

from scionlm.core.config import Section


class UpstreamConfig(Section):
    """Text that the model was trained on before: evaluated beside what is trained on, to see what is forgotten."""

    dir: str | None = None
    """Its data folder, prepared with the same tokenizer; null is `data.dir`."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Which of its domains; null takes all, of `data.dir` those that no stage trains on."""
