"""Training steps on one GPU, in one call: `python -m benchmarks.gpu`.

Needs torch, numpy, jaxtyping, annotated-types, blake3 and no network. Prints a table: models of two sizes, with rows of
one document and with rows packed of many, by each optimizer. MFU is of the dense bf16 peak that the maker publishes;
attention is charged within documents alone. `--toy` runs the same steps of a tiny model wherever it is started: all
but the kernels.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.timing import machine
from model.batch import Batch
from model.config import ModelConfig
from model.flops import parameters, training_flops_per_token
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import next_token
from pipeline.engine import EngineSettings, create, pick_device
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import measured_matmul_flops

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H200 NVL": 835.5e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s by the first of these that is in the device's name; of any other device the peak is measured."""
WARMUP, STEPS = 5, 15
DOCUMENT = 300
"""Tokens of a document of packed rows, in the mean."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    model: ModelConfig
    rows: int
    packed: bool = False
    compiled: bool = False
    optimizer: str = "adamw"


def sizes(toy: bool) -> dict[str, tuple[ModelConfig, int]]:
    """Models by name, and rows of a step."""
    if toy:
        cfg = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=192, seq_len=64)
        return {"toy": (cfg, 4)}
    small = ModelConfig(vocab_size=50304, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, seq_len=1024)
    large = ModelConfig(vocab_size=50304, d_model=1536, n_layers=24, n_heads=12, n_kv_heads=12, d_ff=4096, seq_len=2048)
    return {"124M": (small, 32), "0.7B": (large, 8)}


def cases(toy: bool) -> list[Case]:
    """Each choice by itself, then all that pay together."""
    out: list[Case] = []
    for name, (cfg, rows) in sizes(toy).items():
        plain = Case(name, cfg, rows)
        compiled = replace(plain, compiled=True)
        out += [plain, compiled, replace(compiled, packed=True), replace(compiled, packed=True, optimizer="muon")]
    return out


def batch(case: Case, device: torch.device) -> Batch:
    """Random tokens; packed rows hold documents of DOCUMENT tokens in the mean, cut where a row ends."""
    rng, shape = np.random.default_rng(0), (case.rows, case.model.seq_len)
    tokens = torch.from_numpy(rng.integers(3, case.model.vocab_size, shape))
    starts = rng.random(shape) < 1 / DOCUMENT if case.packed else np.zeros(shape, dtype=bool)
    ids = torch.from_numpy(starts.cumsum(axis=1).astype(np.int32))
    return Batch(tokens, tokens.roll(-1, 1), ids).to(device)


def flops_of_a_step(cfg: ModelConfig, data: Batch) -> float:
    """What its documents need, each by its length."""
    lengths = (row.unique_consecutive(return_counts=True)[1].tolist() for row in data.document_ids.cpu())
    return sum(length * training_flops_per_token(cfg, length) for row in lengths for length in row)


def seconds_of_a_step(case: Case, data: Batch, device: torch.device) -> float:
    """Median over STEPS, each waited for."""
    model = LanguageModel(case.model)
    initialize(model, 0)
    if case.compiled:
        model.body.compile(dynamic=False)
    engine = create(
        "plain",
        model,
        next_token.loss,
        optimizer=OptimizerConfig(name=case.optimizer),  # pyright: ignore[reportArgumentType]
        precision="bf16",
        grad_clip=1.0,
        settings=EngineSettings(),
        n_layers=case.model.n_layers,
    )
    taken: list[float] = []
    for _ in range(WARMUP + STEPS):
        wait(device)
        start = time.perf_counter()
        engine.accumulate(data, data.tokens.numel())
        engine.step(1.0)
        wait(device)
        taken.append(time.perf_counter() - start)
    engine.close()
    return statistics.median(taken[WARMUP:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAKS.items():
            if part in name:
                return flops
    return measured_matmul_flops("bf16", device)


def line(case: Case, device: torch.device, best: float) -> str:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    data = batch(case, device)
    seconds, tokens = seconds_of_a_step(case, data, device), data.tokens.numel()
    mfu = flops_of_a_step(case.model, data) / seconds / best
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    size = f"{parameters(case.model) / 1e6:,.0f}M"
    choices = f"{'yes' if case.packed else 'no'} | {'yes' if case.compiled else 'no'} | {case.optimizer}"
    return (
        f"| {case.name} | {size} | {case.rows} x {case.model.seq_len} | {choices} | {1e3 * seconds:,.1f} "
        f"| {tokens / seconds:,.0f} | {100 * mfu:.0f} % | {memory:.1f} |"
    )


HEAD = """| model | parameters | rows x tokens | packed | compiled | optimizer | ms a step | tokens/s | MFU | GiB |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny model, on whatever device there is")
    toy = parser.parse_args().toy
    device = pick_device("auto")
    if device.type != "cuda" and not toy:
        parser.error("there is no GPU here; --toy runs all but the kernels without one")
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name() if device.type == 'cuda' else machine()}\n\n{HEAD}"
    )
    best = peak(device)
    for case in cases(toy):
        print(line(case, device, best), flush=True)


if __name__ == "__main__":
    main()
