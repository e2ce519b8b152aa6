"""What can go wrong for a user, and the exit code that says so. Anything else that escapes is a bug."""

import errno
from typing import ClassVar


class GristmillError(Exception):
    """A failure that one clear message explains: what, where, the value, the remedy."""

    exit_code: ClassVar[int] = 5


class UsageError(GristmillError):
    """The command, config or data given is wrong. Nothing has been built from it."""

    exit_code = 2


class DataError(UsageError):
    """An input file cannot be used as it is. The message starts with `file:line`."""


class EnvironmentProblem(GristmillError):
    """Something outside the config is missing or unreachable: a package, a device, a server, disk space."""

    exit_code = 3


NO_ROOM_OR_RIGHT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def lacking(error: BaseException) -> EnvironmentProblem | None:
    """What an error says that comes of a full or forbidden disk, as a problem of the environment; of another, None."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM_OR_RIGHT:
        return None
    return EnvironmentProblem(
        f"{error.filename or 'writing'}: {error.strerror}. Make room or give rights; then run again"
    )


class GateFailed(GristmillError):
    """A model is not good enough for what it was meant to become. Nothing has been changed."""

    exit_code = 4


class DamagedArtifact(GristmillError):
    """A file of an artifact does not have the bytes its manifest promises."""


class StageFailed(GristmillError):
    """A stage ended with an error of its own; the run can be started again and goes on from the last checkpoint."""


class WorkerLost(GristmillError):
    """A process or machine of the run was lost. What it did since the last checkpoint can be done again."""


class TrainingDiverged(GristmillError):
    """Steps had to be held back again and again; going on would only repeat it."""


class Cancelled(GristmillError):
    """Somebody asked the run to stop; it did so at a checkpoint and can be gone on with."""

    exit_code = 6


class Preempted(GristmillError):
    """The machine was asked for; the run stopped at a checkpoint and can be gone on with."""

    exit_code = 8
