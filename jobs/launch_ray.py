"""Run each stage as a Ray task on a cluster of this machine, started for the run and gone with it.

Ray reads its settings when it is imported, so it is imported inside the functions, after they are set.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.runner import Built, Job, Submit, build_one, slots

T = TypeVar("T")
R = TypeVar("R")

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or worker prints come twice
    "RAY_worker_niceness": "0",  # the default, 15, starves training on a machine with other work
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def local_ray(home: Path, cpus: int) -> Iterator[Submit]:
    """A Ray of `cpus` slots for the length of the block; submitted jobs are its tasks, and end with it.

    It is started by the first job: a run that reuses everything does without.
    """
    os.environ |= {**SETTINGS, **_token(home), **os.environ}

    def submit(job: Job) -> "Future[Built]":
        import ray

        if not ray.is_initialized():
            _start(cpus)
        own = slots(job.stage, cpus)
        options = {"num_cpus": own, "num_gpus": job.stage.resources.gpus, "name": job.stage.name, "max_retries": 0}
        return ray.remote(_build).options(**options).remote(job, own).future()

    try:
        yield submit
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def _start(cpus: int) -> None:
    import ray

    ray.init(
        "local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
        configure_logging=True,
        _node_ip_address="127.0.0.1",
    )


def _build(job: Job, cpus: int) -> Built:
    return build_one(job, map_=ray_map, cpus=cpus)


def ray_map(function: Callable[[T], R], items: Iterable[T], /) -> list[R]:
    """`Map` as Ray tasks of one slot each; a stage that waits for them lends them its own."""
    import ray

    task = ray.remote(function).options(num_cpus=1, max_retries=0)
    return ray.get([task.remote(item) for item in items])


def _token(home: Path) -> dict[str, str]:
    """A token that only this user can read: Ray listens on every interface and would write its own for all to read."""
    token = home / "ray-token"
    home.mkdir(parents=True, exist_ok=True)
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.resolve())}
