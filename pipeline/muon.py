"""Muon (Jordan et al. 2024; arXiv:2502.16982), all matrices of one shape orthogonalised by the same products."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.symmetric import symmetric_product

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration whose slope at zero is steepest."""
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAMW = 0.2
"""The usual size of an element of AdamW's update: scaled to it, Muon takes AdamW's learning rate and weight decay."""


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised. Equals torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, only faster.

    A `found_inf` of 1 (float32, 0-dim) makes a step change neither weights nor momentum, and nobody waits to know.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del closure
        for group in self.param_groups:
            for parameters in _by_shape(p for p in group["params"] if p.grad is not None):
                self._step_together(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _step_together(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        buffers = [self._buffer(parameter) for parameter in parameters]
        grads = torch.stack([p.grad for p in parameters if p.grad is not None])
        moving = 1.0
        if self.found_inf is not None:
            grads = grads.masked_fill_(self.found_inf.bool(), 0.0)
            moving = 1.0 - self.found_inf
        averages = torch.stack(buffers).lerp_(grads, (1 - momentum) * moving * torch.ones_like(grads[:1, :1, :1]))
        updates = orthogonalized(grads.lerp_(averages, momentum)).to(grads.dtype)
        size = lr * RMS_OF_ADAMW * max(grads.shape[1:]) ** 0.5
        for parameter, buffer, average, update in zip(parameters, buffers, averages, updates, strict=True):
            buffer.copy_(average)
            parameter.mul_(1 - lr * weight_decay * moving).sub_(update * (size * moving))

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _by_shape(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    shapes: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        shapes[parameter.shape].append(parameter)
    yield from shapes.values()


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each [rows, columns] of a stack with its singular values drawn to about 1, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16().contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram, c, gram, b), x, beta=a)
    return x.mT if tall else x
