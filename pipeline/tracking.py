"""What a stage may say about itself: numbers by step, into a journal on disk that trackers mirror later.

The journal is the record: one JSON object a line, appended and never rewritten. A stage that was killed and goes on
from a checkpoint repeats some steps bit for bit; of two points with the same step the first one stands, so a restart
never doubles a point and a mirror may send each line as soon as it is written.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.faults import fault_point

log = logging.getLogger("gristmill")

JOURNAL_SECONDS = 5.0
"""A journal is sent to other machines at most this often."""
SAMPLE_SECONDS = 10.0
"""Time between two samples of what the machine is doing."""


class Tracker(Protocol):
    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values of this optimizer step. Never blocks on a network."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Say how far the stage is, for a person who waits. Not recorded."""


class Silent:
    """The tracker that keeps nothing."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        del values, step

    def progress(self, done: int, total: int, text: str = "") -> None:
        del done, total, text


@dataclass(frozen=True)
class Point:
    """One journal line: the metrics of one step, and when it was first recorded, in milliseconds since 1970."""

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


class Journal:
    """An append-only file of points."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._seen = {(p.step, name) for p in read_journal(path) for name in p.metrics}
        self._file: IO[str] = path.open("a")

    def append(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values that this step does not have yet. Flushed to the kernel: a killed process loses nothing."""
        new = {name: float(value) for name, value in values.items() if (step, name) not in self._seen}
        if not new:
            return
        self._seen.update((step, name) for name in new)
        fault_point("journal.append")
        self.write(new, step=step)

    def write(self, new: Mapping[str, float], *, step: int) -> None:
        """As `append`, where it is known that the step has none of these values."""
        line = {"step": step, "timestamp_ms": time.time_ns() // 1_000_000, "metrics": new}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """A kill in mid-write leaves a last line without its newline: cut it off, so that the next line stands alone."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def read_journal(path: Path) -> Iterator[Point]:
    """The points of a journal, in the order they were written; a torn last line is passed over."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                record: dict[str, Any] = json.loads(line)
                yield Point(record["step"], record["timestamp_ms"], record["metrics"])


class Recorder:
    """The tracker of a stage that runs: metrics into its journal, progress into a small file beside it.

    Whoever wants to show progress reads the file; so the stage needs no connection to the person who waits. `send`
    brings both to other machines: it is called in the background while they change, and once more at the end. What it
    raises is logged, and never reaches the stage.

    From a stage's first metrics on, what the machine is doing is sampled into a journal of its own: the other one is
    the same in every run of a training. So only what records metrics by step is watched, in the process that does it.
    """

    MIN_SECONDS = 0.2
    """Progress is written at most this often."""

    def __init__(
        self, path: Path, send: Callable[[], None] | None = None, sample_seconds: float = SAMPLE_SECONDS
    ) -> None:
        self._journal = Journal(path)
        self._progress = progress_path(path)
        self._progress.unlink(missing_ok=True)  # of an attempt that was killed: it may have been further
        self._next = 0.0
        self._sender = None if send is None else _Sender(send)
        self._sample_seconds = sample_seconds
        self._sampler: _Sampler | None = None
        self._changed()

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self._sampler = self._sampler or _Sampler(system_path(self._journal.path), self._sample_seconds)
        self._journal.append(values, step=step)
        self._changed()

    def progress(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + self.MIN_SECONDS
        scratch = self._progress.with_suffix(".tmp")
        scratch.write_text(json.dumps({"done": done, "total": total, "text": text, "time": time.time()}))
        scratch.replace(self._progress)
        self._changed()

    def close(self) -> None:
        if self._sampler:
            self._sampler.stop()
        if self._sender:
            self._sender.stop()
        self._journal.close()
        self._progress.unlink(missing_ok=True)
        if self._sender:
            self._sender.send()

    def _changed(self) -> None:
        if self._sender:
            self._sender.changed.set()


class _Sender:
    """Calls `send` from a thread of its own: soon after something has changed, at most every JOURNAL_SECONDS."""

    def __init__(self, send: Callable[[], None]) -> None:
        self.changed = threading.Event()
        self._send = send
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="journal-sender", daemon=True)
        self._thread.start()

    def send(self) -> None:
        try:
            self._send()
        except Exception as error:  # noqa: BLE001 - a stage must not die of its mirror
            log.warning("the journal was not sent: %s", error)

    def stop(self) -> None:
        """Wait until the thread has ended."""
        self._stopped.set()
        self.changed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self.changed.wait()
            self.changed.clear()
            if not self._stopped.is_set():
                self.send()
                self._stopped.wait(JOURNAL_SECONDS)


class _Sampler:
    """A thread that writes down every so often, and once more at the end, what the machine is doing."""

    def __init__(self, path: Path, every_seconds: float) -> None:
        self._path, self._every_seconds = path, every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample, and wait until the thread has ended."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            self._sample()
        except Exception as error:  # noqa: BLE001 - a stage must not die of what only watches it
            log.warning("no system metrics any more: %s", error)

    def _sample(self) -> None:
        from pipeline.system_metrics import Machine  # here, so that only this thread waits for it

        number = max((point.step for point in read_journal(self._path)), default=-1)
        machine, journal = Machine(self._path.parent), Journal(self._path)
        over = False
        while not over:
            over = self._stopped.wait(self._every_seconds)
            number += 1
            journal.write(machine.sample(), step=number)
        journal.close()


def system_path(journal: Path) -> Path:
    """Where the samples are that belong to a journal: the same lines, the step being the number of the sample."""
    return journal.with_suffix(".system")


def progress_path(journal: Path) -> Path:
    return journal.with_suffix(".progress")


def read_progress(journal: Path) -> dict[str, Any] | None:
    """`{"done", "total", "text", "time"}` of a stage that runs, or None."""
    try:
        return json.loads(progress_path(journal).read_text())
    except (FileNotFoundError, ValueError):
        return None
