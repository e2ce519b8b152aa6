"""The training loop: a generator that trains and reports. It opens no file and logs nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.batches import Ints, Sampling
from pipeline.engine import Engine


class Judge(Protocol):
    """Who decides whether a step may change the weights, from its mean loss and gradient norm, on the device."""

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one optimizer step did. Tensors are left on the device: reading one waits for the step to end."""

    step: int
    loss_sum: Tensor
    """Cross-entropy of the step's targets on all ranks, in nats, 0-dim."""
    targets: int
    """Targets of the step, all ranks together."""
    grad_norm: Tensor
    """Global gradient norm before clipping, 0-dim."""
    lr_scale: float
    held: Tensor
    """Whether the weights were left as they are, 0-dim bool."""
    sample_ids: Ints
    """What the step read, all ranks together."""
    own_ids: Ints
    """What this rank read of it."""

    @property
    def loss(self) -> float:
        """Mean loss of the step in nats per target. Waits for the device."""
        return float(self.loss_sum) / self.targets


def train(
    engine: Engine,
    sampling: Sampling,
    lr_scale: Callable[[int], float],
    judge: Judge,
    *,
    start: int,
    stop: int,
    total: int | None = None,
) -> Iterator[StepReport]:
    """Train from step `start` to step `stop`, of `total` in all (`stop` if not given); report each step as it ends.

    The loss is normalised by the step's targets on all ranks, so that accumulation, packing and the number of workers
    change nothing but the order of a sum.
    """
    for step in range(start, stop):
        batch = sampling.step(step, rank=engine.rank, world_size=engine.world_size)
        own = [engine.accumulate(micro.to(engine.device), batch.targets) for micro in batch.micro_batches]
        loss_sum = engine.sum(sum(own[1:], own[0]))
        scale = lr_scale(step)
        verdict = Verdict(judge, loss_sum / batch.targets)
        norm = engine.step(scale, verdict, step / (total or stop))
        yield StepReport(step, loss_sum, batch.targets, norm, scale, verdict(norm), batch.sample_ids, batch.own_ids)


class Verdict:
    """What the judge says of one step. Asked again, also by an engine with several optimizers, it is the same."""

    def __init__(self, judge: Judge, loss: Tensor) -> None:
        self._judge, self._loss = judge, loss
        self._said: Tensor | None = None

    def __call__(self, grad_norm: Tensor) -> Tensor:
        if self._said is None:
            self._said = self._judge.judge(self._loss, grad_norm)
        return self._said
