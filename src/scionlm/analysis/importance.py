"""How much each head, channel and layer matters, from one pass over calibration text.

The arrays are what `surgery.width` takes; higher is more important:

    hidden   [hidden_size]
    heads    [num_layers, num_attention_heads]
    ffn      [num_layers, intermediate_size]
    layers   [num_layers], of activations only

`analysis.magnitude` gives the first three from the weights alone. Legend: B sequences, T positions, C channels,
K heads, H head_dim.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from scionlm.analysis.points import Point, hook_points, watched
from scionlm.core.errors import BrokenModelError, DataError
from scionlm.families import ModelShape, family_of
from scionlm.families.models import layers_of

Scores = dict[str, NDArray[np.float64]]
OnProgress = Callable[[int], None]

_IGNORE = -100


class _Sums:
    """Running float64 sums over sequences, kept on the device of what is added; the host never waits for them.

    `num_sequences` is the batch's: some families flatten it into the positions before their MLP.
    """

    def __init__(self) -> None:
        self.num_sequences = 0
        self._sums: dict[Point | int, torch.Tensor] = {}

    def split(self, x: torch.Tensor, num_heads: int | None = None) -> torch.Tensor:
        """Return what a point reads as `[B, T, C]`, or as `[B, T, K, H]`."""
        x = x.reshape(self.num_sequences, -1, x.shape[-1])
        return x if num_heads is None else x.unflatten(-1, (num_heads, -1))

    def add(self, key: Point | int, values: torch.Tensor) -> None:
        """Add what a batch's sequences give, one row each."""
        total = values.double().sum(0)
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    def of(self, keys: Iterable[Point | int]) -> NDArray[np.float64]:
        """Return the sums of some keys, a row each."""
        return torch.stack([self._sums[key].cpu() for key in keys]).numpy()


