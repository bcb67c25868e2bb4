"""Where the units that width surgery cuts can be seen while a model runs: at the inputs of its projections.

    hidden   input of query and of up projection: what attention and MLP read of the residual stream
    heads    input of the attention's output projection
    ffn      input of the MLP's output projection

Where these modules are is the family's data. Attention and MLP that read one norm side by side are one point.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.families import family_of
from scionlm.families.shape import ModelShape

_READERS = {"attention_norm": ("query", "qkv"), "mlp_norm": ("up", "gate_up")}

Kind = Literal["hidden", "heads", "ffn"]
See = Callable[["Point", torch.Tensor], None]


@dataclass(frozen=True)
class Point:
    """A place in a model where units of one kind are seen.

    Attributes:
        kind: What the units are.
        layer: Index of the layer.
        module: Full path of the module whose input is looked at.
        is_normed: Whether a norm stands between the residual stream and the module.
    """

    kind: Kind
    layer: int
    module: str
    is_normed: bool


def hook_points(config: dict[str, Any]) -> list[Point]:
    """Return a model's points, layer by layer.

    Differs: Minitron looks at the outputs of the norms. Where norms stand in front, what attention and MLP read is just
        that, and norms behind them (Gemma) are passed over: these see what is added to the stream, not the stream.
        OLMo 2 and 3 have norms behind only; there it is the residual stream itself.
    """
    family = family_of(config)
    specs = [spec for spec in family.layer if family.has(spec, config)]
    places: list[tuple[Kind, str, bool]] = []
    for norm, readers in _READERS.items():
        at = next(index for index, spec in enumerate(specs) if spec.role in readers)
        in_front = any(spec.role == norm for spec in specs[:at])
        behind = any(spec.role == norm for spec in specs[at:])
        if in_front or behind:
            places.append(("hidden", specs[at].module, in_front))
    module_of = {spec.role: spec.module for spec in specs}
    places.append(("heads", module_of["attention_output"], True))
    places.append(("ffn", module_of["mlp_output"], True))
    return [
        Point(kind, layer, f"{family.layers}.{layer}.{module}", is_normed)
        for layer in range(ModelShape.of(config).num_hidden_layers)
        for kind, module, is_normed in places
    ]


@contextmanager
def watched(model: PreTrainedModel, points: list[Point], see: See) -> Iterator[ExitStack]:
    """Show `see` what is read at each point, with the model in evaluation mode; whatever happens, undo both at the end.

    Yields:
        The stack of what is to be undone, for more of it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if module.training:
                module.training = False  # set one by one: some may be, some not
                stack.callback(setattr, module, "training", True)
        for point in points:
            handle = model.get_submodule(point.module).register_forward_pre_hook(partial(_show, point, see))
            stack.callback(handle.remove)
        yield stack


def _show(point: Point, see: See, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    see(point, args[0])
