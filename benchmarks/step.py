"""What each choice gives a training step on a CPU: `python -m benchmarks.step --shape 10M`.

Contenders run in processes of their own, in turns, since memory settings last as long as a process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from benchmarks import shapes
from benchmarks.timing import machine
from model import native
from model.batch import IGNORE, Batch
from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import next_token
from pipeline.engine import EngineSettings, create
from pipeline.memory import keep_freed_memory
from pipeline.optimizer import OptimizerConfig

CONTENDERS = {
    "as it is": {},
    "freed memory given back": {"keep_memory": False},
    "attention: sdpa": {"attention": "sdpa"},
    "no kernels in C++": {"kernels": False},
    "float32": {"precision": "fp32"},
    "AdamW": {"optimizer": "adamw"},
    "30 % of the tokens asked for": {"asked": 0.3},
    "the same, computed for all": {"asked": 0.3, "for_all": True},
}
QUICKSTART = ModelConfig(vocab_size=8192, d_model=192, n_layers=4, n_heads=3, n_kv_heads=3, d_ff=512, seq_len=128)
SHAPES = {"quickstart": QUICKSTART} | {name: shapes.ours(name) for name in shapes.SHAPES}
TOKENS, ROUNDS = 4096, 3


def measure(
    shape: str,
    keep_memory: bool = True,
    attention: str = "auto",
    precision: str = "bf16",
    optimizer: str = "muon",
    kernels: bool = True,
    asked: float = 1.0,
    for_all: bool = False,
) -> float:
    """Median seconds of a step of 4,096 tokens."""
    native.ENABLED = kernels
    next_token.RARE = 0.0 if for_all else next_token.RARE
    if keep_memory:
        keep_freed_memory()
    cfg = replace(SHAPES[shape], attention=attention)
    model = LanguageModel(cfg)
    initialize(model, 0)
    engine = create(
        "plain",
        model,
        next_token.loss,
        optimizer=OptimizerConfig(name=optimizer),  # pyright: ignore[reportArgumentType]
        precision=precision,
        grad_clip=1.0,
        settings=EngineSettings(),
        n_layers=cfg.n_layers,
    )
    rows = TOKENS // cfg.seq_len
    ids = torch.arange(cfg.seq_len).div(30, rounding_mode="floor").int().expand(rows, -1).contiguous()
    seconds = []
    for _ in range(13):
        tokens = torch.randint(0, cfg.vocab_size, ids.shape)
        targets = tokens.roll(-1, 1).where(torch.rand(ids.shape) < asked, IGNORE)
        start = time.perf_counter()
        engine.accumulate(Batch(tokens, targets, ids), TOKENS)
        engine.step(1.0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--shape", choices=SHAPES, default="quickstart")
    own.add_argument("--contender", type=json.loads, help=argparse.SUPPRESS)
    given = own.parse_args()
    if given.contender is not None:
        print(measure(given.shape, **given.contender))
        return
    print(machine())
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, settings in CONTENDERS.items():
            command = [sys.executable, "-m", "benchmarks.step", "--shape", given.shape]
            command += ["--contender", json.dumps(settings)]
            taken[name].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    first = statistics.median(taken["as it is"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:<28} {median * 1e3:6.0f} ms  {TOKENS / median:8,.0f} tokens/s  x{median / first:.2f}")


if __name__ == "__main__":
    main()
