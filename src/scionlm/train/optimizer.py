"""AdamW, with weight decay on matrices only: not on norms, biases and embeddings."""

import torch
from transformers import PreTrainedModel

from scionlm.families import family_of
from scionlm.families.shape import expected_tensors


def build_optimizer(
    model: PreTrainedModel,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """Return the optimizer of a model's float32 weights: one group with decay, one without.

    Args:
        model: The model.
        lr: Peak learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of the matrices.
    """
    hf_config = model.config.to_dict()
    decayed = {
        place.name
        for place in expected_tensors(family_of(hf_config), hf_config)
        if len(place.shape) == 2 and place.spec.role not in ("embedding", "position")
    }
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in decayed].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,
    )