class ActivationSums(_Sums):
    """How large the activations of heads and channels are, collected as a model runs (`points.watched`)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads

    def see(self, point: Point, x: torch.Tensor) -> None:
        """Take in what a point reads."""
        x = self.split(x, self._num_heads if point.kind == "heads" else None)
        if point.kind == "heads":
            sizes = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        else:
            sizes = x.abs() if point.is_normed else _per_root_mean_square(x).abs()
        self.add(point, sizes.mean(1, dtype=torch.float32).double().square())

    def scores(self, points: list[Point]) -> Scores:
        """Return the scores of `heads`, `ffn` and `hidden`.

        Raises:
            BrokenModelError: One is not finite.
        """
        found = {kind: np.sqrt(self.of(p for p in points if p.kind == kind)) for kind in ("heads", "ffn", "hidden")}
        return finite(found | {"hidden": found["hidden"].sum(0)})


def activation_scores(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], on_progress: OnProgress | None = None
) -> Scores:
    """Return how large the activations of heads and channels are, and how far each layer turns the residual stream.

    A head: the L2 norm over head_dim of its attention output. An FFN channel: what enters the MLP's output projection.
    A channel of the residual stream: what attention and MLP read of it, summed over layers. Each as the mean of
    absolute values over a sequence, then the L2 norm over sequences, however these are divided into batches.
    A layer: 1 - mean cosine similarity of its input and output over all tokens, in [0, 2]; 0 does nothing.

    Args:
        model: On any device, in float32 or bfloat16; it is left as it was.
        batches: Token ids `[sequences, length]` without padding; read once, one at a time.
        on_progress: Told the number of tokens done.

    Raises:
        DataError: There are no batches, one is not of that form, or a score is not finite.

    Source: Muralidharan et al. 2024 (Minitron), section 2.2, arXiv:2407.14679; layers: Men et al. 2024 (ShortGPT),
        Block Influence, arXiv:2403.03853.
    Differs: Minitron writes an FFN channel as X W1; in a gated MLP this takes the product of gate and up, which is what
        a cut removes. Where norms stand only behind attention and MLP (OLMo 2 and 3), the residual stream they read is
        divided by its root mean square first, else its growth with depth would leave the say to the last layers.
        Cosines are taken in float32 whatever the model's type; a vector of zeros is like nothing.
    """
    config = model.config.to_dict()
    points, num_tokens = hook_points(config), 0
    sums = ActivationSums(ModelShape.of(config).num_attention_heads)

    def compare(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        sums.add(index, functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten())

    with torch.no_grad(), watched(model, points, sums.see) as stack:
        for index, layer in enumerate(layers_of(model)):
            stack.callback(layer.register_forward_hook(partial(compare, index), with_kwargs=True).remove)
        for ids in _each(batches, model, on_progress):
            sums.num_sequences = len(ids)
            model.base_model(input_ids=ids, use_cache=False)  # no logits: no score needs them
            num_tokens += ids.numel()
    influence = 1.0 - sums.of(range(len(layers_of(model)))) / num_tokens
    return sums.scores(points) | finite({"layers": influence})


def _per_root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], eps=torch.finfo(torch.float32).tiny)


def taylor_scores(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], on_progress: OnProgress | None = None
) -> Scores:
    """Return how much the loss would change without each head or channel, to first order.

    For a sequence: |sum of activation times gradient over its positions and the unit's channels|, where the loss is its
    mean next-token cross-entropy in nats; summed over sequences, and for `hidden` over layers. Activations are those of
    `activation_scores`. No weight gets a gradient; the graph starts behind the embedding.

    Args:
        model: On any device, in float32 or bfloat16; it is left as it was.
        batches: Token ids `[sequences, length]` without padding, two tokens or more; read once, one at a time.
        on_progress: Told the number of tokens done.

    Raises:
        DataError: There are no batches, one is not of that form, or a score is not finite.

    Source: Molchanov et al. 2019, arXiv:1906.10771; cf. Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627.
    Differs: Both expand the loss in weights. Over the weights that read a unit that is the same number, and needs no
        weight gradients this way. Molchanov et al. square where this takes absolute values. Where attention and MLP
        read the residual stream without a norm (OLMo 2 and 3), its gradient also counts what goes on to later layers.
    """
    config = model.config.to_dict()
    num_heads = ModelShape.of(config).num_attention_heads
    points, sums = hook_points(config), _Sums()

    def see(point: Point, x: torch.Tensor) -> None:
        kept = x.detach()

        def on_gradient(gradient: torch.Tensor) -> None:
            if point.kind == "heads":
                change = sums.split(kept.float() * gradient.float(), num_heads).sum((1, 3))
            else:
                change = sums.split(kept.float() * gradient.float()).sum(1)
            sums.add(point, change.abs())

        x.register_hook(on_gradient)

    # Batches may come from, and the caller may be in, a place where nothing is differentiated.
    with torch.inference_mode(False), torch.enable_grad(), watched(model, points, see) as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        embedding = model.get_submodule(family_of(config).one("embedding").module)
        stack.callback(embedding.register_forward_hook(_start_graph).remove)
        for ids in _each(batches, model, on_progress):
            if ids.shape[1] < 2:
                raise DataError("a calibration batch has sequences of one token: there is no next one to predict")
            sums.num_sequences = len(ids)
            _sum_of_mean_losses(model, ids).backward()
    scores = {kind: sums.of(point for point in points if point.kind == kind) for kind in ("heads", "ffn", "hidden")}
    return finite(scores | {"hidden": scores["hidden"].sum(0)})


def _start_graph(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_()


def _sum_of_mean_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the sum over sequences of their mean losses, so that each one's gradient is the same in any batch."""
    logits = model(input_ids=ids, use_cache=False).logits
    labels = functional.pad(ids[:, 1:], (0, 1), value=_IGNORE)
    nll_sum = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    return nll_sum / (ids.shape[1] - 1)


def _each(
    batches: Iterable[torch.Tensor], model: PreTrainedModel, on_progress: OnProgress | None
) -> Iterator[torch.Tensor]:
    """Yield batches on the model's device, and say how far the work is once each is done with."""
    num_tokens = 0
    for batch in batches:
        if batch.ndim != 2 or batch.numel() == 0 or batch.is_floating_point():
            raise DataError(
                f"a calibration batch is {batch.dtype} {list(batch.shape)}, not token ids [sequences, length]"
            )
        yield batch.to(model.device)
        num_tokens += batch.numel()
        if on_progress is not None:
            on_progress(num_tokens)
    if num_tokens == 0:
        raise DataError("importance needs calibration text, but there are no batches")


def finite(scores: Scores) -> Scores:
    """Return scores, checked.

    Raises:
        BrokenModelError: One is not finite.
    """
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise BrokenModelError(f"scores of {name} are not finite: the model's weights or activations are broken")
    return scores
