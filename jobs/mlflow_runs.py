"""Runs in MLflow: one parent for a record, one child for each artifact it made, found by tag or created."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from jobs.cost import cost
from jobs.mlflow_client import artifact_root
from jobs.mlflow_points import Offsets, journals, points_after
from jobs.mlflow_tags import ATTEMPT, COMMIT, DIRTY, IMAGE, JOB, KEY, KIND, NOTE, PLAN, REUSED_FROM, RUN, STAGE, made
from jobs.record import Record, StageRecord, folder, is_live, slug
from pipeline.store import Store

T = TypeVar("T")

POINTS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
KIND_OF_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the view for model training; without it the page opens in the one for language-model applications."""


@dataclass
class Book:
    """One record and what MLflow has of it: `parent`, and `children` by artifact key.

    `makers` are runs of other records that have been looked for, by key.
    """

    client: MlflowClient
    home: Path
    record: Record
    experiment: Experiment
    parent: Run
    children: dict[str, Run] = field(default_factory=dict)
    makers: dict[str, Run | None] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return Store(self.home)


def open_book(client: MlflowClient, home: Path, record: Record) -> Book:
    """Find the runs of a record, and make the parent where there is none."""
    experiment = experiment_named(client, home, record.name)
    found = client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = '{record.run}'", max_results=1000)
    runs = _one_each(client, found)
    parent = runs.pop("", None) or _create_parent(client, experiment, record)
    book = Book(client, home, record, experiment, parent, runs)
    _describe(book)
    return book


def _one_each(client: MlflowClient, found: Sequence[Run]) -> dict[str, Run]:
    """Runs by artifact key, the parent by "". A server that answered too late may have made two: one stays."""
    kept: dict[str, Run] = {}
    for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id)):
        if kept.setdefault(run.data.tags.get(KEY, ""), run) is not run:
            client.delete_run(run.info.run_id)
    return kept


def experiment_named(client: MlflowClient, home: Path, name: str) -> Experiment:
    """The experiment of a pipeline, made where there is none."""
    if known := client.get_experiment_by_name(name):
        return known
    root = None if _is_server(client) else (artifact_root(home) / slug(name)).as_uri()
    try:
        client.create_experiment(name, artifact_location=root, tags=KIND_OF_EXPERIMENT)
    except MlflowException as error:  # another home that writes to the same server was quicker
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.get_experiment_by_name(name)
    assert created is not None, "an experiment that was just created"
    return created


def _is_server(client: MlflowClient) -> bool:
    return client.tracking_uri.startswith(("http://", "https://"))


def _create_parent(client: MlflowClient, experiment: Experiment, record: Record) -> Run:
    tags = {RUN: record.run, PLAN: record.plan}
    return client.create_run(experiment.experiment_id, record.started_ms, tags, record.run)


def _describe(book: Book) -> None:
    """Params once, since MLflow refuses a changed one. The attempt tag comes last, and says that the rest is there."""
    client, record, parent = book.client, book.record, book.parent
    if parent.data.tags.get(ATTEMPT) == str(record.attempt):
        return
    log_params(client, parent, {name: str(value) for name, value in record.params.items()})
    resolved = folder(book.home, record.run) / "resolved.yaml"
    if resolved.exists():
        client.log_artifact(parent.info.run_id, str(resolved))
    set_tags(client, parent.info.run_id, made_by(record))


