"""A model run one layer at a time, each on every batch before the next one: what analysis looks at and plays with.

The model's own code runs every time, embedding, masks, positions, final norm and head included; only its layers are
made to pass on what they are given, but for one. So a layer can be looked at alone, left out, or fed anything, in every
family alike, and the weights of no more than one layer have to be in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.families import FamilySpec, ModelShape, family_of
from scionlm.families.models import assemble, layers_of
from scionlm.families.shape import expected_tensors
from scionlm.families.weights import Weights

Loader = Callable[[int], AbstractContextManager[None]]

# What the hidden states that go through a layer at once may take, with what is made of them on the way.
_BATCH_BYTES = 2**26


class Walk:
    """Runs parts of a model; a context manager, in which the model itself cannot be used otherwise.

    Args:
        model: In evaluation mode; it is left as it was.
        loader: Puts a layer's weights in place for a while, where they do not all stay (`streamed`).
    """

    def __init__(self, model: PreTrainedModel, loader: Loader | None = None) -> None:
        self.model = model
        config = model.config.to_dict()
        self.family: FamilySpec = family_of(config)
        self.shape = ModelShape.of(config)
        self._layers: list[nn.Module] = layers_of(model)
        self._loader = loader or (lambda index: nullcontext())
        self._index: int | None = None
        self._start: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._stack = ExitStack()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._layers)

    def __enter__(self) -> "Walk":
        for index, layer in enumerate(self._layers):
            own = vars(layer).get("forward")
            undo = partial(delattr, layer, "forward") if own is None else partial(setattr, layer, "forward", own)
            object.__setattr__(layer, "forward", partial(self._forward, index, layer.forward))
            self._stack.callback(undo)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _forward(self, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stand in for a layer: run it if it is the one asked for, else pass on."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and self._start is not None:
            hidden = self._start
        if index == self._index:
            kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            output = own(hidden, *args[1:], **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        if index == self.num_layers - 1:
            self._seen = hidden
        return hidden

    def _run(self, ids: torch.Tensor, index: int | None, start: torch.Tensor | None, head: bool) -> torch.Tensor:
        self._index, self._start = index, start
        try:
            called = self.model if head else self.model.base_model
            output = called(input_ids=ids.to(self.model.device), use_cache=False)
            seen = self._seen
            assert seen is not None
            return output.logits if head else seen
        finally:
            self._index = self._start = self._seen = None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the first layer reads, `[sequences, length, hidden]`."""
        return self._run(ids, None, None, head=False)

    def layer(self, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a layer makes of hidden states of the tokens `ids`; to be used inside `at(index)`."""
        return self._run(ids, index, hidden, head=False)

    def through(self, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return it for as many sequences as there are, some at a time."""
        return torch.cat([self.layer(index, ids[rows], hidden[rows]) for rows in self.batches(ids)])

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that final norm and head make of hidden states, `[sequences, length, vocab]`."""
        return self._run(ids, None, hidden, head=True)

    def at(self, index: int) -> AbstractContextManager[None]:
        """Put a layer's weights in place while the block runs."""
        return self._loader(index)

    def module(self, index: int) -> nn.Module:
        """Return a layer."""
        return self._layers[index]

    def batches(self, ids: torch.Tensor, channels: int | None = None) -> list[slice]:
        """Return slices of sequences of which each fits into memory at once; `channels` are those of what is made."""
        num_sequences, seq_len = ids.shape
        width = channels or max(self.shape.intermediate_size, self.shape.num_attention_heads * seq_len)
        size = max(1, _BATCH_BYTES // (4 * seq_len * width))
        return [slice(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]

    def losses(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return each sequence's mean next-token loss in nats, `[sequences]`, float64, if the model ended here."""
        parts: list[torch.Tensor] = []
        for rows in self.batches(ids, self.shape.vocab_size):
            logits = self.logits(ids[rows], hidden[rows])[:, :-1].float()
            labels = ids[rows, 1:].to(logits.device)
            nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            parts.append(nll.view_as(labels).double().mean(1).cpu())
        return torch.cat(parts)


def check_tokens(ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse tokens that nothing can be measured on.

    Raises:
        DataError: They are not `[sequences, length]`, of two tokens or more each, or beyond the vocabulary.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise DataError(f"tokens are {ids.dtype} {list(ids.shape)}, not token ids [sequences, length]")
    if ids.shape[1] < 2:
        raise DataError("sequences of one token have no attention to speak of and no next token to predict")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(f"tokens lie between {int(ids.min())} and {int(ids.max())}; the model has {vocab_size}")


def streamed(config: dict[str, Any], weights: Weights, dtype: torch.dtype, device: torch.device | str = "cpu") -> Walk:
    """Return a walk through a model of which only what is outside the layers is in memory, and one layer at a time.

    Args:
        config: The model's `config.json`.
        weights: Its tensors.
        dtype: Type to compute in.
        device: Where to compute.
    """
    family = family_of(config)
    places = list(expected_tensors(config))
    outside = {p.name: weights.rows(p.name, 0, p.shape[0]) for p in places if p.layer is None}
    model = assemble(config, outside, dtype)  # memory of the layers is reserved, and never touched
    model.requires_grad_(False)
    here = [parameter for name, parameter in model.named_parameters() if not name.startswith(f"{family.layers}.")]
    for tensor in (*here, *model.buffers()):
        tensor.data = tensor.data.to(device)
    layers = layers_of(model)

    @contextmanager
    def load(index: int) -> Iterator[None]:
        prefix = f"{family.layers}.{index}."
        empty = dict(layers[index].named_parameters())
        own = {
            place.name.removeprefix(prefix): weights.rows(place.name, 0, place.shape[0]).to(device, dtype)
            for place in places
            if place.layer == index
        }
        layers[index].load_state_dict(own, strict=False, assign=True)
        layers[index].requires_grad_(False)
        try:
            yield
        finally:
            layers[index].load_state_dict(empty, strict=False, assign=True)
            layers[index].requires_grad_(False)

    return Walk(model, load)
