import pytest
import torch
from torch.nn import functional

from model.linear import Linear, linear, matmul_dtype, rounded


def pair(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 8, 300])
def test_without_a_gradient_the_product_is_the_same(rows: int):
    x, weight = pair(rows, 256, 33)
    with torch.no_grad():
        exact = (x.double() @ weight.double().T).float()
        torch.testing.assert_close(linear(x, weight), exact, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(linear(x.view(1, rows, 256), weight)[0], linear(x, weight))


def test_where_something_is_learnt_it_is_pytorchs_own():
    x, weight = pair(9, 8, 5)
    weight.requires_grad_()
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert torch.autograd.grad(linear(x, weight).sum(), weight)[0].shape == weight.shape


def test_under_autocast_and_in_bfloat16_the_dtype_is_that_of_pytorch():
    x, weight = pair(9, 8, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == matmul_dtype(x) == torch.bfloat16
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == matmul_dtype(x.bfloat16()) == torch.bfloat16
    assert matmul_dtype(x) == torch.float32


def test_an_exported_graph_holds_standard_operators_only():
    layer = Linear(256, 16).requires_grad_(False)
    with torch.no_grad():
        graph = torch.export.export(layer, (torch.randn(64, 256),))
    assert "mkldnn" not in str(graph)


@pytest.mark.parametrize("inputs", [16, 17, 40, 48, 64])
def test_a_weight_in_int8_gives_nearly_the_same_product(inputs: int):
    x, weight = pair(5, inputs, 33)
    with torch.no_grad():
        got = rounded(weight)(x.bfloat16().view(1, 5, inputs))
    assert got.shape == (1, 5, 33)
    assert got.dtype == torch.bfloat16
    assert (got[0].float() - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
