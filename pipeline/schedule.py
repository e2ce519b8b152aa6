"""The learning rate of a step as a fraction of its peak: a pure function of the step, so a resume needs no state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The course of the learning rate. Lengths are fractions of all steps, so that a longer run keeps its shape."""

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """After the warm-up: half a cosine (arXiv:1608.03983), flat and then down (wsd), a straight line down, or flat."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.02
    """Part of the steps in which the rate rises from zero to its peak, linearly."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.2
    """Part of the steps in which "wsd" falls; the others fall from the end of the warm-up."""
    floor: Annotated[float, Ge(0), Le(1)] = 0.1
    """The rate of the last step over the peak; "constant" does not fall."""


def lr_scale(step: int, steps: int, config: ScheduleConfig) -> float:
    """The factor in [0, 1] on the peak learning rate at `step`, from 0 to `steps - 1`.

    It never is zero before the last step, which stands at the floor (at 1 for "constant"). Raises ValueError for a
    step outside the run.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step={step} must be >= 0 and < steps={steps}")
    done = (step + 1) / steps
    fall_start = max(config.warmup, 1 - config.decay) if config.name == "wsd" else config.warmup
    if done < config.warmup:
        return done / config.warmup
    if done <= fall_start:
        return 1.0
    fallen = (done - fall_start) / (1 - fall_start)
    return config.floor + (1 - config.floor) * _SHAPES[config.name](fallen)


def _cosine(fallen: float) -> float:
    return (1 + math.cos(math.pi * fallen)) / 2


def _linear(fallen: float) -> float:
    """To zero, it beats the cosine at equal compute (arXiv:2502.15938)."""
    return 1 - fallen


def _one_minus_sqrt(fallen: float) -> float:
    """Warm up, stay, decay (arXiv:2404.06395) with the decay found best in arXiv:2405.18392."""
    return 1 - math.sqrt(fallen)


def _flat(fallen: float) -> float:
    del fallen
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "wsd": _one_minus_sqrt,
    "linear": _linear,
    "constant": _flat,
}
