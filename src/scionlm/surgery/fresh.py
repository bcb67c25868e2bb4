"""Fresh weights: the family's own initialization, module by module, each from a seed of its own.

No tensor depends on which others are fresh, nor on their order, so a plan gives the same weights wherever it is carried
out.
"""

import hashlib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.families import family_of
from scionlm.sources.quiet import quiet_transformers


def empty_model(config: dict[str, Any], dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return a model whose weights are not set: memory is reserved, nothing is computed.

    Raises:
        DataError: transformers cannot make a model of this configuration.
    """
    from transformers.initialization import no_init_weights

    try:
        with quiet_transformers(), no_init_weights():
            hf_config = AutoConfig.for_model(**config)
            return AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            ).eval()
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise DataError(f"config.json: transformers refuses it: {' '.join(str(error).split())[:300]}") from error


def random_model(config: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model with the family's own random initialization from `seed`: the control of every inherited one."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, trust_remote_code=False
        ).eval()


class FreshTensors:
    """Fresh tensors of a model, by name.

    Args:
        config: The model's `config.json`.
        seed: Two models of one configuration and seed have the same fresh weights.
    """

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self._seed = seed
        self._layers = family_of(config).layers
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
