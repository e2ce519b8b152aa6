"""Run each stage as a Ray task: on a Ray of this machine, started for the run and gone with it, or on a cluster.

Ray reads its settings when it is imported, so it is imported inside the functions, after they are set.
"""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

from jobs.gang_ray import PATIENCE, RayGang, Workers
from pipeline.errors import EnvironmentProblem, GristmillError, WorkerLost, lacking
from pipeline.runner import Built, Job, Submit, build_one, slots
from pipeline.stage import Gang, Told, alone

T = TypeVar("T")
R = TypeVar("R")

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or worker prints come twice
    "RAY_worker_niceness": "0",  # the default, 15, starves training on a machine with other work
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # the default, one second, ends processes between two stages that the next one then starts anew
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}

WATCHED = 256
"""Tasks that are waited for at once, of all that are not done: Ray looks at each of them each time."""

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for "one machine only": without it Ray puts the machine's address in place of 127.0.0.1."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where stages run. `address` None is a Ray of this machine, with `cpus` slots, for this run alone."""

    home: Path
    cpus: int
    address: str | None = None
    workers: Workers = 1
    """Ranks of a stage that can use them."""
    timeout_seconds: float = 60.0


@contextmanager
def on_ray(options: RayOptions) -> Iterator[Submit]:
    """What submits jobs as tasks of a Ray, reached by the first of them: a run that reuses everything does without."""
    own = {} if options.address else {**token_settings(options.home), **LOOPBACK_ONLY}
    os.environ |= {**SETTINGS, **own, **os.environ}

    def submit(job: Job) -> "Future[Built]":
        import ray

        connected(options)
        wanted = slots(job.stage, options.cpus)
        own = _share(wanted, 1)
        gpus = min(1, int(ray.cluster_resources().get("GPU", 0))) if job.stage.resources.ranks else 0
        gang = _gang(options, wanted, gpus) if job.stage.resources.ranks else alone
        task = ray.remote(_build).options(
            num_cpus=own if gang is alone else 0,  # the slots are the ranks' to take
            num_gpus=gpus if gang is alone else 0,
            name=job.stage.name,
            max_retries=0,
        )
        return _told(job.stage.name, task.remote(job, own, gang).future())

    try:
        yield submit
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def connected(options: RayOptions) -> None:
    """Reach or start the Ray of an `on_ray` block, unless that has been done."""
    import ray

    if not ray.is_initialized():
        on_term = signal.getsignal(signal.SIGTERM)
        _connect(options)
        signal.signal(signal.SIGTERM, on_term)  # Ray puts its own in place, which only dies


def _gang(options: RayOptions, cpus: int, gpus: int) -> Gang:
    most = options.workers if isinstance(options.workers, int) else options.workers[1]
    if most == 1:
        return alone
    return RayGang(options.workers, _share(cpus, most), gpus, options.timeout_seconds)


def _share(cpus: int, ranks: int) -> int:
    """The slots of each of so many ranks, that together want `cpus`: no more than there are, or any machine has."""
    import ray

    there = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not any(there):  # the machines that compute are yet to come
        return max(1, cpus // ranks)
    return max(1, min(min(cpus, sum(there)) // ranks, max(there)))


def _connect(options: RayOptions) -> None:
    import ray

    quiet: dict[str, Any] = {
        "log_to_driver": True,
        "logging_level": logging.WARNING,
        "configure_logging": True,
    }
    if options.workers != 1:  # Ray Train's own code runs there too; else the processes that Ray has ready can be used
        settings = dict(PATIENCE)  # a copy, since Ray writes into it
        quiet["runtime_env"] = {"worker_process_setup_hook": speak_for_ourselves, "env_vars": settings}
    if options.address:
        try:
            ray.init(options.address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise EnvironmentProblem(f"no Ray cluster at {options.address}: {reason}") from error
        return
    ray.init("local", num_cpus=options.cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)


@cache
def speak_for_ourselves() -> None:
    """Once in a worker process: let our log through, and not what Ray Train has to say of its own workings."""
    import ray

    # or Ray's helpers look for a cluster on this machine, and may find somebody else's
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        # it asks the dashboard, which a local Ray does without, and has nothing to clean up there
        if failure.thread is None or failure.thread.name != "PlacementGroupCleanerMonitor":
            before(failure)

    threading.excepthook = hook


def _build(job: Job, cpus: int, gang: Gang) -> Built:
    speak_for_ourselves()
    own_disks = job.store.remote is not None
    here = replace(job, store=job.store.here())
    return build_one(here, map_=partial(ray_map, here=own_disks), gang=gang, cpus=cpus)


def _told(stage: str, running: "Future[Built]") -> "Future[Built]":
    """The same future, with what a stage raised in place of Ray's wrapping, and a lost process as WorkerLost."""
    told: Future[Built] = Future()

    def tell(done: "Future[Built]") -> None:
        error = done.exception()
        if error is None:
            told.set_result(done.result())
        else:
            told.set_exception(_explained(stage, error))

    running.add_done_callback(tell)
    return told


def _explained(stage: str, error: BaseException) -> BaseException:
    from ray.exceptions import RayError, RayTaskError

    cause = getattr(error, "cause", None)
    if isinstance(cause, GristmillError):
        return cause
    if cause and (problem := lacking(cause)):
        return problem
    lost = cause if isinstance(error, RayTaskError) else error  # or a process that the stage itself waited for
    if isinstance(lost, RayError) and not isinstance(lost, RayTaskError):
        return WorkerLost(f"{stage}: {type(lost).__name__}: {(str(lost).splitlines() or [''])[0]}")
    return error


def ray_map(function: Callable[[T], R], items: Sequence[T], told: Told, /, *, here: bool = False) -> list[R]:
    """`Map` as Ray tasks of one slot each; a stage that waits for them lends them its own.

    Raises what the first task to fail raised; those that have not begun then never do. `here` keeps them on this
    machine: they work on files of the stage, which another may not see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_apply).options(
        num_cpus=1,
        max_retries=0,
        scheduling_strategy=own if here else "DEFAULT",
        name=getattr(function, "__name__", None),
    )
    results = [task.remote(function, item) for item in items]
    waiting = results
    try:
        while waiting:
            done, left = ray.wait(waiting[:WATCHED])
            waiting = left + waiting[WATCHED:]
            ray.get(done)
            told(len(results) - len(waiting))
    finally:
        for result in waiting:
            ray.cancel(result)
    return ray.get(results)


def _apply(function: Callable[[T], R], item: T) -> R:
    from pipeline.tokens import one_thread

    speak_for_ourselves()
    with one_thread():  # a task has one slot
        return function(item)


def token_settings(home: Path) -> dict[str, str]:
    """A token that only this user can read: Ray listens on every interface and would write its own for all to read."""
    token = home / "ray-token"
    home.mkdir(parents=True, exist_ok=True)
    if not token.exists():
        # whole or not at all, and never replaced: of two runs that come first at once, both use the one that is there
        with NamedTemporaryFile("w", dir=home) as aside, suppress(FileExistsError):
            aside.write(secrets.token_hex(32))
            aside.flush()
            os.link(aside.name, token)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.resolve())}
