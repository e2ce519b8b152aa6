"""Ways in which a gang of ranks can end, and what is made of each: `{case: [kind of error, its message]}` as JSON.

A script, since whoever imports Ray settles for good whether this process may talk to a Ray with a token.
"""

import json
from typing import Any

from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from jobs.gang_ray import explained
from pipeline.errors import EnvironmentProblem, Preempted

LINK = RuntimeError("[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
LOST = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def raised(error: Exception) -> Exception:
    return UserExceptionWithTraceback(error, traceback_str=f"Traceback ...\n{error!r}")


CASES: dict[str, dict[int, Any]] = {
    "killed": {1: LOST, 0: raised(LINK)},
    "killed in mid-checkpoint": {0: raised(EnvironmentProblem("rank 1 did not hand in its part")), 1: LOST},
    "no link": {0: raised(LINK), 1: raised(LINK)},
    "preempted": {0: raised(Preempted("stopped after step 3")), 1: raised(LINK)},
    "bug": {0: raised(RuntimeError("mat1 and mat2")), 1: raised(LINK)},
    "plain bug": {0: raised(ZeroDivisionError("by zero"))},
}


def ending(failures: dict[int, Any]) -> list[str]:
    told = "\n".join(str(error) for error in failures.values())
    error = explained("pretrain", WorkerGroupError(told, failures))
    return [type(error).__name__, str(error)]


if __name__ == "__main__":
    print(json.dumps({case: ending(failures) for case, failures in CASES.items()}))  # noqa: T201
