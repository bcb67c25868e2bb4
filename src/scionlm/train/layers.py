"""The layers' passes one by one: weights cast on the way into each, activations kept or made again, compiled apart.

Several devices exchange weights or gradients layer by layer, while others compute; one graph of the whole model would
leave nothing to do meanwhile. And what a layer makes again on the way back has to begin with the cast of its weights.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import scionlm.train.attention  # noqa: F401 - makes the operator that is kept, too

Checkpointing = Literal["none", "selective", "full"]

# What `selective` keeps: products and attention, which are most of the work; the rest is cheap to make again.
_KEPT = (
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


def layerwise(layers: Sequence[nn.Module], dtype: torch.dtype | None, checkpointing: Checkpointing) -> None:
    """Give layers passes of their own, in place.

    Args:
        layers: The layers.
        dtype: What their weights are cast to; None leaves them as they come.
        checkpointing: What of their activations is not kept but made again on the way back (Chen et al.,
            arXiv:1604.06174): nothing, all but matrix products and attention, or all.
    """
    for layer in layers:
        run = layer.forward if dtype is None else _casting(layer, dtype)
        layer.forward = run if checkpointing == "none" else _again(run, checkpointing)


def compile_layers(layers: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    """Compile the pass of each layer; what is hooked onto it stays outside."""
    # DDP would have graphs cut where its buckets end; those of layers are short enough to exchange gradients between.
    torch._dynamo.config.optimize_ddp = False
    # The compiler looks at the gradient of what comes in, which has none, and warns of that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, *args, **kwargs)


class _Bare(nn.Module):
    """A layer's own forward pass, without what is hooked onto the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self._forward = layer, layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _casting(layer: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    bare = _Bare(layer)

    def run(*args: Any, **kwargs: Any) -> Any:
        weights = {f"layer.{name}": p.to(dtype) for name, p in layer.named_parameters()}
        return functional_call(bare, weights, args, kwargs)

    return run


def _again(run: Callable[..., Any], checkpointing: Checkpointing) -> Callable[..., Any]:
    contexts = {}
    if checkpointing == "selective":
        found = [getattr(torch.ops.aten, name, None) for name in _KEPT]
        kept = {packet.default for packet in (*found, torch.ops.scionlm.causal_attention) if packet}

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, policy)}

    def pass_again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, **contexts, **kwargs)

    return pass_again
