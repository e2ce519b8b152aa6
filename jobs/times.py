"""Where the time of a run went: its stages, and what Ray, MLflow, imports and artifacts add to them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil

from pipeline.runner import Built, Started


def process_began() -> float:
    """When this process was started, by time.monotonic: imports belong to a run too."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


@dataclass
class Times:
    """Follows the events of a run. All times are seconds; `began` is by time.monotonic."""

    began: float
    _first: float | None = None
    _ran: list[tuple[float, float]] = field(default_factory=list)
    """From when to when each stage was built, by the process that did."""
    _bare: float = 0.0
    """What the stages themselves say that they took."""
    _checkpoints: float = 0.0

    def note(self, event: Started | Built) -> None:
        """A stage begins or ended now."""
        now = time.monotonic()
        self._first = self._first or now
        if isinstance(event, Built) and event.status == "built":
            self._ran.append((now - event.seconds, now))
            self._bare += float(event.notes.get("seconds", event.seconds))
            self._checkpoints += float(event.notes.get("metrics", {}).get("checkpoint_seconds", 0.0))

    def split(self, handed_over: float, ended: float) -> dict[str, float]:
        """The whole time in parts that add up to it: until the first stage, in stages, between them, and in the end.

        `between` is Ray starting and passing work on; `tracking` is from `handed_over`, when the stages were done. Of
        `stages`, `artifacts` went into locking, hashing and publishing, and `checkpoints` into those of training.
        """
        first = self._first or handed_over
        stages = covered(self._ran)
        artifacts = sum(stop - start for start, stop in self._ran) - self._bare
        parts = {
            "start": first - self.began,
            "between": max(0.0, handed_over - first - stages),
            "stages": stages,
            "tracking": ended - handed_over,
            "artifacts": max(0.0, artifacts),
            "checkpoints": self._checkpoints,
        }
        return {name: round(seconds, 2) for name, seconds in parts.items()}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How much lies in at least one of the intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def told(seconds: dict[str, float]) -> str:
    """The parts in a line."""
    within = f"artifacts {seconds['artifacts']:.1f} s, checkpoints {seconds['checkpoints']:.1f} s"
    parts = (
        f"imports and config {seconds['start']:.1f} s",
        f"Ray {seconds['between']:.1f} s",
        f"stages {seconds['stages']:.1f} s ({within})",
        f"MLflow {seconds['tracking']:.1f} s",
    )
    return ", ".join(parts)
