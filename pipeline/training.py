"""What pretraining and fine-tuning share: the settings of a training run, and the run with all that watches it."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from pipeline import deepspeed_config
from pipeline.batches import Sampling
from pipeline.checkpointing import CheckpointPolicy, Checkpoints
from pipeline.engine import Engine, EngineSettings, Objective, create, pick_device, refuse_cut
from pipeline.faults import fault_point
from pipeline.guard import Guard
from pipeline.health import Health
from pipeline.identity import knob
from pipeline.ledger import Ledger
from pipeline.memory import keep_freed_memory
from pipeline.meter import Meter
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import measured_matmul_flops, resolve
from pipeline.schedule import ScheduleConfig, lr_scale
from pipeline.stage import RankContext
from pipeline.train import StepReport, train


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
    engine: Literal["auto", "plain", "deepspeed"] = knob("auto")
    """plain: torch alone, one process. deepspeed: ZeRO. auto: plain where it will do."""
    zero_stage: Annotated[int, Ge(0), Le(3)] = knob(0)
    """ZeRO stage of the deepspeed engine: 1 shares out optimizer state, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = knob("none")
    """What a GPU leaves to CPU memory: optimizer, its state (from ZeRO stage 1 on); all, weights too (stage 3)."""
    deepspeed_config: str | None = knob(None)
    """Path of a DeepSpeed JSON for what no key here decides, such as bucket sizes. "auto" in it is our value."""
    activation_checkpointing: bool = knob(False)
    """Compute each block again in the backward pass instead of keeping what it computed: less memory, more time."""
    checkpoint_seconds: Annotated[float, Ge(0)] = knob(60.0)
    """Time between two checkpoints; 0 is after every step. Longer where writing would take more than 3.5 % of it."""
    keep_last: Annotated[int, Ge(1)] = knob(2)
    """Newest checkpoints that are kept: one to go on from, the others to fall back to if it is damaged."""
    keep_every: Annotated[int, Ge(0)] = knob(0)
    """Steps between two checkpoints that are kept for good, under kept/ of GRISTMILL_HOME; 0 keeps none."""
    ledger: bool = knob(False)
    """Write down which rank read which sample in which step, beside the journal of metrics."""
    log_every: Annotated[int, Ge(1)] = knob(10)
    """Steps between two points of the training curve."""

    def __post_init__(self) -> None:
        if self.zero_stage and self.engine == "plain":
            raise ValueError(f"zero_stage={self.zero_stage} needs engine deepspeed or auto, not plain")
        if self.deepspeed_config and self.engine == "plain":
            raise ValueError(f"deepspeed_config={self.deepspeed_config} needs engine deepspeed or auto, not plain")
        EngineSettings(zero_stage=self.zero_stage, offload=self.offload)  # what does not fit is refused here
        refuse_cut(self.optimizer_config, self.zero_stage)

    def resolve(self) -> Self:
        """The same settings with `auto` decided for this machine, so that the key says what was really used.

        Raises UsageError for a `deepspeed_config` that cannot be used, before anything is built.
        """
        resolved = replace(self, precision=resolve(self.precision, pick_device(EngineSettings().device)))
        resolved._deepspeed()
        return resolved

    def _deepspeed(self) -> dict[str, Any]:
        if self.deepspeed_config is None:
            return {}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["precision"] = resolve(self.precision, pick_device(EngineSettings().device))
        return deepspeed_config.read(self.deepspeed_config, own)

    def create_engine(self, model: nn.Module, objective: Objective, n_layers: int) -> Engine:
        return create(
            self.engine_name,
            model,
            objective,
            optimizer=self.optimizer_config,
            precision=self.precision,
            grad_clip=self.grad_clip,
            settings=EngineSettings(zero_stage=self.zero_stage, offload=self.offload, deepspeed=self._deepspeed()),
            n_layers=n_layers,
        )

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(
            name=self.optimizer,
            lr=self.lr,
            muon_lr=self.muon_lr,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
        )

    @property
    def engine_name(self) -> str:
        """The engine of this process: on several ranks, or where anything asks for it, it is DeepSpeed."""
        if self.engine != "auto":
            return self.engine
        wanted = self.zero_stage or self.deepspeed_config or int(os.environ.get("WORLD_SIZE", "1")) > 1
        return "deepspeed" if wanted else "plain"

    @property
    def schedule_config(self) -> ScheduleConfig:
        return ScheduleConfig(name=self.schedule, warmup=self.warmup, decay=self.decay, floor=self.floor)


