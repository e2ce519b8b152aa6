"""Whether an optimizer step is to be held: decided on the device, so that the host never waits for the answer."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOORS = (1.0, 0.1)
"""Added to loss and gradient norm before the logarithm: a jump from next to nothing to a little is no spike."""
LEAST_RATIOS = (1.25, 16.0)
"""Of what is judged over its centre: anything less is no spike, however calm the window. Single harmless batches were
seen at 11 times the usual norm, and at 1.4 times a loss that had fallen to 0.6 on a text learnt by heart."""
CENTRE = 16
"""Steps whose mean is the centre: few, so that it keeps up with a loss that falls fast."""
ENOUGH = 32
"""Judged steps before spikes are looked for: norms are at their wildest in the first steps of a warm-up."""
SHOWN = 8

_ANY_FINITE = torch.finfo(torch.float32).max


class Guard:
    """Holds steps whose loss or gradient norm is not finite or, with `sigma` above 0, far above the steps before.

    Both are judged as logarithms. The centre is the mean of the last `CENTRE` accepted steps. The deviation comes from
    the differences between neighbours in the window, so that a trend does not widen it; their mean square is taken
    rather than a median because it grows with a heavy tail: a median's 6 sigma cried wolf where this one did not.
    """

    def __init__(self, device: torch.device, sigma: float = 6.0, window: int = 128) -> None:
        assert sigma >= 0, sigma
        assert window >= ENOUGH, window
        self._sigma, self._size = sigma, window
        self._floors = torch.tensor(FLOORS, device=device)
        self._least = torch.tensor(LEAST_RATIOS, device=device).log()
        self._window: Tensor | None = None
        """Levels of the last accepted steps, float32 [2, window], the newest last; before it is full, the first one
        is repeated on the left."""
        self._judged = 0
        """Steps judged; the host does not know how many of them were held."""

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to hold the step: a 0-dim bool on the device. A step that is not held enters the window.

        `loss` is the step's mean cross-entropy in nats per target, `grad_norm` the global norm before clipping: both
        float32, 0-dim, not negative, and the same on all ranks, which therefore agree bit for bit.
        """
        level = (torch.stack((loss, grad_norm)) + self._floors).log()
        if self._sigma == 0:
            return ~level.isfinite().all()
        if self._window is None:
            self._window = level.nan_to_num(0.0, 0.0, 0.0)[:, None].expand(-1, self._size)
        fits = (level <= self._limit(self._window)).all()  # false for nan, and for inf: every limit is finite
        moved_on = torch.cat((self._window[:, 1:], level[:, None]), dim=1)
        self._window = torch.where(fits, moved_on, self._window)
        self._judged += 1
        return ~fits

    def _limit(self, window: Tensor) -> Tensor | float:
        """The highest levels that are accepted, float32 [2]."""
        if self._judged < ENOUGH:
            return _ANY_FINITE
        differences = min(self._judged, self._size) - 1  # too many by those held lately: a few in a hundred at most
        per_difference = self._sigma / math.sqrt(2 * differences)
        spread = torch.linalg.vector_norm(window.diff(dim=1), dim=1) * per_difference
        return window[:, -CENTRE:].mean(dim=1) + torch.maximum(spread, self._least)

    def state(self) -> dict[str, Any]:
        """All that a guard of the same settings needs to go on, as plain JSON. Waits for the device."""
        return {"judged": self._judged, "window": None if self._window is None else self._window.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, from what `state` gave."""
        self._judged, window = state["judged"], state["window"]
        self._window = None if window is None else torch.tensor(window, device=self._floors.device)


def describe(step: int, loss: float, grad_norm: float, sample_ids: Sequence[int] | np.ndarray) -> str:
    """One line for a person about a step that was held: its mean loss in nats per target, its norm, what it read."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    reason = "far above the steps before" if finite else "not finite"
    ids, more = ", ".join(map(str, sample_ids[:SHOWN])), len(sample_ids) > SHOWN
    return (
        f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: {reason}; weights left as they were; "
        f"batch of samples {ids}{f', ... (first {SHOWN} of {len(sample_ids)})' if more else ''}"
    )
