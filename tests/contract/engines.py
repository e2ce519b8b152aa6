"""Every engine at every ZeRO stage it has, and a small model to train with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model import variants
from model.batch import Batch
from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import next_token
from pipeline import engine
from pipeline.engine import Engine, EngineSettings
from pipeline.errors import EnvironmentProblem
from pipeline.optimizer import OptimizerConfig
from pipeline.state import TrainState, join

# An embedding of more than 1e5 elements: ZeRO-3 leaves smaller parameters whole.
MODEL = ModelConfig(vocab_size=1024, d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=96, seq_len=16)
ROWS, TARGETS = 4, 64


class Variant(NamedTuple):
    name: str
    stage: int = 0
    offload: str = "none"

    def __str__(self) -> str:
        return "-".join(map(str, self[: 2 + (self.offload != "none")]))


OFFLOADS = {0: ("none",), 1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "all")}
"""What each ZeRO stage can offload. On a CPU nothing moves, but all of DeepSpeed's paths for it are run."""
ALL = [
    Variant(name, stage, offload)
    for name in engine.names()
    for stage in variants.load("pipeline.engine", name).ZERO_STAGES
    for offload in OFFLOADS[stage]
]
VARIANTS = [pytest.param(v, id=str(v), marks=[pytest.mark.slow] if v.name != "plain" else []) for v in ALL]
WHOLE = [param for param, v in zip(VARIANTS, ALL, strict=True) if v.stage == 0]
CUT = [param for param, v in zip(VARIANTS, ALL, strict=True) if v.stage > 0]
PLAIN = Variant("plain")


@contextmanager
def engine_of(
    variant: Variant,
    *,
    seed: int = 0,
    precision: str = "fp32",
    grad_clip: float = 1.0,
    optimizer: OptimizerConfig | None = None,
    model: ModelConfig = MODEL,
    deepspeed: Mapping[str, Any] | None = None,
) -> Iterator[Engine]:
    body = LanguageModel(model)
    initialize(body, seed)
    try:
        made = engine.create(
            variant.name,
            body,
            next_token.loss,
            # eps above the rounding of a gradient: AdamW would make a part of a step of it where that is all there is
            optimizer=optimizer or OptimizerConfig(lr=1e-3, eps=1e-6),
            precision=precision,
            grad_clip=grad_clip,
            settings=EngineSettings(
                device="cpu",
                zero_stage=variant.stage,
                offload=variant.offload,  # pyright: ignore[reportArgumentType]
                deepspeed=deepspeed or {},
            ),
            n_layers=model.n_layers,
        )
    except EnvironmentProblem as missing:
        pytest.skip(str(missing))
    yield made
    made.close()


def state_of(e: Engine) -> TrainState:
    return join([e.shard()])


def batch(rows: slice = slice(None)) -> Batch:
    tokens = torch.randint(0, MODEL.vocab_size, (ROWS, MODEL.seq_len + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(ROWS, MODEL.seq_len, dtype=torch.int32)
    return Batch(tokens[rows, :-1], tokens[rows, 1:], ids[rows], torch.arange(ROWS)[rows])


def train(e: Engine, steps: int, parts: int = 1) -> Tensor:
    """[steps, 2]: mean loss before each step, and gradient norm."""
    size = ROWS // parts
    seen = []
    for _ in range(steps):
        sums = [e.accumulate(batch(slice(i * size, (i + 1) * size)), TARGETS) for i in range(parts)]
        seen.append(torch.stack([sum(sums) / TARGETS, e.step(1.0)]))
    return torch.stack(seen)


@cache
def plain_course() -> Tensor:
    with engine_of(PLAIN) as plain:
        return train(plain, 50)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert a.optimizer_step == b.optimizer_step
    torch.testing.assert_close(a.params, b.params, rtol=0, atol=0)
    torch.testing.assert_close(a.optimizer, b.optimizer, rtol=0, atol=0)
