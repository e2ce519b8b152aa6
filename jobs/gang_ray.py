"""A gang of ranks as Ray Train workers: placed, started, watched and torn down by Ray; what to go on from is ours.

Nothing here restarts anything. A gang that loses a rank ends as a whole with WorkerLost, and whoever started it starts
it again: the ranks find the newest checkpoint by themselves.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.errors import GristmillError, StageFailed, WorkerLost
from pipeline.stage import Context, RankContext
from pipeline.tracking import Recorder, Silent

Workers = int | tuple[int, int]
"""How many ranks, or the fewest and the most."""

PATIENCE = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5"}
"""Seconds that the process that watches the ranks waits for those of a gang that ends, of which one may answer nothing.

Ray Train does not hand this variable on to that process, as it does those of `settings`: it is of the whole Ray.
"""


@dataclass(frozen=True)
class RayGang:
    """`pipeline.stage.Gang` on the Ray that this process belongs to. `cpus` are those of one rank."""

    workers: Workers
    cpus: int
    gpus: int
    timeout_seconds: float
    """How long a rank may be silent, or the others may wait for it, before the gang ends."""

    def __call__(self, function: Callable[[RankContext], None], ctx: Context) -> None:
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        os.environ |= settings(self.timeout_seconds)
        trainer = TorchTrainer(
            partial(as_rank, function, bare(ctx, self.cpus), self.timeout_seconds),
            scaling_config=ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.gpus > 0,
                resources_per_worker={"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if self.gpus else "gloo", timeout_s=int(2 * self.timeout_seconds)),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],  # a name used before would make Ray go on from a snapshot of its own
                storage_path=str(ctx.work / "ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as failure:
            raise explained(ctx.kind, failure) from None
        except RayError as failure:
            raise WorkerLost(f"{ctx.kind}: the process that watches the ranks was lost: {_short(failure)}") from None


def settings(timeout_seconds: float) -> dict[str, str]:
    """How often Ray Train looks after its workers, and how long it bears silence; it reads the environment."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(timeout_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # then it counts again what there is: a node may just be lost
        "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would only restart what is ours to restart
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    }


def bare(ctx: Context, cpus: int) -> RankContext:
    """What of a context can travel to another process."""
    return RankContext(
        store=ctx.store, kind=ctx.kind, key=ctx.key, keys=ctx.keys, work=ctx.work, tracker=Silent(), cpus=cpus
    )


def as_rank(function: Callable[[RankContext], None], ctx: RankContext, timeout_seconds: float = 60.0) -> None:
    """Be one rank, on whatever machine this is, that may be silent for so long. Rank 0 speaks for all of them."""
    from pipeline.engine import SILENCE

    os.environ[SILENCE] = str(timeout_seconds)
    store = ctx.store.here()
    work = store.work(ctx.kind, ctx.key)
    work.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        function(replace(ctx, store=store, work=work))
        return
    store.pull_journal(ctx.kind, ctx.key)  # whoever was rank 0 before may have been on another machine
    send = partial(store.push_journal, ctx.kind, ctx.key) if store.remote else None
    recorder = Recorder(store.journal(ctx.kind, ctx.key), send)
    try:
        function(replace(ctx, store=store, work=work, tracker=recorder))
    finally:
        recorder.close()


def explained(stage: str, failure: Any) -> GristmillError:
    """What ended a gang, the rank by name.

    A lost rank is the loss, whatever the others said when it was gone. Else an error of ours comes as it was, a bug as
    StageFailed, and what broke between ranks as a loss.
    """
    failures: Mapping[int, BaseException] = getattr(failure, "worker_failures", {})
    causes = {rank: _cause(error) for rank, error in sorted(failures.items())}
    told = "; ".join(f"rank {rank}: {_short(error)}" for rank, error in causes.items()) or _short(failure)
    if any(_is_loss(error) for error in causes.values()):
        return WorkerLost(f"{stage}: {told}")
    ours = [error for error in causes.values() if isinstance(error, GristmillError)]
    if ours:
        return ours[0]
    if any(not _is_broken_link(error) for error in causes.values()):
        return StageFailed(f"{stage}: {told}\n{failure}")
    return WorkerLost(f"{stage}: {told}")


def _cause(error: BaseException) -> BaseException:
    """What stands in Ray Train's wrapping: the exception of our function, or what a health check found."""
    return getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error


def _is_loss(error: BaseException) -> bool:
    """Whether Ray itself says that a rank is gone."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(error, RayError | RayTrainError)


def _is_broken_link(error: BaseException) -> bool:
    """Whether it is what torch raises where another rank is gone."""
    from torch.distributed import DistError

    said = str(error).lower()
    return isinstance(error, DistError | OSError) or (
        isinstance(error, RuntimeError) and ("gloo" in said or "nccl" in said)
    )


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
