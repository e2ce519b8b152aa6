"""How a run is asked to stop, and stops well: SIGTERM, or a file `cancel` in its folder, become a last checkpoint."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from jobs.record import JOB_ID
from pipeline.errors import Cancelled, GristmillError, Preempted

log = logging.getLogger("gristmill")

CANCEL = "cancel"
"""A file of this name in the folder of a run asks its driver to stop."""
GRACE_SECONDS = 60.0
"""How long a training may take to reach its next step and write a checkpoint; then the run ends without it."""
POLL_SECONDS = 0.5


class Stopping:
    """A block in which SIGTERM does not kill. Use it in the main thread.

    `ask` is told to ask what is running to stop; it answers whether anything will. Where nothing does, where it takes
    longer than the grace time, and on a second SIGTERM, the block ends at once with Preempted or Cancelled.
    """

    def __init__(self, folder: Path, ask: Callable[[], bool]) -> None:
        self._cancel, self._ask = folder / CANCEL, ask
        self._asked = False
        self._over = threading.Event()
        # under a job server SIGTERM means that somebody stopped the job, elsewhere that the machine is wanted back
        self._cancelled = JOB_ID in os.environ

    @property
    def error(self) -> type[GristmillError]:
        """What a run that stops because of this ends with."""
        return Cancelled if self._cancelled else Preempted

    def __enter__(self) -> Self:
        self._cancel.unlink(missing_ok=True)
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._watch, name="cancel", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        signal.signal(signal.SIGTERM, self._before)
        if isinstance(error, Preempted) and self._cancelled:
            raise Cancelled(str(error)) from None

    def end_if_asked(self) -> None:
        """End the block, where somebody asked for that and what was asked to stop has died instead."""
        if self._asked:
            raise self.error("stopped on request; the same command, or gristmill resume, goes on where it stopped")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        again, self._asked = self._asked, True
        if again or not self._ask():
            self.end_if_asked()
        log.warning("asked to stop: writing a checkpoint first (at most %.0f s)", GRACE_SECONDS)
        threading.Thread(target=self._end_after_grace, name="grace", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if self._cancel.exists():
                self._cancelled = True
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _end_after_grace(self) -> None:
        if not self._over.wait(GRACE_SECONDS):
            os.kill(os.getpid(), signal.SIGTERM)
