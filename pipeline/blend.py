"""How much n-grams count beside a network: the blend of both with the lowest log loss of some texts."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import logit
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from model.blend import Blend
from pipeline.targets import Probabilities, Targets, is_multi_label
from pipeline.windows import mean_over_windows

Logits = Float[np.ndarray, "n n_labels"]

NOT_NEGATIVE, SHARES = (0, None), (-5, 5)


def fit(blend: Blend, targets: Targets, deep: Logits, wide: Logits, counts: Sequence[int]) -> None:
    """Give a blend the weights of the lowest log loss of some texts, given the logits of their windows (float64).

    The best single sum comes first, a convex problem in two numbers. A normal prior of variance 1/2 around it keeps a
    mixture near where there are few texts; in halves of the validation texts of six tasks, and in a hundred of them,
    it foretold the others better than the single sum did, and than a mixture without it.
    """
    multi_label = is_multi_label(targets)
    logits, truth = (torch.from_numpy(deep), torch.from_numpy(wide)), torch.from_numpy(targets)

    def loss(weights: Tensor) -> Tensor:
        """Of [4] by component, and the first one's log odds."""
        parts = {"by": weights[:4].view(2, 2), "share": weights[4], "scale": weights.new_ones(())}
        mixed = functional_call(blend, parts, logits, {"multi_label": multi_label})
        return log_loss(truth, mean_over_windows(mixed, counts))

    def twice(sum_: Tensor) -> Tensor:
        return torch.cat([sum_, sum_, sum_.new_zeros(1)])

    start = _lowest(lambda sum_: loss(twice(sum_)), torch.full((2,), 0.5).double(), [NOT_NEGATIVE] * 2)[1]
    one = twice(start)
    apart = one * torch.tensor([2, 0, 0, 2, 1])
    flatter = one * torch.tensor([1.3, 1.3, 0.5, 0.5, 1]) + torch.tensor([0, 0, 0, 0, 1])
    bounds = [*[NOT_NEGATIVE] * 4, SHARES]
    found = [
        _lowest(lambda weights: loss(weights) + (weights - one).square().sum() / truth.numel(), begin, bounds)
        for begin in (one, apart, flatter)
    ]
    best = min(found, key=lambda each: each[0])[1].float().round(decimals=4)  # past that, threads add up differently
    with torch.no_grad():
        blend.by.copy_(best[:4].view(2, 2))
        blend.share.copy_(best[4])


def _lowest(
    loss: Callable[[Tensor], Tensor], begin: Tensor, bounds: Sequence[tuple[float | None, float | None]]
) -> tuple[float, Tensor]:
    """The lowest loss that L-BFGS-B finds from there, and where."""

    def with_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(values).requires_grad_()
        value = loss(weights)
        [gradient] = torch.autograd.grad(value, weights)
        return value.item(), gradient.numpy()

    found = minimize(with_gradient, begin.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.fun), torch.from_numpy(found.x)


def log_loss(targets: Tensor, logits: Tensor) -> Tensor:
    """Nats a text; where a text may have several classes, nats a text and class."""
    if is_multi_label(targets.numpy()):
        return binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    return cross_entropy(logits, targets)


def logits_of(probabilities: Probabilities, *, multi_label: bool) -> Logits:
    """What gives these probabilities; of classes that exclude each other, up to a constant a text."""
    exact = probabilities.astype(np.float64)
    if multi_label:
        return logit(np.clip(exact, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg))
    return np.log(np.maximum(exact, np.finfo(np.float32).tiny))
