"""AdamW, with weight decay on matrices only: not on norms, biases and embeddings."""

from typing import Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from scionlm.core.config import Section
from scionlm.families import family_of
from scionlm.families.shape import expected_tensors


class OptimizerConfig(Section):
    """The optimizer and its constants."""

    name: Literal["adamw"] = "adamw"
    """The algorithm."""
    lr: float = Field(default=3.0e-4, gt=0, lt=1)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a model's float32 weights: one group with decay, one without."""
    hf_config = model.config.to_dict()
    decayed = {
        name
        for name, spec, shape in expected_tensors(family_of(hf_config), hf_config)
        if len(shape) == 2 and spec.part != "embedding"
    }
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in decayed].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
