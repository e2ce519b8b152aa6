"""How long a stage that runs has still to go: worked out from its journal, or from how far it came so far."""

import json
import os
import statistics
from itertools import pairwise
from pathlib import Path

TAIL_BYTES = 64 << 10
"""How much of the end of a journal is looked at for the pace of a stage."""


def seconds_left(journal: Path, done: int, total: int, elapsed: float | None) -> float | None:
    """Seconds until `total`, or None where nothing tells the pace yet.

    A stage that journals steps may have gone on from a checkpoint, so `elapsed`, the seconds since it was started, is
    looked at only for the others.
    """
    pace = _seconds_a_step(journal)
    if pace is None and done and elapsed is not None:
        pace = elapsed / done
    return None if pace is None else pace * (total - done)


def _seconds_a_step(journal: Path) -> float | None:
    """The usual time from one journalled step to the next: the pauses of restarts and validations do not count."""
    if not journal.exists():
        return None
    with journal.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().split(b"\n")[1:-1]
    points = [(point["step"], point["timestamp_ms"]) for point in map(json.loads, lines)]
    paces = [(t1 - t0) / 1000 / (s1 - s0) for (s0, t0), (s1, t1) in pairwise(points) if s1 > s0]
    return statistics.median(paces) if paces else None
