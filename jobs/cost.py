"""What a run cost: the hours for which it held processor cores and GPUs."""

from collections.abc import Sequence

from jobs.record import Record, StageRecord
from jobs.times import covered
from pipeline.store import Store
from pipeline.system_metrics import GPU_MEMORY, RANKS
from pipeline.tracking import read_journal, system_path

HOUR = 3600.0


def cost(record: Record, store: Store) -> dict[str, float]:
    """`{"cost/cpu_hours", "cost/gpu_hours"}` of the stages that this run built; one that is nothing is left out.

    All cores of the run count for as long as any stage is being built, and a GPU for each rank of a stage that trains
    on GPUs. What an attempt spent on a stage before it was lost is not known here.
    """
    built = [(stage, stage.seconds) for stage in record.stages if stage.status == "built" and stage.seconds]
    cpu = record.cpus * (sum(seconds for _, seconds in built) - _shared([stage for stage, _ in built])) / HOUR
    gpu = sum(gpus(store, stage) * seconds for stage, seconds in built) / HOUR
    return {name: value for name, value in {"cost/cpu_hours": cpu, "cost/gpu_hours": gpu}.items() if value}


def _shared(stages: Sequence[StageRecord]) -> float:
    """Seconds of stages that lie in another's too; 0 of stages that were built one after the other."""
    spans = [
        (max(s.started_ms, s.finished_ms - int(1000 * s.seconds)), s.finished_ms)
        for s in stages
        if s.started_ms is not None and s.finished_ms is not None and s.seconds
    ]
    return (sum(stop - start for start, stop in spans) - covered(spans)) / 1000


def gpus(store: Store, stage: StageRecord) -> int:
    """On how many GPUs a stage trained when the machine was last looked at: one a rank, or none."""
    last: dict[str, float] = {}
    for point in read_journal(system_path(store.journal(stage.kind, str(stage.key)))):
        last = point.metrics
    return int(last[RANKS]) if GPU_MEMORY.format(0) in last else 0
