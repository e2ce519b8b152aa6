"""What pretraining and fine-tuning share: the settings of a training run, its meter, and its checkpoints."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.engine import Engine, EngineSettings, Objective, create, pick_device
from pipeline.identity import knob
from pipeline.memory import keep_freed_memory
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import resolve
from pipeline.schedule import ScheduleConfig
from pipeline.tracking import Tracker
from pipeline.train import StepReport

log = logging.getLogger("gristmill")

KEEP_CHECKPOINTS = 2
"""The newest, and the one to fall back to if it is damaged."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained, whatever for."""

    lr: Annotated[float, Gt(0), Le(1)] = 1e-3
    """Peak learning rate of AdamW."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices with AdamW for the rest."""
    muon_lr: Annotated[float, Gt(0), Le(1)] | None = None
    """Peak learning rate of Muon; null is `lr`."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay of the blocks' matrices."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW's memory of the squared gradient."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.02
    """Part of the steps in which the learning rate rises."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.2
    """Part of the steps in which the wsd schedule falls."""
    floor: Annotated[float, Ge(0), Le(1)] = 0.1
    """The last learning rate over the peak."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 is no limit."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward and backward passes; weights stay float32. auto: bf16 where the machine multiplies it in hardware."""
    micro_batch_size: Annotated[int, Ge(1)] = knob(16)
    """Rows in one forward pass: as many as fit in memory."""
    engine: Literal["plain", "deepspeed"] = knob("plain")
    """plain: torch alone. deepspeed: ZeRO."""
    zero_stage: Annotated[int, Ge(0), Le(3)] = knob(0)
    """ZeRO stage of the deepspeed engine: 1 shares out optimizer state, 2 gradients too, 3 weights too."""
    checkpoint_seconds: Annotated[float, Ge(0)] = knob(60.0)
    """Time between two checkpoints; 0 is after every step."""
    log_every: Annotated[int, Ge(1)] = knob(10)
    """Steps between two points of the training curve."""

    def resolve(self) -> Self:
        """The same settings with `auto` decided for this machine, so that the key says what was really used."""
        return replace(self, precision=resolve(self.precision, pick_device(EngineSettings().device)))

    def create_engine(self, model: nn.Module, objective: Objective, n_layers: int) -> Engine:
        return create(
            self.engine,
            model,
            objective,
            optimizer=OptimizerConfig(
                name=self.optimizer,
                lr=self.lr,
                muon_lr=self.muon_lr,
                weight_decay=self.weight_decay,
                beta2=self.beta2,
                layer_lr_decay=getattr(self, "layer_lr_decay", 1.0),
            ),
            precision=self.precision,
            grad_clip=self.grad_clip,
            settings=EngineSettings(zero_stage=self.zero_stage),
            n_layers=n_layers,
        )

    @property
    def schedule_config(self) -> ScheduleConfig:
        return ScheduleConfig(name=self.schedule, warmup=self.warmup, decay=self.decay, floor=self.floor)


def prepare_process(cpus: int) -> None:
    """Give this process its share of the machine. The number of threads decides the order of sums, so it is set."""
    torch.set_num_threads(cpus)
    keep_freed_memory()


@dataclass
class Checkpoints:
    """The checkpoints of one training run. `extra` is what the stage itself must remember; it travels with them."""

    engine: Engine
    folder: Path
    every_seconds: float
    meter: "Meter"
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Time spent writing, for the overhead that is reported."""
    _due: float = field(init=False)

    def __post_init__(self) -> None:
        self._due = time.monotonic() + self.every_seconds

    def resume(self) -> int:
        """Restore the newest sound checkpoint, if there is one, and return the first step that is left to do."""
        found = checkpoint.newest(self.folder)
        if found is None:
            return 0
        self.engine.restore(found.state)
        self.meter.restore(found.extra.pop("meter"))
        self.extra.update(found.extra)
        log.info("going on from step %d (%s)", found.step, found.path)
        return found.step

    def after(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """Pass reports through, and write a checkpoint after a step when one is due."""
        for report in reports:
            yield report
            if time.monotonic() >= self._due:
                self.save(report.step + 1)

    @property
    def all_extra(self) -> dict[str, Any]:
        return {**self.extra, "meter": self.meter.state()}

    def save(self, next_step: int) -> None:
        start = time.monotonic()
        checkpoint.save(self.folder, next_step, self.engine.state(), self.all_extra)
        checkpoint.keep_last(self.folder, KEEP_CHECKPOINTS)
        self.seconds += time.monotonic() - start
        self._due = time.monotonic() + self.every_seconds


class Meter:
    """Gathers step reports and tells the tracker their mean every few steps; only then does it wait for the device."""

    def __init__(self, tracker: Tracker, lr: float, every: int, total: int, tokens_per_step: float) -> None:
        self._tracker, self._lr, self._every, self._total = tracker, lr, every, total
        self._tokens_per_step = tokens_per_step
        self._losses: list[Tensor] = []
        self._targets = 0
        self._carried = 0
        """Steps of the window that an earlier process did: they took none of this one's time."""
        self._clock = time.monotonic()
        self.training_seconds = 0.0
        self.steps = 0
        self.loss = float("nan")
        """Mean loss of the last window, nats per target."""

    def watch(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        self._clock = time.monotonic()
        for report in reports:
            self._losses.append(report.loss_sum)
            self._targets += report.targets
            if (report.step + 1) % self._every == 0 or report.step + 1 == self._total:
                self._tell(report)
            yield report

    def state(self) -> dict[str, Any]:
        """The window that is not told yet, so that a restart tells the same mean."""
        return {"losses": [float(loss) for loss in self._losses], "targets": self._targets}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses, self._targets = [torch.tensor(loss) for loss in state["losses"]], state["targets"]
        self._carried = len(self._losses)

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
