"""What gates act on: rows of units, of which each row keeps the same number."""

from dataclasses import dataclass
from typing import Literal

from scionlm.families import ModelShape

Name = Literal["layers", "attention", "mlp", "hidden", "groups", "heads", "ffn"]
Depth = Literal["layers", "blocks"]


@dataclass(frozen=True)
class Axis:
    """The gates of one kind.

    Attributes:
        name: `layers` (or of their `attention` and `mlp` apart), `hidden` channels of the residual stream, `groups` of
            query heads with their key/value head, `heads` inside each group, `ffn` channels of each MLP.
        rows: Rows that are chosen from apart: one, one a layer, or one a group.
        units: Gates in a row.
        target: How many of a row stay.
    """

    name: Name
    rows: int
    units: int
    target: int

    @property
    def sparsity(self) -> float:
        """Share of the units that go."""
        return 1 - self.target / self.units


def axes_of(source: ModelShape, target: ModelShape, depth: Depth = "layers") -> list[Axis]:
    """Return the gates that make one shape out of another; none on what keeps its size.

    Args:
        source: The shape that is pruned.
        target: The shape that is to be left. Each of its key/value heads has as many query heads as any other.
        depth: Whether layers have one gate, or one each on attention and MLP.

    Differs: Sheared LLaMA also has gates where nothing is to go. It has none on key/value heads, since its source has
        as many of them as query heads; there a group is one head with its key and value, which is the same.
    """
    layers, groups = source.num_hidden_layers, source.num_key_value_heads
    inside, kept_inside = (shape.num_attention_heads // shape.num_key_value_heads for shape in (source, target))
    deep: tuple[Name, ...] = ("layers",) if depth == "layers" else ("attention", "mlp")
    found = [
        *(Axis(name, 1, layers, target.num_hidden_layers) for name in deep),
        Axis("hidden", 1, source.hidden_size, target.hidden_size),
        Axis("groups", layers, groups, target.num_key_value_heads),
        Axis("heads", layers * groups, inside, kept_inside),
        Axis("ffn", layers, source.intermediate_size, target.intermediate_size),
    ]
    return [axis for axis in found if axis.target < axis.units]
