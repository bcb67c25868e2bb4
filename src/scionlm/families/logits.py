"""What a model does to the product of its last hidden states and its head before it calls it logits."""

from dataclasses import dataclass
from typing import Any

from scionlm.core.errors import DataError
from scionlm.families.registry import family_of

CHUNK_BYTES = 192 * 2**20
"""Of the logits that are worked on at once: matrix products over fewer rows lose speed."""
BLOCK_BYTES = 2**22
"""Of those, in float32, what is worked on at once between the products: what a processor's cache holds."""


@dataclass(frozen=True)
class LogitScaling:
    """`cap * tanh(scale * z / cap)` of the product z, or `scale * z` without a cap.

    Attributes:
        scale: What it is multiplied by.
        cap: What it is softly kept below, either way.
    """

    scale: float = 1.0
    cap: float | None = None


def logit_scaling(config: dict[str, Any]) -> LogitScaling:
    """Return how a model with this `config.json` scales its logits.

    Raises:
        DataError: A factor is not a positive number.
    """
    family = family_of(config)

    def factor(key: str | None) -> float | None:
        value = config.get(key, family.defaults.get(key)) if key else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise DataError(f"config.json: {key} is {value!r}, but must be a positive number")
        return value

    return LogitScaling(
        (factor(family.logits_multiplied_by) or 1.0) / (factor(family.logits_divided_by) or 1.0),
        factor(family.logits_capped_at),
    )
