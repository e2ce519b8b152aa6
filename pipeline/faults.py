"""Named places where a test may stop the process dead, so that every moment of a crash can be tried."""

import os
import signal

_hits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Do nothing, unless `GRISTMILL_FAULT=name:n` names this point: then SIGKILL this process on pass n, from 1."""
    wanted = os.environ.get("GRISTMILL_FAULT")
    if not wanted:
        return
    point, _, nth = wanted.partition(":")
    _hits[name] = _hits.get(name, 0) + 1
    if point == name and _hits[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
