"""The plain engine: torch alone, on the CPU or one GPU; in bf16, autocast over float32 weights."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from model.batch import Batch
from pipeline import optimizer as optimizers
from pipeline.engine import EngineSettings, Hold, Objective, not_finite, pick_device
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import Precision, autocast, resolve
from pipeline.state import Shard, TrainState, check_same_model, owners, piece

T = TypeVar("T")

ZERO_STAGES = (0,)


class Plain:
    """`pipeline.engine.Engine` in one process."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        grad_clip: float,
        device: torch.device,
    ) -> None:
        self.device = device
        self._model = model
        self._objective = objective
        self._optimizer = optimizer
        self._precision: Precision = precision
        self._grad_clip = grad_clip

    def accumulate(self, batch: Batch, denominator: float) -> Tensor:
        with autocast(self._precision, self.device):
            total = self._objective(self._model, batch.to(self.device)).sum
        (total / denominator).backward()
        return total.detach()

    def step(self, lr_scale: float, hold: Hold = not_finite, done: float = 1.0) -> Tensor:
        norm = clip(self._model, self._optimizer, self._grad_clip, hold)
        optimizers.scale_lr(self._optimizer, lr_scale, done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def forward(self, function: Callable[[nn.Module], T]) -> T:
        with optimizers.averaged(self._optimizer), autocast(self._precision, self.device):
            return function(self._model)

    def sum(self, value: Tensor) -> Tensor:
        return value

    def agree(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def wait(self) -> None: ...

    def shard(self) -> Shard:
        return replicated_shard(self._model, self._optimizer, self.rank, self.world_size)

    def restore(self, state: TrainState) -> None:
        restore_whole(self._model, self._optimizer, state)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float, hold: Hold) -> Tensor:
    """Scale the gradients down to a global norm of `grad_clip`, 0 for no limit; gives the norm before.

    Tells the optimizer to hold still where that norm is not finite or `hold` says so.
    """
    norm = clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    optimizers.hold_if(optimizer, not_finite(norm) | hold(norm))
    return norm


def replicated_shard(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world_size: int) -> Shard:
    """A rank's share of writing where every rank has all of the state: whole tensors."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mine = {name for name, owner in owners(shapes, world_size).items() if owner == rank}
    params = {name: piece(p) for name, p in model.named_parameters() if name in mine}
    moments = {
        name: {key: piece(value) for key, value in own.items()}
        for name, own in optimizers.moments(optimizer).items()
        if name in mine
    }
    return Shard(params, moments, optimizers.steps_taken(optimizer), shapes)


@torch.no_grad()
def restore_whole(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Go on from `state`, in place. Raises UsageError if it is of another model."""
    own = dict(model.named_parameters())
    check_same_model(state.shapes, {name: tuple(p.shape) for name, p in own.items()})
    for name, p in own.items():
        p.copy_(state.params[name])
    optimizers.restore(optimizer, state.optimizer, state.optimizer_step)


def create(
    model: nn.Module,
    objective: Objective,
    *,
    optimizer: OptimizerConfig,
    precision: str,
    grad_clip: float,
    settings: EngineSettings,
    n_layers: int,
) -> Plain:
    """See `pipeline.engine.create`."""
    device = pick_device(settings.device)
    model.to(device)
    return Plain(
        model,
        objective,
        optimizers.build(model.named_parameters(), optimizer, n_layers),
        resolve(precision, device),
        grad_clip,
        device,
    )
