"""Carry out operations: read what is needed of each tensor, cut it, hand it on in blocks of rows.

Memory holds a block at a time, so the size of the model does not matter. The same blocks go to files
(`surgery.write`) and into models in memory.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from scionlm.families.weights import Weights
from scionlm.surgery.fresh import FreshTensors
from scionlm.surgery.operations import Index, Operation, Scale

# Below 32 MiB, from where on glibc maps fresh, unfaulted pages for every buffer.
BLOCK_BYTES = 24 * 2**20


def blocks(operation: Operation, donors: list[Weights], fresh: Callable[[], FreshTensors]) -> Iterator[torch.Tensor]:
    """Yield the tensor that an operation makes as consecutive blocks of rows, in the donor's type.

    Fresh and scaled tensors come in float32; who stores them rounds.

    Args:
        operation: What to make.
        donors: The donors' tensors.
        fresh: Gives fresh tensors; called only when there are any.
    """
    if operation.fill == "zero":
        yield torch.zeros(operation.place.shape)
        return
    if operation.fill == "random":
        tensor = fresh().get(operation.place.name)
        if operation.padding:
            tensor[operation.num_rows :] = tensor[: operation.num_rows].mean(0)
        yield tensor
        return
    reader, name = donors[operation.donor], operation.source
    shape = reader.shape(name)
    rows = operation.index[0]
    number = shape[0] if rows is None else len(rows)
    width = max(1, torch.Size(shape[1:]).numel() * reader.dtype(name).itemsize)
    step = max(1, BLOCK_BYTES // width)
    total: torch.Tensor | None = None
    dtype = reader.dtype(name)
    for start in range(0, number, step):
        stop = min(start + step, number)
        block = reader.rows(name, start, stop) if rows is None else _selected(reader, name, rows[start:stop])
        for axis, index in enumerate(operation.index[1:], start=1):
            if index is not None:
                block = _select(block, axis, index)
        if operation.scale is not None:
            block = _scaled(block, operation.scale, start)
        if operation.padding:
            part = block.double().sum(0, keepdim=True)
            total = part if total is None else total + part
        yield block
    if operation.padding:
        # The mean of rows gives the mean of their logits, which is never the largest of them.
        assert total is not None
        yield (total / number).to(dtype).repeat(operation.padding, *[1] * (len(shape) - 1))


def _selected(reader: Weights, name: str, rows: Index) -> torch.Tensor:
    """Return some rows of a tensor, reading runs of neighbours at once and skipping what lies between them."""
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 2 * len(rows):  # dense: one read and a choice
        return _select(reader.rows(name, first, last), 0, rows - first)
    breaks = [0, *((rows[1:] != rows[:-1] + 1).nonzero()[0] + 1).tolist(), len(rows)]
    pieces = [reader.rows(name, int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(breaks)]
    return torch.cat(pieces)


def _select(block: torch.Tensor, axis: int, index: Index) -> torch.Tensor:
    first, number = int(index[0]), len(index)
    if int(index[-1]) - first + 1 == number and bool((index[1:] == index[:-1] + 1).all()):
        return block.narrow(axis, first, number).contiguous()
    return block.index_select(axis, torch.from_numpy(index))


def _scaled(block: torch.Tensor, scale: Scale, first_row: int) -> torch.Tensor:
    wide = block.double()
    if scale.axis == 0:
        stop = None if scale.stop is None else max(0, scale.stop - first_row)
        part = wide[max(0, scale.start - first_row) : stop]
    else:
        part = wide.narrow(scale.axis, scale.start, (scale.stop or wide.shape[scale.axis]) - scale.start)
    part.add_(scale.offset).mul_(scale.factor).sub_(scale.offset)
    return wide if block.dtype == torch.float64 else wide.float()


def whole(operation: Operation, donors: list[Weights], fresh: Callable[[], FreshTensors]) -> torch.Tensor:
    """Return the tensor that an operation makes, in memory of its own."""
    parts = list(blocks(operation, donors, fresh))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
