"""What each choice gives a training step of the quickstart's size on a CPU: `python -m benchmarks.step`.

Contenders run in processes of their own, in turns, since memory settings last as long as a process.
"""

import json
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.timing import machine
from model import native
from model.batch import Batch
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
}
ROWS, SEQ, VOCAB, ROUNDS = 32, 128, 8192, 3


def measure(
    keep_memory: bool = True,
    attention: str = "auto",
    precision: str = "bf16",
    optimizer: str = "muon",
    kernels: bool = True,
) -> float:
    """Median seconds of a step of 4,096 tokens."""
    native.ENABLED = kernels
    if keep_memory:
        keep_freed_memory()
    cfg = ModelConfig(
        vocab_size=VOCAB, d_model=192, n_layers=4, n_heads=3, n_kv_heads=3, d_ff=512, seq_len=SEQ, attention=attention
    )
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
    ids = torch.arange(SEQ).div(30, rounding_mode="floor").int().expand(ROWS, SEQ).contiguous()
    seconds = []
    for _ in range(13):
        tokens = torch.randint(0, VOCAB, (ROWS, SEQ))
        start = time.perf_counter()
        engine.accumulate(Batch(tokens, tokens.roll(-1, 1), ids), ROWS * SEQ)
        engine.step(1.0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(**json.loads(sys.argv[1])))
        return
    print(machine())
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, settings in CONTENDERS.items():
            command = [sys.executable, "-m", "benchmarks.step", json.dumps(settings)]
            taken[name].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    first = statistics.median(taken["as it is"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:<26} {median * 1e3:6.0f} ms  {ROWS * SEQ / median:8,.0f} tokens/s  x{median / first:.2f}")


if __name__ == "__main__":
    main()
