"""Training objectives, one module each.

Contract: a module here defines `loss(model, batch) -> Loss`: the float32 sum of the losses in nats and the count of the
targets it is over, both on the device of the batch, with no division, so that sums of parts add up to the whole.
Further parameters, such as `label_smoothing`, have defaults.
"""

from collections.abc import Callable

from model import variants
from model.batch import Loss

Objective = Callable[..., Loss]


def objective(name: str) -> Objective:
    """The loss function of the variant called `name`."""
    loss: Objective = variants.load("model.objectives", name).loss
    return loss
