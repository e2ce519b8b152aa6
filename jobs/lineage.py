"""From a registered model back to the raw data, as the tracking server tells it: no file of this machine is read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.mlflow_client import connect, reaching
from jobs.mlflow_tags import (
    COMMIT,
    DIGEST,
    DIRTY,
    KEY,
    KIND,
    REUSED_FROM,
    RUN,
    SOURCES,
    STAGE,
    URI,
    config_of,
    inputs_of,
    made,
)
from jobs.models import version_of
from jobs.track_mlflow import run_url, version_url
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

RUN_ID = re.compile(r"[0-9a-f]{32}")
RAW = ("corpus", "labels")
"""Kinds of stages that read raw data."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """An artifact that a stage used, under the name that the stage has for it."""

    name: str
    kind: str
    key: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One stage of a chain. Only key, kind and digest are known of one that no run of the server shows any more."""

    stage: str
    kind: str
    key: str
    output_digest: str
    run_id: str | None = None
    needs: Sequence[Need] = ()
    sources: Sequence[Mapping[str, Any]] = ()
    """`{"name", "uri", "digest", "files"}` of the raw data it read."""
    config: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool = False
    """Whether the code had changes that were not committed."""
    uri: str | None = None
    """Where the artifact was put when it was made."""
    url: str | None = None
    """The page of the run, where the tracking URI is a server's."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, str]:
        """`{name: content digest}` of what the stage used."""
        used = {need.name: need.digest for need in self.needs}
        return used | {source["name"]: source["digest"] for source in self.sources}

    def to_json(self) -> dict[str, Any]:
        names = ("stage", "run_id", "key", "inputs", "output_digest", "config", "commit", "dirty", "uri", "url")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A model and all it was made from: `stages` has users before what they use, so the raw data comes last.

    `model` and `version` are None for a run. `roots` are the keys that the walk began with.
    """

    stages: Sequence[Origin]
    roots: Sequence[str]
    model: str | None = None
    version: str | None = None
    aliases: Sequence[str] = ()
    url: str | None = None

    def stage(self, kind: str) -> Origin | None:
        """The stage of a kind that the model itself comes from; those of a rival come before it."""
        return next((stage for stage in reversed(self.stages) if stage.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        """The JSON of `gristmill lineage`. `corpus` and `labels` are the raw data, or None."""
        own = {"model": self.model, "version": self.version, "aliases": list(self.aliases), "url": self.url}
        return {**own, "stages": [s.to_json() for s in self.stages], **{kind: self._raw(kind) for kind in RAW}}

    def _raw(self, kind: str) -> dict[str, Any] | None:
        stage = self.stage(kind)
        source = dict(stage.sources[0]) if stage and stage.sources else None
        return source and {name: value for name, value in source.items() if name != "name"}


def lineage(model: str, uri: str) -> Lineage:
    """The chain behind NAME, NAME@ALIAS, models:/NAME/VERSION, or a run by its name or its MLflow id.

    Raises UsageError where there is no such model or run, or where it is not gristmill's; EnvironmentProblem where
    MLflow cannot be reached.
    """
    with reaching(uri):
        return trace(connect(uri), model)


def trace(client: "MlflowClient", model: str) -> Lineage:
    """As `lineage`, with a client."""
    walk = Walk(client)
    run = walk.run_named(model)
    if run is None:
        return of_version(client, version_of(client, model))
    keys = walk.results(run)
    if not keys:
        raise UsageError(f"run {model} has finished no stage yet, so there is nothing to follow")
    url = run_url(client.tracking_uri, run.info.experiment_id, run.info.run_id)
    return Lineage(stages=walk.back_from(keys), roots=keys, url=url)


def of_version(client: "MlflowClient", version: "ModelVersion") -> Lineage:
    """The chain behind one version of a registered model. Raises UsageError where it is not gristmill's."""
    name, number, key = version.name, str(version.version), version.tags.get(KEY)
    if key is None:
        raise UsageError(f"models:/{name}/{number} was not registered by gristmill, so nothing says what it is from")
    aliases = client.get_registered_model(name).aliases
    return Lineage(
        stages=Walk(client).back_from([key]),
        roots=[key],
        model=name,
        version=number,
        aliases=sorted(alias for alias, of in aliases.items() if str(of) == number),
        url=version_url(client.tracking_uri, name, number),
    )


class Walk:
    """Finds the stages of a tracking server by their keys, each once."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client
        self._experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        self._found: dict[str, Origin] = {}

    def back_from(self, keys: Sequence[str]) -> list[Origin]:
        """These stages and all they were made from, users first."""
        order: dict[str, Origin] = {}

        def visit(need: Need) -> None:
            if need.key in order:
                return
            origin = self._origin(need)
            for further in origin.needs:
                visit(further)
            order[need.key] = origin

        for key in keys:
            visit(Need(name="", kind="?", key=key, digest=""))
        return list(reversed(order.values()))

    def run_named(self, name: str) -> "Run | None":
        """The run of a pipeline or stage by its MLflow id, or of a pipeline by the name that gristmill gave it."""
        if RUN_ID.fullmatch(name):
            found = self._search(f"attributes.run_id = '{name}'")
            return found[0] if found else None
        if re.search(r"['/@]", name):
            return None
        return next((run for run in self._search(f"tags.`{RUN}` = '{name}'") if KEY not in run.data.tags), None)

    def results(self, run: "Run") -> list[str]:
        """Keys of what a run made or reused and used no further: its last stages. Of a stage's run: its own.

        Raises UsageError for a run of another kind: a search, or what another program made.
        """
        if KEY in run.data.tags:
            return [run.data.tags[KEY]]
        if RUN not in run.data.tags:
            raise UsageError(f"{run.info.run_id} is no run of a pipeline or stage, so nothing says what it is from")
        own = self._search(f"tags.`{RUN}` = '{run.data.tags[RUN]}' AND attributes.status = 'FINISHED'")
        makers = [run_id for tag, run_id in run.data.tags.items() if tag.startswith(f"{REUSED_FROM}.")]
        runs = [*own, *(self._client.get_run(run_id) for run_id in makers)]
        stages = [self._told_by(one) for one in runs if DIGEST in one.data.tags]
        used = {need.key for stage in stages for need in stage.needs}
        return sorted({stage.key for stage in stages} - used)

    def _origin(self, need: Need) -> Origin:
        if need.key not in self._found:
            runs = self._search(made(need.key))
            unknown = Origin(stage=need.kind, kind=need.kind, key=need.key, output_digest=need.digest)
            self._found[need.key] = self._told_by(runs[0]) if runs else unknown
        return self._found[need.key]

    def _search(self, clause: str) -> list["Run"]:
        return list(self._client.search_runs(self._experiments, clause, order_by=["attributes.start_time ASC"]))

    def _told_by(self, run: "Run") -> Origin:
        tags, kind = run.data.tags, run.data.tags[KIND]
        return Origin(
            stage=tags[STAGE],
            kind=kind,
            key=tags[KEY],
            output_digest=tags[DIGEST],
            run_id=run.info.run_id,
            needs=[Need(name=name, **needed) for name, needed in inputs_of(tags).items()],
            sources=json.loads(tags.get(SOURCES, "[]")),
            config=config_of(kind, run.data.params),
            commit=tags.get(COMMIT),
            dirty=tags.get(DIRTY) == str(True),
            uri=tags.get(URI),
            url=run_url(self._client.tracking_uri, run.info.experiment_id, run.info.run_id),
            metrics=run.data.metrics,
        )
