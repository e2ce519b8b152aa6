"""What a run cost: the hours for which it held processor cores and GPUs."""

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
    built = [stage for stage in record.stages if stage.status == "built" and stage.seconds and stage.finished_ms]
    cpu = record.cpus * covered([_span(stage) for stage in built]) / HOUR
    gpu = sum(gpus(store, stage) * (stage.seconds or 0.0) / HOUR for stage in built)
    return {name: value for name, value in {"cost/cpu_hours": cpu, "cost/gpu_hours": gpu}.items() if value}


def _span(stage: StageRecord) -> tuple[float, float]:
    """When a stage was being built, in seconds since 1970."""
    assert stage.finished_ms is not None, "it is built"
    assert stage.seconds is not None, "it is built"
    end = stage.finished_ms / 1000
    return end - stage.seconds, end


def gpus(store: Store, stage: StageRecord) -> int:
    """On how many GPUs a stage trained when the machine was last looked at: one a rank, or none."""
    last: dict[str, float] = {}
    for point in read_journal(system_path(store.journal(stage.kind, str(stage.key)))):
        last = point.metrics
    return int(last[RANKS]) if GPU_MEMORY.format(0) in last else 0
