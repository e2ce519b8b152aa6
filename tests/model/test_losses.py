import pytest
import torch
from torch.nn.functional import cross_entropy

from model import losses
from model.batch import IGNORE
from model.losses import linear_cross_entropy


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (23,), generator=generator)
    targets[[0, 5, 22]] = IGNORE
    return hidden, weight, targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy((hidden @ weight.T).float(), targets, reduction="sum", ignore_index=IGNORE)


@pytest.mark.parametrize("rows", [1, 4, 23, 100])
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_path(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(losses.CHUNK_LOGITS, "cpu", rows * 11)
    hidden, weight, targets = inputs()
    results = []
    for path in (linear_cross_entropy, plain):
        total = path(hidden, weight, targets)
        results.append([total.detach(), *torch.autograd.grad(total * 3.0, (hidden, weight))])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


def test_the_path_without_gradients_gives_the_same_loss():
    with torch.no_grad():
        quiet = linear_cross_entropy(*inputs())
    torch.testing.assert_close(quiet, linear_cross_entropy(*inputs()).detach())
    assert not quiet.requires_grad


def test_only_the_weight_may_want_a_gradient():
    hidden, weight, targets = inputs()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(hidden, weight, targets), weight)[0])


def test_rows_without_a_target_get_no_gradient():
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad[targets == IGNORE].abs().max() == 0


def test_all_targets_ignored_is_zero_and_finite():
    hidden, weight, targets = inputs()
    total = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    total.backward()
    assert total == 0
    assert weight.grad.abs().max() == 0


def test_products_follow_autocast_and_the_loss_stays_float32():
    hidden, weight, targets = inputs()
    rough_hidden, rough_weight, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(rough_hidden, rough_weight, targets)
    total.backward()
    plain(hidden, weight, targets).backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, plain(hidden, weight, targets), rtol=1e-2, atol=0)
    torch.testing.assert_close(rough_weight.grad, weight.grad, rtol=0.05, atol=0.1)
    assert rough_weight.grad.dtype == torch.float32


def test_half_precision_weights_get_half_precision_gradients():
    hidden, weight, targets = inputs(torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
