"""One run from a config to a result: assemble, open the record, launch, mirror, show."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from jobs.console import RunView
from jobs.home import home
from jobs.journals import following
from jobs.mlflow_client import check_uri
from jobs.models import with_start
from jobs.params import shown_params
from jobs.record import OpenRecord, ended_by, open_record
from jobs.status import announce
from jobs.stopping import Stopping
from jobs.times import Times
from jobs.track_mlflow import Mirror, Mirrored
from pipeline import sources
from pipeline.assemble import Branch, Graph, assemble
from pipeline.config import flat, load
from pipeline.errors import UsageError, WorkerLost
from pipeline.identity import fingerprint
from pipeline.pipeline_config import PipelineConfig
from pipeline.runner import Built, Started, Submit, build, submit_here, topological
from pipeline.stage import alone
from pipeline.store import Store, log

MIRROR_SECONDS = 30.0
"""How long the end of a run waits for the tracking server before it leaves the rest to `gristmill sync`."""
LONGEST_PAUSE_SECONDS = 60.0


def tracking_uri(config: PipelineConfig | None = None) -> str:
    """The configured MLflow URI, or the sqlite file under `home()`. Raises UsageError where no MLflow could be."""
    chosen = (config.tracking.uri if config else None) or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        check_uri(chosen)
    return chosen or f"sqlite:///{(home() / 'mlflow.db').resolve()}"


@dataclass(frozen=True)
class Opened:
    """A config that has been read, and what follows from it."""

    config: PipelineConfig
    graph: Graph
    store: Store


def open_config(path: Path, overrides: Sequence[str]) -> Opened:
    config = load(PipelineConfig, path, overrides).config
    _refuse_data_around(home(), config)
    config = with_start(config, home(), tracking_uri(config))
    return Opened(config, assemble(config), Store(home(), config.cluster.store or os.environ.get("GRISTMILL_STORE")))


def _refuse_data_around(kept: Path, config: PipelineConfig) -> None:
    """Raises UsageError where a folder of texts would take in what runs write, which changes while it is read."""
    for key, value in flat(asdict(config)):
        if not key.endswith(".path") or not value:
            continue
        folder = sources.place(value).resolve()
        inside = kept.resolve()
        if inside.is_relative_to(folder) and not any(p.startswith(".") for p in inside.relative_to(folder).parts):
            raise UsageError(
                f"{key}={value}: runs write into {inside}, which is in that folder of texts. Name a folder, or a "
                "pattern such as *.txt, that leaves it out; or set GRISTMILL_HOME to another place"
            )


def run(
    path: Path, overrides: Sequence[str], *, inline: bool, view: RunView, began: float | None = None
) -> dict[str, Any]:
    """Build everything a config asks for; the result is the run's JSON contract. Raises GristmillError.

    `began` is when the run's time began to count, by time.monotonic; None is now.
    """
    times = Times(time.monotonic() if began is None else began)
    opened = open_config(path, overrides)
    config, graph, store = opened.config, opened.graph, opened.store
    uri = tracking_uri(config)
    for export in graph.exports:  # now, and not after hours of training
        export.check_installed()
    opening = open_record(
        store.home,
        config.name,
        fingerprint(config),
        stages=[(stage.name, stage.kind) for stage in topological(graph.targets)],
        params=shown_params(config),
        register_name=(config.register.name or config.name) if graph.exports else None,
        register_names=_register_names(config, graph),
        tracking_uri=uri,
        cpus=_cpus(config),
    )
    name = opening.record.run
    opened = replace(opened, store=replace(store, run=name))
    with Mirror(store.home, name, uri) as mirror, announce(store.home, name), opening as record:
        write_resolved(record.folder / "resolved.yaml", config)
        stopping = Stopping(record.folder, partial(_ask_to_stop, opened, record))
        with stopping, view, following(store, record):
            built = _build_all(opened, record, view, times, stopping, inline=inline)
        handed_over = time.monotonic()
        result: dict[str, Any] = {"name": config.name, "run": name} | _result(graph, store, built)
        record.finish("succeeded", result)
        mirrored = mirror.finish(MIRROR_SECONDS)
        registered = mirrored.model_uris if mirrored else {}  # none where the tracker could not be reached
        result |= _tracked(mirrored, uri) | _promoted(opened, registered, uri)
        for label, task in result.get("tasks", {}).items():
            export = graph.branches[label].export
            if export and export.name in registered:
                task["model_uri"] = registered[export.name]
        ended = time.monotonic()
        result |= {"wall_seconds": round(ended - times.began, 2), "seconds": times.split(handed_over, ended)}
        record.finish("succeeded", result)
        return result


def _build_all(
    opened: Opened, record: OpenRecord, view: RunView, times: Times, stopping: Stopping, *, inline: bool
) -> list[Built]:
    """Build every stage. A lost worker or machine costs what was done since the last checkpoint, and some patience."""
    cluster, cpus = opened.config.cluster, _cpus(opened.config)
    losses, reached = 0, None
    while True:
        try:
            with launcher(opened, cpus, inline=inline) as submit:
                events = build(opened.graph.targets, opened.store, submit, cpus=cpus)
                noted = [_note(event, opened.store, record, view, times) for event in events]
                return [event for event in noted if isinstance(event, Built)]
        except WorkerLost as loss:
            stopping.end_if_asked()  # whoever stops a run may signal its workers too
            before, reached = reached, _reached(opened.store, record)
            losses = losses + 1 if reached == before else 1
            if losses > cluster.retries:
                raise
            pause = min(2.0**losses, LONGEST_PAUSE_SECONDS)
            log.warning("%s\nGoing on in %.0f s (loss %d of at most %d).", loss, pause, losses, cluster.retries)
            time.sleep(pause)
            stopping.end_if_asked()


def _register_names(config: PipelineConfig, graph: Graph) -> dict[str, str]:
    """The names that tasks give to their models, by export stage."""
    given = {name: task.register.name for name, task in config.tasks.items()}
    return {b.export.name: own for name, b in graph.branches.items() if b.export and (own := given.get(name))}


def _cpus(config: PipelineConfig) -> int:
    return config.cluster.cpus or len(os.sched_getaffinity(0))


def _reached(store: Store, record: OpenRecord) -> list[tuple[str, str, list[int]]]:
    """How far a run has come: its stages, and the steps of the checkpoints of those that are not finished."""
    stages = record.record.stages
    return [(s.name, s.status, store.shelf(s.kind, s.key).steps() if s.key else []) for s in stages]


def _ask_to_stop(opened: Opened, record: OpenRecord) -> bool:
    """Ask the trainings that run to stop at a checkpoint; tells whether there is one."""
    ranks = {stage.name for stage in opened.graph.targets if stage.resources.ranks}
    running = [s for s in record.record.stages if s.status == "running" and s.key and s.name in ranks]
    for stage in running:
        opened.store.request_stop(stage.kind, str(stage.key))
    return bool(running)


def write_resolved(path: Path, config: PipelineConfig) -> None:
    """Keep a config with every default filled in: what a run really used."""
    with path.open("w") as out:
        YAML().dump(json.loads(json.dumps(asdict(config))), out)


def _note(event: Started | Built, store: Store, record: OpenRecord, view: RunView, times: Times) -> Started | Built:
    """Show and write down that a stage began or ended."""
    view.show(event)
    times.note(event)
    if isinstance(event, Started):
        store.clear_stop(event.stage.kind, event.key)
        record.started(event.stage.name, event.key)
    else:
        _bring(event, store)
        record.ended(event.stage.name, event.key, event.status, event.seconds)
    return event


def _bring(built: Built, store: Store) -> None:
    """What was built elsewhere is shown and used from here: its artifact and its journal."""
    if store.remote:
        store.pull_journal(built.stage.kind, built.key)
    if store.remote and built.status == "built":
        store.fetch(built.stage.kind, built.key)


@contextmanager
def launcher(opened: Opened, cpus: int, *, inline: bool) -> Iterator[Submit]:
    """How stages are executed: one after the other in this process, or as tasks of a Ray, its own or a cluster's."""
    cluster = opened.config.cluster
    most = cluster.workers if isinstance(cluster.workers, int) else cluster.workers[1]
    if inline:
        from jobs.gang_local import LocalGang

        gang = alone if most == 1 else LocalGang(most, max(1, cpus // most), cluster.timeout_seconds)
        yield lambda job: submit_here(job, gang=gang, cpus=cpus)
        return
    from jobs.launch_ray import RayOptions, on_ray

    options = RayOptions(
        home=opened.store.home,
        cpus=cpus,
        address=cluster.address or os.environ.get("RAY_ADDRESS"),
        workers=cluster.workers,
        timeout_seconds=cluster.timeout_seconds,
    )
    with on_ray(options) as submit:
        yield submit


def _result(graph: Graph, store: Store, built: Sequence[Built]) -> dict[str, Any]:
    by_name = {b.stage.name: b for b in built}
    stages = [
        {"name": b.stage.name, "key": b.key, "status": b.status, "seconds": round(b.seconds, 2)}
        for b in (by_name[stage.name] for stage in topological(graph.targets))
    ]
    result: dict[str, Any] = {"status": "succeeded", "stages": stages}
    tasks = {
        name: _scores(branch, store, {stage.name: by_name[stage.name].key for stage in branch.stages})
        for name, branch in graph.branches.items()
    }
    return result | tasks[""] if "" in tasks else result | ({"tasks": tasks} if tasks else {})


def _scores(branch: Branch, store: Store, keys: Mapping[str, str]) -> dict[str, Any]:
    """What a run says of one task: where its model and its report are, and how good it is."""
    where = {"export_dir": str(store.path("export", keys[branch.export.name]))} if branch.export else {}
    report_dir = store.path("evaluate", keys[branch.evaluate.name])
    scores = branch.evaluate.load(report_dir).scores
    measured = ("accuracy", "accuracy_ci", "macro_f1", "macro_f1_ci", "micro_f1", "ece", "seeds")
    wanted = (*measured, "baseline", "baselines", "random_init")
    calibrated = {"ece_calibrated": scores["calibrated"]["ece"]}
    found = {name: scores[name] for name in wanted if name in scores}
    return where | found | calibrated | {"report_dir": str(report_dir)}


def _tracked(mirrored: Mirrored | None, uri: str) -> dict[str, Any]:
    return {
        "model_uri": mirrored and mirrored.model_uri,
        "mlflow_run_id": mirrored and mirrored.run_id,
        "tracking_uri": uri,
    }


def _promoted(opened: Opened, registered: Mapping[str, str], uri: str) -> dict[str, Any]:
    """What became of the promotions that the config asks for; `registered` is what there is, by export stage."""
    config, branches = opened.config, opened.graph.branches
    wanted = [name for name, task in config.all_tasks.items() if task.register.promote or config.register.promote]
    exports = [export.name for name in wanted if (export := branches[name].export)]
    if not exports:
        return {}
    from jobs.promote import promote_after_run

    model_uris = [registered[export] for export in exports if export in registered]
    return {"promotions": promote_after_run(model_uris, opened.store.home, uri)}


def failed(error: BaseException, seconds: float) -> Mapping[str, Any]:
    """The JSON of a run that did not end well."""
    return {"status": ended_by(type(error)), "wall_seconds": round(seconds, 2), "error": str(error)}
