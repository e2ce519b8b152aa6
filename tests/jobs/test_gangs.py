"""What is made of the ways in which a gang of ranks can end."""

from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from jobs.gang_ray import explained
from pipeline.errors import EnvironmentProblem, Preempted, StageFailed, WorkerLost

LINK = RuntimeError("[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


def raised(error: Exception) -> Exception:
    return UserExceptionWithTraceback(error, traceback_str=f"Traceback ...\n{error!r}")


LOST = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({1: LOST, 0: raised(LINK)}, WorkerLost, "rank 0: RuntimeError: .*gloo.*rank 1: ActorDiedError"),
        ({0: raised(EnvironmentProblem("rank 1 did not hand in its part")), 1: LOST}, WorkerLost, "rank 1: ActorDied"),
        ({0: raised(LINK), 1: raised(LINK)}, WorkerLost, "rank 1: RuntimeError"),
        ({0: raised(Preempted("stopped after step 3")), 1: raised(LINK)}, Preempted, "stopped after step 3"),
        (
            {0: raised(RuntimeError("mat1 and mat2")), 1: raised(LINK)},
            StageFailed,
            "rank 0: RuntimeError: mat1 and mat2",
        ),
        ({0: raised(ZeroDivisionError("by zero"))}, StageFailed, "Traceback"),
    ],
    ids=["killed", "killed in mid-checkpoint", "no link", "preempted", "bug", "plain bug"],
)
def test_a_gang_that_fails_is_explained_by_its_cause(failures: dict[int, Any], kind: type[Exception], words: str):
    told = "\n".join(str(error) for error in failures.values())
    with pytest.raises(kind, match=f"(?s){words}"):
        raise explained("pretrain", WorkerGroupError(told, failures))
