"""One run from a config to a result: assemble, open the record, launch, mirror, show."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from jobs.console import RunView
from jobs.record import OpenRecord, open_record
from jobs.track_mlflow import Mirror, Mirrored
from pipeline.assemble import Graph, PipelineConfig, assemble
from pipeline.config import flat, load
from pipeline.errors import GristmillError
from pipeline.identity import canonical, fingerprint
from pipeline.runner import Built, Started, Submit, build, submit_here, topological
from pipeline.store import Store, log

MIRROR_SECONDS = 30.0
"""How long the end of a run waits for the tracking server before it leaves the rest to `gristmill sync`."""
MIRROR_SECONDS_AFTER_FAILURE = 10.0


def home() -> Path:
    """Where everything is kept: GRISTMILL_HOME, or `runs` in the current directory."""
    return Path(os.environ.get("GRISTMILL_HOME") or "runs").absolute()


def tracking_uri(config: PipelineConfig | None = None) -> str:
    """The configured MLflow URI, or the sqlite file under `home()`."""
    chosen = (config.tracking.uri if config else None) or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{(home() / 'mlflow.db').resolve()}"


@dataclass(frozen=True)
class Opened:
    """A config that has been read, and what follows from it."""

    config: PipelineConfig
    graph: Graph
    store: Store


def open_config(path: Path, overrides: Sequence[str]) -> Opened:
    config = load(PipelineConfig, path, overrides).config
    return Opened(config, assemble(config), Store(home()))


def run(path: Path, overrides: Sequence[str], *, inline: bool, view: RunView) -> dict[str, Any]:
    """Build everything a config asks for; the result is the run's JSON contract. Raises GristmillError."""
    start = time.monotonic()
    opened = open_config(path, overrides)
    config, graph, store = opened.config, opened.graph, opened.store
    if config.cluster.workers > 1:
        log.warning("cluster.workers=%d: this version trains in one process", config.cluster.workers)
    uri = tracking_uri(config)
    opening = open_record(
        store.home,
        config.name,
        fingerprint(config),
        stages=[(stage.name, stage.kind) for stage in topological(graph.targets)],
        params=dict(flat(canonical(config))),
        register_name=(config.register.name or config.name) if graph.export else None,
        tracking_uri=uri,
    )
    with opening as record:
        write_resolved(record.folder / "resolved.yaml", config)
        mirror = Mirror(store.home, record.record.run, uri).start()
        cpus = config.cluster.cpus or len(os.sched_getaffinity(0))
        with _told_if_it_ends_badly(record, mirror), view, launcher(inline, store.home, cpus) as submit:
            events = [_note(event, record, view) for event in build(graph.targets, store, submit, cpus=cpus)]
        result = {"name": config.name, "run": record.record.run} | _result(
            graph, store, [event for event in events if isinstance(event, Built)]
        )
        record.finish("succeeded", result)
        result |= _tracked(mirror.finish(MIRROR_SECONDS), uri)
        result |= {"wall_seconds": round(time.monotonic() - start, 2)}
        record.finish("succeeded", result)
        return result


@contextmanager
def _told_if_it_ends_badly(record: OpenRecord, mirror: Mirror) -> Iterator[None]:
    """Whatever ends the block early is written down and shown to the tracker before it goes on its way."""
    try:
        yield
    except BaseException as error:
        for stage in record.record.stages:
            if stage.status == "running":
                record.failed(stage.name)
        record.finish("cancelled" if isinstance(error, KeyboardInterrupt) else "failed")
        mirror.finish(MIRROR_SECONDS_AFTER_FAILURE)
        raise


def write_resolved(path: Path, config: PipelineConfig) -> None:
    """Keep a config with every default filled in: what a run really used."""
    with path.open("w") as out:
        YAML().dump(json.loads(json.dumps(asdict(config))), out)


def _note(event: Started | Built, record: OpenRecord, view: RunView) -> Started | Built:
    """Show and write down that a stage began or ended."""
    view.show(event)
    if isinstance(event, Started):
        record.started(event.stage.name, event.key)
    else:
        record.ended(event.stage.name, event.key, event.status, event.seconds)
    return event


@contextmanager
def launcher(inline: bool, where: Path, cpus: int) -> Iterator[Submit]:
    """How stages are executed: as tasks of a local Ray, or one after the other in this process."""
    if inline:
        yield lambda job: submit_here(job, cpus=cpus)
        return
    from jobs.launch_ray import local_ray

    with local_ray(where, cpus) as submit:
        yield submit


def _result(graph: Graph, store: Store, built: Sequence[Built]) -> dict[str, Any]:
    by_name = {b.stage.name: b for b in built}
    stages = [
        {"name": b.stage.name, "key": b.key, "status": b.status, "seconds": round(b.seconds, 2)}
        for b in (by_name[stage.name] for stage in topological(graph.targets))
    ]
    result: dict[str, Any] = {"status": "succeeded", "stages": stages}
    if graph.export:
        result["export_dir"] = str(store.path("export", by_name["export"].key))
    if graph.evaluate is None:
        return result
    report_dir = store.path("evaluate", by_name["evaluate"].key)
    scores = graph.evaluate.load(report_dir).scores
    wanted = ("accuracy", "accuracy_ci", "macro_f1", "ece", "baseline", "random_init")
    return result | {name: scores[name] for name in wanted} | {"report_dir": str(report_dir)}


def _tracked(mirrored: Mirrored | None, uri: str) -> dict[str, Any]:
    return {
        "model_uri": mirrored and mirrored.model_uri,
        "mlflow_run_id": mirrored and mirrored.run_id,
        "tracking_uri": uri,
    }


def cause(error: BaseException) -> BaseException:
    """What a stage raised, out of the wrapping that a launcher put around it."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, GristmillError) else error


def failed(error: BaseException, seconds: float) -> Mapping[str, Any]:
    """The JSON of a run that did not end well."""
    status = "cancelled" if isinstance(error, KeyboardInterrupt) else "failed"
    return {"status": status, "wall_seconds": round(seconds, 2), "error": str(cause(error))}
