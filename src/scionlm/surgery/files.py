"""Checks of written files against their donors: tensor by tensor, a block of memory at a time."""

from collections.abc import Callable, Generator

import torch

from scionlm.families.weights import Weights
from scionlm.surgery.apply import blocks, whole
from scionlm.surgery.fresh import FreshTensors, lazy_fresh
from scionlm.surgery.operations import Operation
from scionlm.surgery.proof import Proof
from scionlm.surgery.surgery import Surgery

# Rows of each tensor that a sample looks at, less one.
_SAMPLED = 7


@torch.no_grad()
def check_files(surgery: Surgery, written: Weights, sample: bool = False) -> Proof:
    """Check written files against their donors, bitwise.

    Args:
        surgery: What was to be done.
        written: The target's tensors.
        sample: Look at the first, the last and some rows between of each tensor only.

    Raises:
        ScionError: A tensor is missing, too many, of another type, or differs; the message names it, and with it its
            layer.
    """
    proof = Proof()
    fresh = lazy_fresh(surgery.config, surgery.plan.seed)
    found = surgery.operations
    wrong = sorted({operation.place.name for operation in found} ^ written.names())
    proof.require("the files hold the tensors of the configuration and no others", not wrong, f"({wrong[:1]})")
    for operation in found:
        name = operation.place.name
        mine, theirs = written.dtype(name), surgery.dtype_of(operation)
        if mine != theirs:
            proof.require("every tensor keeps its type", holds=False, detail=f"({name}: {theirs}, now {mine})")
        if sample and operation.fill == "source":
            rows = sorted({number * (operation.num_rows - 1) // _SAMPLED for number in range(_SAMPLED + 1)})
            again = torch.cat([written.rows(name, row, row + 1) for row in rows])
            pieces = [(0, whole(operation.narrowed(rows), surgery.weights, fresh), again)]
        else:
            pieces = _pieces(operation, surgery.weights, fresh, written)
        for start, block, again in pieces:
            if not torch.equal(_bits(again), _bits(block.to(again.dtype))):
                proof.require("every tensor reads back as it should", holds=False, detail=f"({name}, from row {start})")
    what = "rows of all" if sample else "all"
    proof.checks.append(f"{what} {len(found)} tensors read back from the files equal their donors', bitwise")
    return proof


def _pieces(
    operation: Operation, donors: list[Weights], fresh: Callable[[], FreshTensors], written: Weights
) -> Generator[tuple[int, torch.Tensor, torch.Tensor], None, None]:
    start = 0
    for block in blocks(operation, donors, fresh):
        yield start, block, written.rows(operation.place.name, start, start + block.shape[0])
        start += block.shape[0]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
