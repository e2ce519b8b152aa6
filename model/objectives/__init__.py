"""Training objectives, one module each.

Contract: a module here defines `loss(model, batch) -> Loss`: the float32 sum of the losses in nats and the count of the
targets it is over, both on the device of the batch, with no division, so that sums of parts add up to the whole.
Further parameters, such as `label_smoothing`, have defaults.

An objective for pretraining also says whether its body reads left to right only (`CAUSAL`), how many tokens it needs
past the vocabulary (`EXTRA_TOKENS`), and what it makes of a text: `examples(text, document_ids, keys, masking)` gives
inputs and targets [rows, seq] for [rows, seq + 1] tokens, as a function of a key a row.
"""

from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from model import variants
from model.batch import Loss
from model.objectives._masking import Masking

__all__ = ["Masking", "Objective", "Pretraining", "objective", "pretraining"]

Objective = Callable[..., Loss]


@runtime_checkable
class Pretraining(Protocol):
    """What a module of a pretraining objective offers."""

    CAUSAL: bool
    EXTRA_TOKENS: int

    def examples(self, text: Tensor, document_ids: Tensor, keys: Tensor, masking: Masking) -> tuple[Tensor, Tensor]: ...

    loss: Objective


def objective(name: str) -> Objective:
    """The loss function of the variant called `name`."""
    loss: Objective = variants.load("model.objectives", name).loss
    return loss


def pretraining(name: str) -> Pretraining:
    """The pretraining objective called `name`."""
    return cast(Pretraining, variants.load("model.objectives", name))
