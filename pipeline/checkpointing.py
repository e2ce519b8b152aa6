"""When a training run writes its checkpoints, and how it goes on from them: together on all ranks, behind its back."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline import checkpoint
from pipeline.engine import Engine
from pipeline.errors import Preempted
from pipeline.shelf import Shelf, named, parsed
from pipeline.state import Shard
from pipeline.train import StepReport

log = logging.getLogger("gristmill")

MOST_TIME_WRITING = 0.035
"""Share of the wall time that training may stand still for checkpoints."""
STOP_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When to write, and what to keep."""

    every_seconds: float
    """0 is after every step."""
    keep_last: int = 2
    keep_every: int = 0
    """Steps between two that are kept for good; 0 keeps none."""
    kept: Shelf | None = None
    """Where those go."""


class Remembers(Protocol):
    """What a checkpoint keeps beside weights and optimizer: plain JSON."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass
class Checkpoints:
    """The checkpoints of one training run; every rank has one, and all make the same calls.

    Writing goes on behind the training: it stands still for the copy of the weights only, and where the one before is
    not written yet. `extra` is what the stage itself must remember, and `parts` its helpers; they travel with it.
    """

    engine: Engine
    shelf: Shelf
    policy: CheckpointPolicy
    parts: Mapping[str, Remembers]
    stop_requested: Callable[[], bool] = lambda: False
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Time that training stood still for them."""
    _due: float = field(init=False)
    _asked: float = 0.0
    _attempt: int = field(init=False)
    _thread: ThreadPoolExecutor = field(init=False)
    _writing: "Future[None] | None" = None

    def __post_init__(self) -> None:
        self.shelf.sweep()
        (self._attempt,) = self._share(secrets.randbits(48))  # and nobody writes before all have swept
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._due = time.monotonic() + self.policy.every_seconds

    def resume(self) -> int:
        """Restore the newest sound checkpoint, if there is one, and return the first step that is left to do."""
        found = checkpoint.newest(self.shelf) if self.engine.rank == 0 else None
        self.engine.wait()  # rank 0 may have had to fetch it
        step, attempt = self._share(*((found and parsed(found.path.name)) or (-1, -1)))
        if step < 0:
            return 0
        name = named(step, attempt)
        found = found or checkpoint.load(self.shelf.open(name))
        self.engine.wait()  # the others too
        self.engine.restore(found.state)
        self.engine.wait()  # all of a machine read one copy
        self.shelf.let_go(name)
        for name, part in self.parts.items():
            part.restore(found.extra.pop(name))
        self.extra.update(found.extra)
        if self.engine.rank == 0:
            log.info("going on from step %d (%s)", found.step, found.path)
        return found.step

    def after(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """Pass reports through, and write a checkpoint after a step when one is due.

        Raises Preempted, with a checkpoint written, where somebody asked this training to stop.
        """
        for report in reports:
            yield report
            due, stop = self.engine.agree([self._is_due(report.step + 1), self._is_stopping()])
            if due or stop:
                self.save(report.step + 1)
            if stop:
                self._wait()
                self.engine.wait()  # it is safe when rank 0 has sealed it
                raise Preempted(f"stopped on request after step {report.step + 1}; its checkpoint is safe")

    def save(self, next_step: int) -> None:
        """Copy what training remembers, and write it to disk behind its back."""
        start = time.monotonic()
        self._write(next_step, self.engine.shard(), self.shelf, self.policy.keep_last)
        cost = time.monotonic() - start
        self.seconds += cost
        every = self.policy.every_seconds
        wait = max(every, cost / MOST_TIME_WRITING) if every else 0
        self._due = time.monotonic() + wait

    def save_weights(self, next_step: int, shelf: Shelf | None = None) -> None:
        """Write the weights alone, as the one checkpoint of a shelf; by default as the last word of this one."""
        self._write(next_step, self.engine.shard().weights_only(), shelf or self.shelf, 1)

    def close(self, *, all_is_well: bool) -> None:
        """Wait until everything is on the disk, and raise what went wrong there; after an error, only let go."""
        if all_is_well:
            self._wait()
            self.engine.wait()  # what one rank hands in another collects
        self._thread.shutdown(wait=self.engine.world_size == 1, cancel_futures=True)

    def _write(self, step: int, shard: Shard, shelf: Shelf, keep: int) -> None:
        self._wait()
        extra = {**self.extra, **{name: part.state() for name, part in self.parts.items()}}
        self._attempt += 1
        writer = checkpoint.Writer(rank=self.engine.rank, world_size=self.engine.world_size, attempt=self._attempt)
        still = json.loads(json.dumps(extra))  # as it is now: training goes on while it is written
        self._writing = self._thread.submit(self._publish, step, shard, still, shelf, keep, writer)

    def _publish(
        self, step: int, shard: Shard, extra: Mapping[str, Any], shelf: Shelf, keep: int, writer: checkpoint.Writer
    ) -> None:
        path = checkpoint.save(shelf, step, shard, extra, writer)
        if writer.rank:
            return
        if self.policy.kept and self._is_for_good(step):
            shelf.keep_for_good(path.name, self.policy.kept)
        shelf.keep_last(keep)

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()
            self._writing = None

    def _is_due(self, step: int) -> bool:
        """Rank 0 has the clock."""
        return self._is_for_good(step) or (self.engine.rank == 0 and time.monotonic() >= self._due)

    def _is_for_good(self, step: int) -> bool:
        return self.policy.keep_every > 0 and step % self.policy.keep_every == 0

    def _is_stopping(self) -> bool:
        now = time.monotonic()
        if self.engine.rank or now < self._asked + STOP_POLL_SECONDS:
            return False
        self._asked = now
        return self.stop_requested()

    def _share(self, *values: int) -> list[int]:
        """The values of rank 0."""
        return [int(v) for v in self.engine.agree([v if self.engine.rank == 0 else float("-inf") for v in values])]
