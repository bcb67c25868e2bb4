"""How weights should lie on the devices of a run, and how many sequences fit into a pass: from memory alone.

The rule: as few devices hold a copy between them as can. Copies exchange gradients once a step; shared weights are
gathered in every pass, twice. So: DDP where a device holds everything; else FSDP within machines and copies across them
(HSDP), since the lines within a machine are the fast ones; else FSDP over all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scionlm.core.errors import UsageError
from scionlm.core.log import format_bytes

Name = Literal["auto", "ddp", "fsdp", "hsdp"]

_USABLE = 0.85  # of a device's memory: allocators waste some, and estimates are estimates


@dataclass(frozen=True)
class Layout:
    """How weights lie on devices.

    Attributes:
        name: `single`, `ddp`, `fsdp` or `hsdp`.
        shards: Devices that hold one copy between them.
        replicas: Copies.
        why: The reason, in words.
    """

    name: str
    shards: int
    replicas: int
    why: str


def choose_layout(
    asked: Name, world: int, per_node: int, needed: Callable[[int], int], memory_bytes: int | None
) -> Layout:
    """Return how to lay out a run.

    Args:
        asked: What the recipe says.
        world: Devices.
        per_node: Devices of one machine.
        needed: Gives the bytes on each device by the number of devices that share one copy.
        memory_bytes: Of a device; None where it is not known.

    Raises:
        UsageError: HSDP is asked for where there is one machine, or machines are not alike.
    """
    nodes = world // per_node if per_node and world % per_node == 0 else 1
    if world == 1:
        return Layout("single", 1, 1, "one device")
    if asked == "hsdp" and (nodes < 2 or per_node < 2):
        raise UsageError(f"train.parallel hsdp needs several machines of several devices, not {nodes} of {per_node}")
    if asked != "auto":
        shards = {"ddp": 1, "fsdp": world, "hsdp": per_node}[asked]
        return Layout(asked, shards, world // shards, "asked for")
    whole = needed(1)
    if memory_bytes is None or whole <= _USABLE * memory_bytes:
        room = "" if memory_bytes is None else f" of {format_bytes(memory_bytes)}"
        return Layout("ddp", 1, world, f"a whole copy with its optimizer takes {format_bytes(whole)}{room} a device")
    much = f"a whole copy with its optimizer would take {format_bytes(whole)} of {format_bytes(memory_bytes)}"
    if nodes > 1 and per_node > 1 and needed(per_node) <= _USABLE * memory_bytes:
        why = f"{much}; shared out within a machine it takes {format_bytes(needed(per_node))}"
        return Layout("hsdp", per_node, nodes, why)
    return Layout("fsdp", world, 1, f"{much}; shared out over all devices {format_bytes(needed(world))}")


def fitting_rows(most: int, needed: Callable[[int], int], memory_bytes: int | None) -> list[int]:
    """Return the micro-batch sizes worth a try: powers of two, and `most`, that fit; 1 always.

    Args:
        most: Sequences that a device has in a step.
        needed: Gives the bytes on each device by the sequences in a pass.
        memory_bytes: Of a device; None where it is not known.
    """
    sizes = sorted({most, *(2**power for power in range(most.bit_length()))})
    return [rows for rows in sizes if rows == 1 or memory_bytes is None or needed(rows) <= _USABLE * memory_bytes]
