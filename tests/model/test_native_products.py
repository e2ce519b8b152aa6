"""Kernels that multiply matrices, beside exact products and those of PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import native
from model.linear import linear, product, sum_products
from model.symmetric import symmetric_product
from tests.model.test_native import (
    BF16,
    RAN,
    assert_nearer_than,
    multiplies_bf16,
    random,
    sizes,
    with_grads,
    without_tiles,
)
from tests.model.test_native import _kernels_for_the_smallest as _kernels_for_the_smallest

pytestmark = multiplies_bf16


@settings(max_examples=30, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 600), st.integers(2040, 2600)),
    outputs=sizes,
    inputs=st.sampled_from([32, 64, 96, 704]),
)
def test_products_are_summed_in_float32_over_any_number_of_rows(rows: int, outputs: int, inputs: int):
    grad, x = random(rows, outputs, dtype=BF16).detach(), random(rows, inputs, seed=1, dtype=BF16).detach()
    exact, total = grad.double().T @ x.double(), torch.full((outputs, inputs), torch.nan)
    sum_products(grad, x, total)
    torch.testing.assert_close(total.double(), exact, atol=1e-3, rtol=1e-5)
    sum_products(grad, x, total, more=True)
    torch.testing.assert_close(total.double(), 2 * exact, atol=2e-3, rtol=1e-5)
    assert {"weight_gradient"} <= RAN


@pytest.mark.parametrize("rows", [256, 517, 2100])
@pytest.mark.parametrize(("depth", "outputs"), [(32, 32), (256, 96), (704, 64), (2080, 32)])
def test_a_product_is_the_exact_one_rounded_once(depth: int, outputs: int, rows: int, monkeypatch):
    without_tiles(monkeypatch)
    x, weight = random(rows, depth, dtype=BF16).detach(), random(depth, outputs, seed=1, dtype=BF16).detach()
    exact = x.double() @ weight.double()
    got = product(x.view(1, rows, depth), weight)[0]
    assert {"linear"} == RAN
    assert torch.equal(got, product(x, weight.T.contiguous(), transposed=True))
    assert ((got.double() - exact).abs() <= exact.abs() / 2**8 + 1e-6 * depth).all()
    assert (got != exact.to(BF16)).float().mean() < 2e-3  # sums in float32 fall to the other side of a tie


def test_a_product_keeps_what_is_not_a_number_in_its_row(monkeypatch):
    without_tiles(monkeypatch)
    x, weight = random(300, 64, dtype=BF16).detach(), random(64, 32, seed=1, dtype=BF16).detach()
    x[17, 3], x[298, 5] = torch.nan, torch.inf
    got = product(x, weight)
    assert {"linear"} == RAN
    assert (~got.isfinite()).any(dim=1).nonzero().flatten().tolist() == [17, 298]
    assert got[17].isnan().all()
    assert got[298].isinf().all()


@pytest.mark.parametrize("instructions", ["all", "no tiles"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 800), (2, 288, 96)])
def test_of_a_product_with_its_own_transpose_half_is_computed(shape, instructions, monkeypatch):
    if instructions == "no tiles":
        without_tiles(monkeypatch)
    x = random(*shape, dtype=BF16).detach()
    y = random(shape[0], shape[1], shape[1], seed=1, dtype=BF16).detach()
    plus = y + y.mT
    exact = [x.double() @ x.double().mT, 0.5 * x.double() @ x.double().mT - 2 * plus.double()]
    got = symmetric_product(x), symmetric_product(x, 0.5, plus, -2.0)
    assert {"symmetric_product"} == RAN
    assert all(torch.equal(a, a.mT) for a in got)
    monkeypatch.setattr(native, "ENABLED", False)
    assert_nearer_than(got, (symmetric_product(x), symmetric_product(x, 0.5, plus, -2.0)), exact)


@pytest.mark.parametrize("instructions", ["all", "no tiles"])
@pytest.mark.parametrize("outputs", [96, 33])
def test_a_linear_layer_learns_as_under_autocast_but_for_one_rounding(outputs, instructions, monkeypatch):
    if instructions == "no tiles":
        without_tiles(monkeypatch)
    x, weight = random(5, 70, 64), random(outputs, 64, seed=1)

    def learnt(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            return linear(x, weight)

    got = with_grads(learnt, x, weight)
    assert {"weight_gradient", *(["linear"] if outputs % 32 == 0 and native.has("linear") else [])} <= RAN
    monkeypatch.setattr(native, "ENABLED", False)
    plain = with_grads(learnt, x, weight)
    assert [a.dtype for a in got] == [a.dtype for a in plain] == [BF16, torch.float32, torch.float32]
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])
    given = random(5, 70, outputs, seed=7).detach().bfloat16().double().flatten(0, 1)
    exact = given.T @ x.detach().bfloat16().double().flatten(0, 1)
    assert (got[2] - exact).abs().max() < 1e-4 < (plain[2] - exact).abs().max()


def test_a_weight_that_is_fixed_or_an_input_that_is_gets_no_gradient():
    x, weight = random(70, 64), random(96, 64, seed=1)
    with torch.autocast("cpu", BF16):
        of_weight = linear(x.detach(), weight).float().sum()
        assert torch.autograd.grad(of_weight, weight)[0].shape == weight.shape
        RAN.clear()
        of_x = linear(x, weight.detach()).float().sum()
        assert torch.autograd.grad(of_x, x)[0].shape == x.shape
        assert not RAN
