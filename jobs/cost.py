"""What a run cost: the hours for which it held processor cores and GPUs."""

from jobs.record import Record, StageRecord
from pipeline.store import Store
from pipeline.system_metrics import GPU_MEMORY, RANKS
from pipeline.tracking import read_journal, system_path

HOUR = 3600.0


def cost(record: Record, store: Store) -> dict[str, float]:
    """`{"cost/cpu_hours", "cost/gpu_hours"}` of the stages that this run built; one that is nothing is left out.

    All cores of the run count for as long as a stage is being built, and a GPU for each rank of a stage that trains on
    GPUs. What an attempt spent on a stage before it was lost is not known here.
    """
    built = [(stage, stage.seconds / HOUR) for stage in record.stages if stage.status == "built" and stage.seconds]
    cpu = sum(hours * record.cpus for _, hours in built)
    gpu = sum(hours * gpus(store, stage) for stage, hours in built)
    return {name: value for name, value in {"cost/cpu_hours": cpu, "cost/gpu_hours": gpu}.items() if value}


def gpus(store: Store, stage: StageRecord) -> int:
    """On how many GPUs a stage trained when the machine was last looked at: one a rank, or none."""
    last: dict[str, float] = {}
    for point in read_journal(system_path(store.journal(stage.kind, str(stage.key)))):
        last = point.metrics
    return int(last[RANKS]) if GPU_MEMORY.format(0) in last else 0
