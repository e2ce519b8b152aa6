import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import flops
from model.batch import IGNORE, Batch
from model.heads import LanguageModel
from model.objectives import masked
from tests.model.toys import config, language_model, tokens


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"n_kv_heads": 4, "n_layers": 3}, {"d_ff": 7}])
def test_parameters_are_those_of_the_model(changes: dict):
    assert flops.parameters(config(**changes)) == sum(p.numel() for p in LanguageModel(config(**changes)).parameters())


def test_flops_of_full_attention_are_those_that_torch_counts():
    model = language_model(causal=False, attention="reference")
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, 16))
    assert counter.get_total_flops() / 32 == flops.matmul_flops_per_token(model.cfg, 16)


def test_flops_of_learning_a_quarter_of_the_tokens_are_those_that_torch_counts():
    model, text = language_model(causal=False, attention="reference"), tokens(2, 16)
    targets = text.where(torch.arange(16) % 4 == 0, IGNORE)
    with FlopCounterMode(display=False) as counter:
        masked.loss(model, Batch(text, targets, torch.zeros(2, 16, dtype=torch.int32))).sum.backward()
    assert counter.get_total_flops() / 32 == flops.training_flops_per_token(model.cfg, 16, target_share=1 / 4)


def test_causal_attention_is_half_of_full():
    causal, full = (
        flops.matmul_flops_per_token(config(causal=c), 128) - flops.matmul_flops_per_token(config(causal=c), 64)
        for c in (True, False)
    )
    assert causal == full / 2


def test_training_is_three_forwards():
    assert flops.training_flops_per_token(config(), 16) == 3 * flops.matmul_flops_per_token(config(), 16)


def test_a_window_bounds_the_cost_of_a_long_row():
    windowed = [flops.matmul_flops_per_token(config(sliding_window=8), n) for n in (8, 10**6, 2 * 10**6)]
    assert windowed[0] == flops.matmul_flops_per_token(config(), 8)
    assert windowed[2] == pytest.approx(windowed[1], rel=1e-4)
