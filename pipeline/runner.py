"""Build what is missing, reuse what is there: a stage runs after what it needs, once, and only if its key is new."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from pipeline.errors import DamagedArtifact, DataError
from pipeline.faults import fault_point
from pipeline.identity import changes, fingerprint
from pipeline.stage import Context, Gang, Map, Stage, alone, plain_map
from pipeline.store import Store, log
from pipeline.tracking import Recorder

Status = Literal["built", "reused"]


@dataclass(frozen=True)
class Planned:
    """What a run would do with one stage. `key` is None while an input that decides it is not built yet."""

    stage: Stage[Any]
    key: str | None
    status: Status
    reasons: list[str]


@dataclass(frozen=True)
class Job:
    """One stage with everything needed to build it in any process."""

    stage: Stage[Any]
    store: Store
    key: str
    recipe: dict[str, Any] = field(repr=False)
    keys: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Started:
    stage: Stage[Any]
    key: str


@dataclass(frozen=True)
class Built:
    """A stage whose artifact is there. `digest` is the digest of its bytes; `notes` come from whoever built it."""

    stage: Stage[Any]
    key: str
    status: Status
    seconds: float
    digest: str
    notes: Mapping[str, Any] = field(repr=False)


Submit = Callable[[Job], "Future[Built]"]
"""How one job is executed: here (`submit_here`), or on a cluster (`jobs/launch_ray.py`)."""


def topological(targets: Sequence[Stage[Any]]) -> list[Stage[Any]]:
    """The targets and every stage they need, inputs first, each once."""
    order: dict[str, Stage[Any]] = {}

    def visit(stage: Stage[Any]) -> None:
        for needed in stage.inputs.values():
            visit(needed)
        known = order.setdefault(stage.name, stage)
        assert known == stage, f"two different stages are called {stage.name}: give one a label"

    for target in targets:
        visit(target)
    return list(order.values())


def plan(targets: Sequence[Stage[Any]], store: Store) -> list[Planned]:
    """What `build` would do, without doing it, and why: for a miss, the fields that differ from the newest artifact."""
    digests: dict[str, str | None] = {}
    planned: list[Planned] = []
    for stage in topological(targets):
        inputs = {name: digests[needed.name] for name, needed in stage.inputs.items()}
        entry, digests[stage.name] = _plan_one(stage, inputs, store)
        planned.append(entry)
    return planned


def _plan_one(stage: Stage[Any], inputs: Mapping[str, str | None], store: Store) -> tuple[Planned, str | None]:
    recipe = stage.recipe({name: digest or "to be rebuilt" for name, digest in inputs.items()})
    if None in inputs.values():
        return Planned(stage, None, "built", explain(recipe, stage, store)), None
    key = fingerprint(recipe)
    if manifest := store.find(stage.kind, key):
        return Planned(stage, key, "reused", ["same recipe, same inputs"]), manifest.digest
    return Planned(stage, key, "built", explain(recipe, stage, store)), None


def explain(recipe: dict[str, Any], stage: Stage[Any], store: Store) -> list[str]:
    """Why no artifact fits this recipe: how it differs from the nearest one, by the keys that a config has."""
    differences = [changes(manifest.meta["recipe"], recipe) for manifest in store.manifests(stage.kind)]
    if not differences:
        return [f"no {stage.kind} has been built yet"]
    nearest = min(differences, key=len)
    section = stage.section or stage.kind
    return [re.sub(r"^config\.", f"{section}.", line) for line in nearest] or ["its artifact is incomplete"]


def build(targets: Sequence[Stage[Any]], store: Store, submit: Submit, *, cpus: int = 1) -> Iterator[Started | Built]:
    """Make every target, and yield an event as each stage starts and ends.

    Stages with no path between them overlap as far as `cpus` go. Where they compete, what reads from outside goes
    first, then the earlier in the pipeline; one that fits beside those that run does not wait for one that needs all
    `cpus`. Raises what a stage raised, as soon as it is known; the caller shuts the launcher down.
    """
    waiting = topological(targets)
    done: dict[str, Built] = {}
    running: dict[Future[Built], Stage[Any]] = {}
    while waiting or running:
        while (stage := _next(waiting, done, cpus - sum(slots(s, cpus) for s in running.values()), cpus)) is not None:
            waiting.remove(stage)
            job = job_for(stage, store, done)
            yield Started(stage, job.key)
            if reused := reuse(job):
                done[stage.name] = reused
                yield reused
            else:
                running[submit(job)] = stage
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            del running[future]
            built = future.result()
            done[built.stage.name] = built
            yield built


def slots(stage: Stage[Any], cpus: int) -> int:
    """How many of `cpus` a stage takes up."""
    return min(cpus, stage.resources.cpus or cpus)


def _next(waiting: Sequence[Stage[Any]], done: Mapping[str, Built], free: int, cpus: int) -> Stage[Any] | None:
    """The first stage whose inputs are done and that fits.

    One without inputs goes before: it reads what somebody gave, and a mistake there is told before hours of training.
    """
    ready = [stage for stage in waiting if all(needed.name in done for needed in stage.inputs.values())]
    fitting = (stage for stage in ready if slots(stage, cpus) <= free)
    return min(fitting, key=lambda stage: bool(stage.inputs), default=None)


def job_for(stage: Stage[Any], store: Store, done: Mapping[str, Built]) -> Job:
    """The job of a stage whose inputs are all done."""
    digests = {name: done[needed.name].digest for name, needed in stage.inputs.items()}
    recipe = stage.recipe(digests)
    return Job(stage, store, fingerprint(recipe), recipe, {name: built.key for name, built in done.items()})


def submit_here(job: Job, *, gang: Gang = alone, cpus: int = 1) -> "Future[Built]":
    """Run a job now, in this process."""
    future: Future[Built] = Future()
    future.set_result(build_one(job, gang=gang, cpus=cpus))
    return future


def build_one(job: Job, *, map_: Map = plain_map, gang: Gang = alone, cpus: int = 1) -> Built:
    """Build one stage in this process, unless its artifact is already there and every byte of it is right."""
    start = time.monotonic()
    with job.store.lock(job.stage.kind, job.key):
        if reused := reuse(job):  # another process may have built it meanwhile
            return reused
        _run(job, map_, gang, cpus)
    built = reuse(job)
    assert built is not None, "the artifact was published under the lock"
    return replace(built, status="built", seconds=time.monotonic() - start)


def reuse(job: Job) -> Built | None:
    """The artifact of a job if it is there already, every byte of it checked; a damaged one is none, and is told.

    With a remote store it is then both here and there, whichever had it.
    """
    start = time.monotonic()
    if job.store.find(job.stage.kind, job.key) is None:
        return None
    try:
        manifest = job.store.fetch(job.stage.kind, job.key)
    except DamagedArtifact as damage:
        log.warning("%s Rebuilding it now.", damage)
        job.store.drop_remote(job.stage.kind, job.key)
        return None
    job.store.share(job.stage.kind, job.key)
    job.store.forget_work(job.stage.kind, job.key)
    notes = manifest.meta.get("notes", {})
    return Built(job.stage, job.key, "reused", time.monotonic() - start, manifest.digest, notes)


def _run(job: Job, map_: Map, gang: Gang, cpus: int) -> None:
    stage, store = job.stage, job.store
    notes: dict[str, Any] = {}
    meta = {"kind": stage.kind, "key": job.key, "recipe": job.recipe, "input_keys": _input_keys(job), "notes": notes}
    work = store.work(stage.kind, job.key)
    work.mkdir(parents=True, exist_ok=True)
    store.pull_journal(stage.kind, job.key)  # a machine that was lost may have recorded more than this one
    send = partial(store.push_journal, stage.kind, job.key) if store.remote else None
    tracker = Recorder(store.journal(stage.kind, job.key), send)
    start = time.monotonic()
    fault_point("stage.begin")
    try:
        _check_sources(job)
        with store.writing(stage.kind, job.key, meta) as out:
            stage.run(
                Context(
                    store=store,
                    kind=stage.kind,
                    key=job.key,
                    keys=job.keys,
                    out=out,
                    work=work,
                    tracker=tracker,
                    map=map_,
                    gang=gang,
                    cpus=cpus,
                    notes=notes,
                )
            )
            _check_sources(job)
            notes["seconds"] = round(time.monotonic() - start, 3)
    finally:
        tracker.close()


def _check_sources(job: Job) -> None:
    """Raises DataError unless what is read from outside the store is still what the key was made of."""
    if dict(job.stage.sources()) != job.recipe["sources"]:
        raise DataError(
            f"{job.stage.name}: the files it reads changed after this run had first looked at them. "
            "Run again once nothing writes to them"
        )


def _input_keys(job: Job) -> dict[str, dict[str, str]]:
    return {
        name: {"kind": needed.kind, "key": job.keys[needed.name], "digest": job.recipe["inputs"][name]}
        for name, needed in job.stage.inputs.items()
    }
