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
