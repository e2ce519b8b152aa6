"""Toy models and toy tokens for the tests of the model package."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize

TOY = ModelConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=16)


def config(**changes: Any) -> ModelConfig:
    return replace(TOY, **changes)


def language_model(seed: int = 0, scale: float = 5.0, **changes: Any) -> LanguageModel:
    """A language model whose weights are large enough for its logits to depend visibly on what it reads."""
    model = LanguageModel(config(**changes))
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TOY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)
