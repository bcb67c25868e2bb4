"""A model's tensors under the family's full names, checked against its configuration, read in blocks of rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from scionlm.core.errors import DataError
from scionlm.families.registry import family_of
from scionlm.families.shape import ModelShape, canonical_names, check_tensors
from scionlm.sources.folder import weight_map
from scionlm.sources.tensors import FolderTensors


class Weights(Protocol):
    """Something that gives rows of a model's tensors."""

    def names(self) -> set[str]:
        """Return the full names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor, in memory of their own."""
        ...


class FolderWeights:
    """The weights of a model folder.

    Raises:
        DataError: A tensor is unknown, missing or of another shape.
    """

    def __init__(self, config: dict[str, Any], tensors: FolderTensors, where: Path) -> None:
        family = family_of(config)
        self._tensors = tensors
        here = set(tensors.names())
        self._names = canonical_names(family, list(weight_map(where) or tensors.names()))
        shapes = {name: tensors.shape(own) if own in here else None for name, own in self._names.items()}
        check_tensors(config, shapes, str(where))
        embedding, head = family.one("embedding").name, family.one("head").name
        if shapes.get(head) and shapes.get(embedding) and ModelShape.of(config).tie_word_embeddings:
            self._require_copy(embedding, head, where)

    def _require_copy(self, embedding: str, head: str, where: Path) -> None:
        """Check that a tied model's head is the embedding; transformers would run it untied otherwise, in silence."""
        for row in range(0, self.shape(head)[0], max(1, self.shape(head)[0] // 64)):
            if not torch.equal(self.rows(head, row, row + 1), self.rows(embedding, row, row + 1)):
                raise DataError(
                    f"{where}: config.json says that embedding and head are one, but {self._names[head]} differs from "
                    f"{self._names[embedding]}; set tie_word_embeddings to false, or take the tensor out"
                )

    def names(self) -> set[str]:
        """Return the full names of all tensors."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type."""
        return self._tensors.dtype(self._names[name])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor."""
        return self._tensors.rows(self._names[name], start, stop)


class StateWeights:
    """The weights of a model in memory, from its state dict; they are copied, never shared.

    Raises:
        DataError: A tensor is unknown, missing or of another shape.
    """

    def __init__(self, config: dict[str, Any], state: Mapping[str, torch.Tensor], where: str = "the model") -> None:
        self._state = state
        check_tensors(config, {name: tuple(t.shape) for name, t in state.items()}, where)

    def names(self) -> set[str]:
        """Return the full names of all tensors."""
        return set(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._state[name].dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor."""
        return self._state[name].detach()[start:stop].clone()
