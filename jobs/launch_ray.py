"""Run each stage as a Ray task on a cluster of this machine, started for the run and gone with it."""

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import ray

from pipeline.runner import Built, Job, Submit, build_one

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def local_ray(home: Path, cpus: int) -> Iterator[Submit]:
    """A Ray of `cpus` slots for the length of the block; submitted jobs are its tasks, and end with it."""
    _authenticate(home)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")  # for the processes that ray.init starts
    ray.init(
        "local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
        configure_logging=True,
        _node_ip_address="127.0.0.1",
    )

    def submit(job: Job) -> "Future[Built]":
        slots = min(cpus, job.stage.resources.cpus or cpus)
        options = {"num_cpus": slots, "num_gpus": job.stage.resources.gpus, "name": job.stage.name, "max_retries": 0}
        return ray.remote(_build).options(**options).remote(job, slots).future()

    try:
        yield submit
    finally:
        ray.shutdown()


def _build(job: Job, cpus: int) -> Built:
    return build_one(job, map_=ray_map, cpus=cpus)


def ray_map(function: Callable[[T], R], items: Iterable[T], /) -> list[R]:
    """`Map` as Ray tasks of one slot each; a stage that waits for them lends them its own slot."""
    task = ray.remote(function).options(num_cpus=1, max_retries=0)
    return ray.get([task.remote(item) for item in items])


def _authenticate(home: Path) -> None:
    """Give Ray a token that only this user can read: Ray listens on every interface and would write its own for all."""
    token = home / "ray-token"
    home.mkdir(parents=True, exist_ok=True)
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token.resolve()))
