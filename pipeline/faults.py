"""Named places where a test may stop the process dead, so that every moment of a crash can be tried.

`GRISTMILL_FAULT=name:n` kills the process when it comes to the place called `name` for the n-th time, from 1. With
`name:n:file` that happens once in all: the first process to come there makes the file, and those after it live.
"""

import os
import signal
from pathlib import Path

passes: dict[str, int] = {}
"""How often this process has come to each place."""


def fault_point(name: str) -> None:
    """Do nothing; or, where GRISTMILL_FAULT says so, end this process with SIGKILL."""
    wanted = os.environ.get("GRISTMILL_FAULT")
    if not wanted:
        return
    point, _, rest = wanted.partition(":")
    nth, _, marker = rest.partition(":")
    passes[name] = passes.get(name, 0) + 1
    if point == name and passes[name] == int(nth or 1) and _is_first(marker):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_first(marker: str) -> bool:
    if not marker:
        return True
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
