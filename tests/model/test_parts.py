import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model.mlp import SwiGLU
from model.norm import RMSNorm


def test_rms_norm_rounds_as_hugging_face_does():
    ours, theirs = RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.uniform_())
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.bfloat16()(x.bfloat16()), theirs.bfloat16()(x.bfloat16()))


def test_rms_norm_keeps_float64():
    assert RMSNorm(4, 1e-5).double()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_a_closed_gate_lets_nothing_through():
    mlp = SwiGLU(8, 16)
    torch.nn.init.zeros_(mlp.gate_proj.weight)
    assert mlp(torch.randn(1, 2, 8)).abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (8,)])
def test_the_gradients_of_rms_norm_are_those_of_its_definition(shape: tuple[int, ...]):
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    upstream = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, (x, norm.weight), upstream)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    torch.testing.assert_close(norm(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
