"""How fast and how well training goes: the mean of the step reports, told to the tracker every few steps."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.tracking import Tracker
from pipeline.train import StepReport


class Meter:
    """Gathers step reports and tells the tracker their mean every few steps; only then does it wait for the device."""

    def __init__(self, tracker: Tracker, lr: float, every: int, total: int, tokens_per_step: float) -> None:
        self._tracker, self._lr, self._every, self._total = tracker, lr, every, total
        self._tokens_per_step = tokens_per_step
        self._losses: list[Tensor] = []
        self._targets = 0
        self._carried = 0
        """Steps of the window that an earlier process did: they took none of this one's time."""
        self._clock = 0.0
        self.training_seconds = 0.0
        self.steps = 0
        self.loss = float("nan")
        """Mean loss of the last window, nats per target."""

    def watch(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        self._clock = self._clock or time.monotonic()  # a window may have begun in the epoch before
        for report in reports:
            self._losses.append(report.loss_sum)
            self._targets += report.targets
            if (report.step + 1) % self._every == 0 or report.step + 1 == self._total:
                self._tell(report)
            yield report

    def state(self) -> dict[str, Any]:
        """The window that is not told yet, so that a restart tells the same mean; and how fast it was so far."""
        return {
            "losses": [float(loss) for loss in self._losses],
            "targets": self._targets,
            "steps": self.steps,
            "training_seconds": self.training_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._losses, self._targets = [torch.tensor(loss) for loss in state["losses"]], state["targets"]
        self._carried = len(self._losses)
        self.steps, self.training_seconds = state.get("steps", 0), state.get("training_seconds", 0.0)

    def pause(self) -> "Pause":
        """A block whose time does not count as training."""
        return Pause(self)

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self._tokens_per_step / self.training_seconds if self.steps else 0.0

    def skip(self, seconds: float) -> None:
        self._clock += seconds

    def _tell(self, report: StepReport) -> None:
        self.loss = float(torch.stack(self._losses).sum()) / self._targets
        now = time.monotonic()
        seconds, steps = max(now - self._clock, 1e-9), len(self._losses) - self._carried
        self._clock, self._losses, self._targets, self._carried = now, [], 0, 0
        self.training_seconds, self.steps = self.training_seconds + seconds, self.steps + steps
        rate = steps * self._tokens_per_step / seconds
        self._tracker.metrics(
            {
                "train/loss": self.loss,
                "train/lr": self._lr * report.lr_scale,
                "train/grad_norm": float(report.grad_norm),
                "train/tokens_per_second": rate,
            },
            step=report.step,
        )
        self._tracker.progress(report.step + 1, self._total, f"loss {self.loss:.3f}  {rate:,.0f} tokens/s")


class Pause:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._meter.skip(time.monotonic() - self._start)