def prepare_process(cpus: int) -> None:
    """Give this process its share of the machine. The number of threads decides the order of sums, so it is set."""
    torch.set_num_threads(cpus)
    keep_freed_memory()


class TrainingRun:
    """One rank's training: its engine, and everything that watches it. A context manager that cleans up on any way out.

    Every rank makes the same calls. `extra` is what the stage itself must remember.
    """

    def __init__(
        self,
        ctx: RankContext,
        config: TrainingConfig,
        engine: Engine,
        *,
        total_steps: int,
        tokens_per_step: float,
        spike_sigma: float = 0.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.engine, self.total_steps = engine, total_steps
        self._config, self._began = config, time.monotonic()
        self.meter = Meter(ctx.tracker, config.lr, config.log_every, total_steps, tokens_per_step)
        self._guard = Guard(engine.device, spike_sigma)
        self._health = Health(engine.rank)
        self._ledger = (
            Ledger(ctx.store.journal(ctx.kind, ctx.key).with_suffix(".ledger"), engine) if config.ledger else None
        )
        self.checkpoints = Checkpoints(
            engine,
            ctx.store.shelf(ctx.kind, ctx.key),
            CheckpointPolicy(
                every_seconds=config.checkpoint_seconds,
                keep_last=config.keep_last,
                keep_every=config.keep_every,
                kept=ctx.store.kept(ctx.kind, ctx.key),
            ),
            parts={"meter": self.meter, "guard": self._guard, "health": self._health},
            stop_requested=partial(ctx.store.stop_requested, ctx.kind, ctx.key),
            extra=extra or {},
        )

    def resume(self) -> int:
        """Go on from the newest sound checkpoint; return the first step that is left to do."""
        start = self.checkpoints.resume()
        if self._ledger:
            self._ledger.forget_from(start)
        fault_point("training.resume")
        return start

    def steps(self, sampling: Sampling, *, start: int, stop: int) -> Iterator[StepReport]:
        """Train from step `start` to `stop`: watched, measured, and with checkpoints on the way."""
        course = partial(lr_scale, steps=self.total_steps, config=self._config.schedule_config)
        reports = train(self.engine, sampling, course, self._guard, start=start, stop=stop, total=self.total_steps)
        if self._ledger:
            reports = self._ledger.follow(reports)
        for report in self.checkpoints.after(self.meter.watch(self._health.watch(reports))):
            fault_point("training.step")
            yield report

    def finish(self) -> None:
        """Leave the weights as the last checkpoint, with a summary of how the training went."""
        if "summary" in self.checkpoints.extra:  # an earlier process came this far
            return
        share = self.checkpoints.seconds / max(time.monotonic() - self._began, 1e-9)
        flops = measured_matmul_flops(self._config.precision, self.engine.device)
        self.checkpoints.extra["summary"] = {
            "workers": self.engine.world_size,
            "tokens_per_second": self.meter.tokens_per_second,
            "matmul_flops": float(self.engine.sum(torch.tensor(flops, device=self.engine.device))),
            "checkpoint_seconds": self.checkpoints.seconds,
            "checkpoint_share": share,
        }
        self.checkpoints.save_weights(self.total_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.checkpoints.close(all_is_well=kind is None)
        self.engine.close()
