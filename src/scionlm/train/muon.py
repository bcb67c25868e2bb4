"""Muon for matrices that are shared out over devices.

An update needs the whole matrix: it is gathered once, made orthogonal on every device, and each keeps its own part.
torch's Muon on shared matrices gathers anew for each of the products inside.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class SharedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, with its state, for `DTensor` parameters."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the matrices from their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(cast("DTensor", parameter), group)

    def _update(self, matrix: DTensor, group: dict[str, float]) -> None:
        gradient, state = cast("DTensor", matrix.grad), self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        # torch's own step from zero, without momentum and decay: what it comes to is what is to be added.
        whole = cast("DTensor", ahead).full_tensor()
        step = nn.Parameter(torch.zeros_like(whole))
        step.grad = whole
        names = ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        one = {name: group[name] for name in names}
        torch.optim.Muon([step], lr=group["lr"], weight_decay=0.0, momentum=0.0, nesterov=False, **one).step()  # pyright: ignore[reportArgumentType]
        mine = distribute_tensor(step.detach(), matrix.device_mesh, matrix.placements, src_data_rank=None)
        local = matrix.to_local()
        local.mul_(1 - group["lr"] * group["weight_decay"]).add_(mine.to_local())
