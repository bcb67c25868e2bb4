"""Losses between what the layers of student and teacher give out."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.families import family_of

Name = Literal["mse", "cosine"]

_SHORT = 1e-3  # a state shorter than this counts as of this length: its direction means nothing


class States(NamedTuple):
    """What a model makes of a batch before its head.

    Attributes:
        last: Its last hidden states, `[sequences, length, hidden]`.
        layers: What some of its layers give out, likewise, by layer.
    """

    last: torch.Tensor
    layers: Mapping[int, torch.Tensor]


def hidden_error(name: Name, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return how far hidden states are from the teacher's, for each token, float32.

    `mse` is the squared difference over the teacher's squared length, so that the few tokens with giant states (the
    first of a sequence above all; Sun et al., arXiv:2402.17762) count no more than others. `cosine` is one minus the
    cosine. Both are 0 where the two are equal; 1 is `mse` where the student gives nothing, `cosine` at right angles.

    Args:
        name: Which.
        student: `[..., hidden]`.
        teacher: Likewise, as wide.
    """
    mine, theirs = student.to(torch.float32), teacher.to(torch.float32)
    if name == "cosine":
        return 1 - nn.functional.cosine_similarity(mine, theirs, dim=-1, eps=_SHORT)
    return (mine - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=_SHORT**2)


class LayerOutputs:
    """Keeps what some layers of a model give out in a forward pass, as it stands in the residual stream.

    Args:
        model: The model; hooks stay on it until `close`.
        layers: Indices of its layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        modules = list(model.get_submodule(family_of(model.config.to_dict()).layers).children())
        self._seen: dict[int, torch.Tensor] = {}
        self._handles = [modules[index].register_forward_hook(self._keeper(index)) for index in layers]

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self._seen[index] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> Mapping[int, torch.Tensor]:
        """Return the outputs by layer, and keep them no longer."""
        seen = dict(self._seen)
        self._seen.clear()
        return seen

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
