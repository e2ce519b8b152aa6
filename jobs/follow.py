"""Follow a job's log to its end, whatever happens to the connection: no line is lost, and none comes twice."""

import time
from collections.abc import Callable
from contextlib import suppress

from jobs.ray_jobs import Job, Jobs, Unreachable
from jobs.status import hide

SHORTEST_SECONDS, LONGEST_SECONDS = 0.5, 30.0
REST_PER_READ = 5
"""A log is always read whole: the longer that takes, the longer the rest before the next time."""
PATIENCE_SECONDS = 600.0
"""How long a cluster may be away before following it is given up."""


def follow(jobs: Jobs, job: str, write: Callable[[str], None], say: Callable[[str], None]) -> Job | None:
    """Write a job's log as it grows, in whole lines, and give back the job once it has ended.

    None where the cluster no longer knows the job. Raises Unreachable when it has been away for PATIENCE_SECONDS.
    """
    written, last_heard = 0, time.monotonic()
    while True:
        began = time.monotonic()
        try:
            found = jobs.find(job)  # before the log: of a job that has ended, the log is whole
            log = jobs.log(job) if found else ""
        except Unreachable as problem:
            if began - last_heard > PATIENCE_SECONDS:
                raise
            if began - last_heard > LONGEST_SECONDS / 2:
                say(f"{problem} Trying again")
            time.sleep(min(LONGEST_SECONDS, max(SHORTEST_SECONDS, (began - last_heard) / 4)))
            continue
        if found is None:
            return None
        last_heard = time.monotonic()
        end = len(log) if found.ended else log.rfind("\n") + 1
        if end > written:
            write(hide(log[written:end]))
            written = end
        if found.ended:
            return found
        rest = REST_PER_READ * (last_heard - began)
        time.sleep(min(LONGEST_SECONDS, max(SHORTEST_SECONDS, rest)))


def wait_until_ended(jobs: Jobs, job: str, seconds: float) -> bool:
    """Whether a job has ended, or is known no longer, within that time; a connection may be lost meanwhile."""
    until = time.monotonic() + seconds
    while True:
        with suppress(Unreachable):
            found = jobs.find(job)
            if found is None or found.ended:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(SHORTEST_SECONDS)