def made_by(record: Record) -> dict[str, str]:
    """Tags that say what code worked on a run, where, and in which attempt."""
    tags = {
        "mlflow.source.name": "gristmill",
        "mlflow.source.type": "LOCAL" if record.job_id is None else "JOB",
        "mlflow.source.git.commit": record.commit,
        COMMIT: record.commit,
        DIRTY: record.dirty,
        IMAGE: record.image,
        JOB: record.job_id,
        ATTEMPT: record.attempt,
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def log_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    """Log the params that a run does not have."""
    new = [Param(name, value) for name, value in params.items() if name not in run.data.params]
    for part in _parts(new, PARAMS_PER_REQUEST):
        client.log_batch(run.info.run_id, params=part)


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def child_for(book: Book, number: int, stage: StageRecord) -> Run | None:
    """The run of a stage that this record made; None for one that has nothing to show, or is another run's work."""
    if stage.key is None:
        return None
    if own := book.children.get(stage.key):
        return own
    if stage.status == "pending" and not _has_points(book, stage.kind, stage.key):
        return None
    unbuilt = stage.status in ("running", "pending")
    being_checked = unbuilt and book.store.find(stage.kind, stage.key) is not None
    if being_checked or (stage.status != "built" and _made_elsewhere(book, stage)):
        return None
    book.children[stage.key] = _create_child(book, number, stage)
    return book.children[stage.key]


def _has_points(book: Book, kind: str, key: str) -> bool:
    return any(True for journal in journals(book.store, kind, key).values() for _ in points_after(journal, 0))


def _create_child(book: Book, number: int, stage: StageRecord) -> Run:
    assert stage.key is not None, "a stage that has a run has a key"
    tags = {
        "mlflow.parentRunId": book.parent.info.run_id,
        RUN: book.record.run,
        STAGE: stage.name,
        KIND: stage.kind,
        KEY: stage.key,
        **made_by(book.record),
    }
    return book.client.create_run(book.experiment.experiment_id, stage.started_ms, tags, f"{number}-{stage.name}")


def _made_elsewhere(book: Book, stage: StageRecord) -> bool:
    """Whether another run made this artifact, and the parent is tagged with it, or is at work on it now."""
    tag = f"{REUSED_FROM}.{stage.name}"
    if tag in book.parent.data.tags:
        return True
    maker = maker_of(book, str(stage.key))
    if maker and stage.status == "reused":
        set_tags(book.client, book.parent.info.run_id, {tag: maker.info.run_id})
    return maker is not None or _at_work_elsewhere(book, str(stage.key))


def _at_work_elsewhere(book: Book, key: str) -> bool:
    """Whether the run that shows this stage now is another one of this home, whose process lives."""
    running = runs_anywhere(book.client, f"tags.`{KEY}` = '{key}' AND attributes.status = 'RUNNING'")
    return any(is_live(book.home, run.data.tags[RUN]) for run in running if RUN in run.data.tags)


def maker_of(book: Book, key: str) -> Run | None:
    """The run that shows how an artifact was made: of this record, or the oldest finished one anywhere."""
    if key in book.children:
        return book.children[key]
    if key not in book.makers:
        book.makers[key] = next(iter(runs_anywhere(book.client, made(key))), None)
    return book.makers[key]


def runs_anywhere(client: MlflowClient, clause: str) -> list[Run]:
    """The runs of every experiment that a clause finds, oldest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, clause, order_by=["start_time ASC"]))


def send_points(book: Book, child: Run, stage: StageRecord) -> None:
    """Send the journal lines that this run does not have. A line sent twice makes one point: its time is fixed."""
    assert stage.key is not None, "a stage that has a run has a key"
    for name, journal in journals(book.store, stage.kind, stage.key).items():
        _send_journal(book, child.info.run_id, name, journal)


def _send_journal(book: Book, run_id: str, name: str, journal: Path) -> None:
    offsets = Offsets.of(book.home, book.record.run)
    batch: list[Metric] = []
    sent = end = offsets.get(name, run_id)
    for point, end in points_after(journal, sent):
        batch += [Metric(name, value, point.timestamp_ms, point.step) for name, value in point.metrics.items()]
        if len(batch) >= POINTS_PER_REQUEST:
            log_metrics(book.client, run_id, batch)
            offsets.put(name, run_id, end)
            batch = []
    log_metrics(book.client, run_id, batch)
    if end != sent:
        offsets.put(name, run_id, end)


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    for part in _parts(metrics, POINTS_PER_REQUEST):
        client.log_batch(run_id, metrics=part)


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def end(book: Book, run: Run, status: str, end_ms: int | None) -> None:
    """Give a run its status, last of all: a finished child says that everything of it is there."""
    if run.info.status == status:
        return
    if status == "RUNNING":
        book.client.update_run(run.info.run_id, status)
    else:
        book.client.set_terminated(run.info.run_id, status, end_ms or time.time_ns() // 1_000_000)


def close(book: Book) -> None:
    """Bring the parent to the state of the record; a child that nobody works on any more ends with it."""
    status = parent_status(book)
    if status != "RUNNING":
        _end_abandoned(book)
        log_metrics(book.client, book.parent.info.run_id, _headline(book))
    if status == "FINISHED" and book.parent.info.status != status:
        _upload_reports(book)
    end(book, book.parent, status, book.record.finished_ms)


def note(book: Book, text: str) -> None:
    """Show this Markdown on the page of the run, if it does not show it yet."""
    if book.parent.data.tags.get(NOTE) != text:
        set_tags(book.client, book.parent.info.run_id, {NOTE: text})


def _end_abandoned(book: Book) -> None:
    for known in book.children.values():
        if known.info.status == "RUNNING":
            child = book.client.get_run(known.info.run_id)  # it may have ended since the book was opened
            if child.info.status == "RUNNING":
                end(book, child, "KILLED", book.record.finished_ms)


def parent_status(book: Book) -> str:
    """The MLflow status of a record. One that says running but that no process holds was killed."""
    record = book.record
    if record.status == "running":
        return "RUNNING" if is_live(book.home, record.run) else "KILLED"
    return {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "preempted": "KILLED"}[record.status]


def _headline(book: Book) -> list[Metric]:
    """The numbers of the result, the time since the run began, and what it cost; a step an attempt."""
    record = book.record
    if record.finished_ms is None:
        return []
    seconds = {"wall_seconds": (record.finished_ms - record.started_ms) / 1000}
    scores = {f"{task}{name}": value for task, told in _told(record).items() for name, value in told.items()}
    return numbers({**scores, **seconds, **cost(record, book.store)}, record.finished_ms, step=record.attempt)


def _upload_reports(book: Book) -> None:
    for task, told in _told(book.record).items():
        report = Path(told["report_dir"], "report.html") if "report_dir" in told else None
        if report and report.is_file():
            book.client.log_artifact(book.parent.info.run_id, str(report), task.rstrip("/") or None)


def _told(record: Record) -> dict[str, Mapping[str, Any]]:
    """What a result says of the run or its only task, by ""; and of each of several, by `TASK/`."""
    result = record.result or {}
    return {"": result, **{f"{name}/": told for name, told in result.get("tasks", {}).items()}}


def numbers(values: Mapping[str, object], timestamp_ms: int, step: int = 0) -> list[Metric]:
    """The finite numbers among some values, as metrics."""
    kept = {n: float(v) for n, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    return [Metric(name, value, timestamp_ms, step) for name, value in kept.items()]
