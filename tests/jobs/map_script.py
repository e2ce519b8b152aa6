"""Spread work over a Ray of this process's own. Arguments: a folder for its home and for what the work leaves."""

import errno
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.launch_ray import RayOptions, connected, on_ray, ray_map
from pipeline.runner import job_for
from pipeline.stage import Context, Resources, Stage
from pipeline.store import Store


def square(number: int) -> int:
    time.sleep(0.1 if number % 2 else 0.0)
    return number * number


def parallelism(_: int) -> str | None:
    return os.environ.get("TOKENIZERS_PARALLELISM")


def fail_at_first(item: tuple[str, int]) -> None:
    folder, number = item
    if number == 0:
        raise ValueError("the first of them")
    time.sleep(0.6)
    Path(folder, f"done-{number}").touch()


@dataclass(frozen=True, kw_only=True)
class Slots(Stage[None]):
    """A stage that takes all there are."""

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def run(self, ctx: Context) -> None:
        ctx.notes["cpus"] = ctx.cpus

    def load(self, path: Path) -> None: ...


class Full(Slots):
    """A stage whose disk is full."""

    def run(self, ctx: Context) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")


def main(folder: str) -> None:
    options = RayOptions(home=Path(folder), cpus=2)
    with on_ray(options):
        connected(options)
        told: list[int] = []
        found = {
            "squares": ray_map(square, range(9), told.append),
            "told": told,
            "nothing": ray_map(square, [], told.append),
            "parallelism": ray_map(parallelism, range(2), told.append),
        }
        try:
            ray_map(fail_at_first, [(folder, number) for number in range(40)], told.append)
        except ValueError as error:
            found["error"] = str(error)
        time.sleep(4.0)
        found["done"] = len(list(Path(folder).glob("done-*")))
        # as on a cluster none of whose machines has as many cores as the driver's
        with on_ray(replace(options, cpus=64)) as submit:
            found["large"] = submit(job_for(Slots(), Store(Path(folder)), {})).result(timeout=60).notes["cpus"]
            found["full"] = str(submit(job_for(Full(), Store(Path(folder)), {})).exception(timeout=60))
    Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
