"""Training engines, one module each: what turns batches into gradients and gradients into weights.

Contract: a module here defines `ZERO_STAGES`, the stages it has, and `create(model, objective, ...) -> Engine` with the
arguments of `create` below. All engines compute the same numbers up to rounding and their shards join to the same
`TrainState`, so a run may change engine, ZeRO stage or number of workers at any checkpoint.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from model import variants
from model.batch import Batch, Loss
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.identity import knob
from pipeline.optimizer import OptimizerConfig
from pipeline.state import Shard, TrainState

T = TypeVar("T")
SILENCE = "GRISTMILL_SILENCE_SECONDS"
"""Where a launcher says, in the environment of a rank, how long it may be silent before it counts as lost."""
Objective = Callable[[Any, Batch], Loss]
"""A loss of a model and a batch; the model is the module, of whatever class, that the engine was created with."""
Hold = Callable[[Tensor], Tensor]
"""Gradient norm to a verdict, both 0-dim on the device: True leaves the weights as they are."""


def not_finite(grad_norm: Tensor) -> Tensor:
    return ~grad_norm.isfinite()


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine lays training out on the machine. None of it changes what is trained."""

    device: Literal["auto", "cpu", "cuda"] = knob("auto")
    """Where to train; auto is the GPU if there is one."""
    zero_stage: Annotated[int, Ge(0), Le(3)] = knob(0)
    """ZeRO (arXiv:1910.02054): 1 shares out optimizer state, 2 gradients too, 3 weights too. DeepSpeed only."""
    offload: Literal["none", "optimizer", "all"] = knob("none")
    """ZeRO-Offload (arXiv:2101.06840): optimizer state in CPU memory and its update on the CPU; all: weights too."""
    deepspeed: Mapping[str, Any] = knob(default_factory=dict)
    """What DeepSpeed is told besides, in the form of its JSON; the fields above and the engine's own needs win."""

    def __post_init__(self) -> None:
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(
                f"offload={self.offload} needs optimizer state that is shared out, but zero_stage=0 shares nothing; "
                "set zero_stage to 1, 2 or 3, or offload to none"
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload=all needs weights that are shared out, but zero_stage={self.zero_stage} leaves them whole; "
                "set zero_stage to 3, or offload to optimizer"
            )


def refuse_cut(optimizer: OptimizerConfig, zero_stage: int) -> None:
    """Raise ValueError for an optimizer that needs whole tensors, where ZeRO cuts them."""
    if not zero_stage:
        return
    if optimizer.name == "muon":
        raise ValueError(
            f"optimizer=muon needs whole matrices, but zero_stage={zero_stage} flattens and cuts them; "
            "set zero_stage to 0 or optimizer to adamw"
        )
    if optimizer.average:
        raise ValueError(
            f"average={optimizer.average} needs whole weights, but zero_stage={zero_stage} cuts them; set one to 0"
        )


class Engine(Protocol):
    """One rank of a training run. Every rank makes the same calls in the same order, or all wait for ever."""

    rank: int
    world_size: int
    device: torch.device

    def accumulate(self, batch: Batch, denominator: float) -> Tensor:
        """Add the gradient of this batch's loss sum over `denominator`, the count of targets of the whole step.

        The whole step means all its micro batches on all ranks. Returns the loss sum of this batch on this rank,
        float32 and 0-dim, detached and still on the device.
        """
        ...

    def step(self, lr_scale: float, hold: Hold = not_finite, done: float = 1.0) -> Tensor:
        """Clip the gradients by their global norm, update the weights at `lr_scale` of their peak rates, start anew.

        Returns the norm before clipping, float32 and 0-dim, still on the device: nothing here waits for it. A step
        whose norm is not finite, or of which `hold` says so, leaves weights and optimizer as they are. `done` is the
        part of training that is over, before which some layers may be frozen.
        """
        ...

    def forward(self, function: Callable[[Any], T]) -> T:
        """`function(model)` in the engine's precision, with no gradient; what it reads must be on `device`.

        The model has the running mean of its weights, where the optimizer keeps one.
        """
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a float tensor over all ranks, the same bits on each, still on the device."""
        ...

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest that any rank gave, element by element. Waits for the other ranks, not for the device."""
        ...

    def wait(self) -> None:
        """Wait for the other ranks as long as one may take to fetch what it needs; all other calls bear less."""
        ...

    def shard(self) -> Shard:
        """A copy of this rank's part of what training remembers. Call it between steps; no rank waits for another."""
        ...

    def restore(self, state: TrainState) -> None:
        """Go on from `state`, whichever engine gave it. Raises UsageError if it is of another model."""
        ...

    def close(self) -> None:
        """Give back what the engine holds outside its own tensors."""
        ...


def create(
    name: str,
    model: nn.Module,
    objective: Objective,
    *,
    optimizer: OptimizerConfig,
    precision: str,
    grad_clip: float,
    settings: EngineSettings,
    n_layers: int,
) -> Engine:
    """The engine called `name`, which takes `model` over and may move it to its device.

    `grad_clip` is the largest global gradient norm, 0 for no limit. Raises ValueError for a name that no module here
    has and for an optimizer that `refuse_cut` refuses, UsageError for settings that do not fit, EnvironmentProblem for
    a package or device that is missing.
    """
    module = variants.load("pipeline.engine", name)
    if settings.zero_stage not in module.ZERO_STAGES:
        choices = ", ".join(map(str, module.ZERO_STAGES))
        raise UsageError(f"zero_stage={settings.zero_stage} must be one of {choices} with engine={name}")
    refuse_cut(optimizer, settings.zero_stage)
    engine: Engine = module.create(
        model,
        objective,
        optimizer=optimizer,
        precision=precision,
        grad_clip=grad_clip,
        settings=settings,
        n_layers=n_layers,
    )
    return engine


def names() -> list[str]:
    """The engines there are."""
    return variants.names("pipeline.engine")


def pick_device(wanted: str) -> torch.device:
    """The device of this process; on GPU machines the one that its launcher gave it through LOCAL_RANK.

    Raises EnvironmentProblem for a GPU that is not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "device=cuda, but torch sees no GPU here; install its CUDA build or set device to auto"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
