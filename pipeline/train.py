"""The training loop: a generator that trains and reports. It opens no file and logs nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.batches import Sampling
from pipeline.engine import Engine


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one optimizer step did. Tensors are left on the device: reading one waits for the step to end."""

    step: int
    loss_sum: Tensor
    """Cross-entropy of this rank's targets, in nats, 0-dim."""
    targets: int
    """Targets of the step, all ranks together."""
    grad_norm: Tensor
    """Global gradient norm before clipping, 0-dim."""
    lr_scale: float

    @property
    def loss(self) -> float:
        """Mean loss of the step in nats per target. Waits for the device."""
        return float(self.loss_sum) / self.targets


def train(
    engine: Engine, sampling: Sampling, lr_scale: Callable[[int], float], *, start: int, stop: int
) -> Iterator[StepReport]:
    """Train from step `start` to step `stop`, and report each step as it ends.

    The loss is normalised by the step's targets on all ranks, so that accumulation, packing and the number of workers
    change nothing but the order of a sum.
    """
    for step in range(start, stop):
        batch = sampling.step(step, rank=engine.rank, world_size=engine.world_size)
        sums = [engine.accumulate(micro.to(engine.device), batch.targets) for micro in batch.micro_batches]
        scale = lr_scale(step)
        grad_norm = engine.step(scale)
        yield StepReport(step, sum(sums[1:], sums[0]), batch.targets, grad_norm, scale)
