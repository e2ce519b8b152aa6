"""What becomes of steps that were held back: each is told, and a run that has too many of them ends."""

import logging
from collections.abc import Iterator
from typing import Any

from pipeline.errors import TrainingDiverged
from pipeline.guard import describe
from pipeline.train import StepReport

log = logging.getLogger("gristmill")

MOST_HELD, WINDOW = 3, 128
"""So many held steps within so many end the run."""


class Health:
    """Reads the verdict of a step when the next one is under way, so that nothing waits for the device."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._held: list[int] = []
        self._unread: StepReport | None = None

    def watch(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """Pass reports through. Raises TrainingDiverged, on all ranks at the same step."""
        for report in reports:
            self._read()
            self._unread = report
            yield report
        self._read()

    def state(self) -> dict[str, Any]:
        self._read()
        return {"held": self._held}

    def restore(self, state: dict[str, Any]) -> None:
        self._held = list(state["held"])

    def _read(self) -> None:
        report, self._unread = self._unread, None
        if report is None or not report.held:
            return
        self._held = [step for step in self._held if step > report.step - WINDOW] + [report.step]
        if self._rank == 0:
            log.warning("%s", describe(report.step, report.loss, float(report.grad_norm), report.sample_ids))
        if len(self._held) >= MOST_HELD:
            raise TrainingDiverged(
                f"training was held back at steps {', '.join(map(str, self._held))} and ends here: the loss or the "
                "gradient is not finite, or far above what it was. The weights are those of the steps before. Look at "
                "the samples named above; then lower the learning rate, lengthen the warm-up or mend the data. "
                "Changed settings start anew; the checkpoint before stays where it is"
            )
