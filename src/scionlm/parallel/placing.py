"""Where weights lie: whole on every device, or shared out over some of them.

`Runtime.shards` devices hold one copy between them. One: each has its own, and DDP averages gradients. All: FSDP2.
Fewer than all: HSDP, FSDP2 within groups of neighbours and averages across them. The main rank alone has to have the
true weights; the others get theirs from it, so that no model is read, cut or drawn more than once.
"""

import contextlib
import gc
import warnings
from collections.abc import Generator, Iterable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.parallel.runtime import Runtime


@cache
def mesh_of(kind: str, world: int, shards: int) -> DeviceMesh:
    """Return the devices of a run: `[shards]`, or `[replicas, shards]` where there are several copies."""
    if shards == world:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def lies_in_parts(model: nn.Module) -> bool:
    """Return whether devices hold parts of a model: then every pass needs all of them, each as often as the others."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def place(
    root: nn.Module,
    units: Sequence[nn.Module],
    runtime: Runtime,
    compute_dtype: torch.dtype | None = None,
    methods: Sequence[str] = (),
    stays: bool = False,
) -> None:
    """Put a module on its devices, in place; where weights are shared out, each rank gets its part of the main rank's.

    Args:
        root: The module that is called.
        units: Parts of it that are gathered one at a time, as they are called: the layers.
        runtime: The devices.
        compute_dtype: What shared weights are gathered in; None leaves their own type. Gradients add up in float32.
        methods: Names of the root's methods, beside `forward`, that use its weights.
        stays: Once called, the root keeps what it holds itself gathered: for frozen weights that are used afterwards.
    """
    if runtime.shards == 1:
        root.to(runtime.device)
        return
    whole = {name: p.detach() for name, p in root.named_parameters()}
    mesh = mesh_of(runtime.kind, runtime.ranks.world, runtime.shards)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=not stays)
    for name in methods:
        register_fsdp_forward_method(root, name)
    for name, parameter in root.named_parameters():
        shard = cast("DTensor", parameter)
        true = whole.pop(name)
        full = true.to(runtime.device) if runtime.ranks.is_main else torch.empty_like(true, device=runtime.device)
        dealt = distribute_tensor(full, shard.device_mesh, shard.placements)
        with torch.no_grad():
            shard.to_local().copy_(dealt.to_local())


def release(module: nn.Module) -> None:
    """Give a module's memory back now: the next one needs it."""
    module.to("meta")  # what holds the module, and be it the module itself, holds nothing of size any more
    gc.collect()


def whole_weights(model: nn.Module, runtime: Runtime) -> dict[str, torch.Tensor]:
    """Return the weights in one piece, on the CPU; all ranks have to ask, the main one gets them."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if runtime.ranks.is_main:
            found[name] = full.cpu()
    return found


class Trained:
    """A module as it is trained: its gradients become means over all ranks.

    Args:
        module: The module, placed.
        runtime: The devices; None is one of them, whichever.
    """

    def __init__(self, module: nn.Module, runtime: Runtime | None = None) -> None:
        self.ranks = runtime.ranks if runtime else ALONE
        self._replicated: DistributedDataParallel | None = None
        self._module = module
        if runtime and self.ranks.world > 1 and runtime.shards == 1:
            # Projections have no gradient while a teacher is not asked.
            beside = any(name.startswith("distillation.") for name, _ in module.named_parameters())
            with warnings.catch_warnings():  # of another name for `broadcast_buffers`, which torch 2.11 does not know
                warnings.simplefilter("ignore", FutureWarning)
                self._replicated = DistributedDataParallel(
                    module, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=beside
                )

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Call the module."""
        return (self._replicated or self._module)(*arguments)

    @contextlib.contextmanager
    def passing(self, last: bool) -> Generator[None, None, None]:
        """Make one pass of a step; copies exchange gradients in its `last` one, shared weights in each."""
        with contextlib.nullcontext() if last or self._replicated is None else self._replicated.no_sync():
            yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the norm of the gradients over all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def on_processor(tensor: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Return a copy of a tensor in the processor's memory, shared out as it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True).contiguous()
    mesh = mesh_of("cpu", runtime.ranks.world, runtime.shards)
    local = cast("DTensor", tensor.detach()).to_local().to("cpu", copy=True)
    return DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Make the gradients of parameters that every rank holds whole the mean over all ranks; a missing one is zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.world > 1:
        flat = torch.cat([cast("torch.Tensor", parameter.grad).flatten() for parameter in parameters])
        dist.all_reduce(flat)
        flat /= ranks.world
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)
