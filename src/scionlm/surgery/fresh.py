"""Fresh weights: the family's own initialization, module by module, each from a seed of its own.

No tensor depends on which others are fresh, nor on their order, so a plan gives the same weights wherever it is carried
out.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from scionlm.families import family_of


class FreshTensors:
    """Fresh tensors of a model, by name.

    Args:
        config: The model's `config.json`.
        seed: Two models of one configuration and seed have the same fresh weights.
    """

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self._seed = seed
        self._layers = family_of(config).layers
        from scionlm.families.models import empty_model  # and with it transformers: only where something is fresh

        with torch.device("meta"):
            self._model: Any = empty_model(config, torch.float32)
        self._made: dict[str, torch.Tensor] = {}
        self._at = ""

    @torch.no_grad()
    def get(self, name: str) -> torch.Tensor:
        """Return a fresh float32 tensor."""
        owner = name.rpartition(".")[0]
        if name.startswith(self._layers):  # a whole layer: some initializations look at the module above a weight
            owner = ".".join(name.split(".")[: self._layers.count(".") + 2])
        if owner != self._at:
            module = self._model.get_submodule(owner).to_empty(device="cpu")
            digest = hashlib.sha256(f"{self._seed} {owner}".encode()).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest[:7]))
                module.apply(self._model._init_weights)
            self._made = {f"{owner}.{inner}": tensor.clone() for inner, tensor in module.named_parameters()}
            module.to_empty(device="meta")
            self._at = owner
        return self._made[name]


def lazy_fresh(config: dict[str, Any], seed: int) -> Callable[[], FreshTensors]:
    """Return a function that makes the fresh tensors of a configuration on its first call."""
    made: list[FreshTensors] = []

    def get() -> FreshTensors:
        if not made:
            made.append(FreshTensors(config, seed))
        return made[0]

    return get
