"""Which numbers a forward pass computes with: float32, or bfloat16 under autocast over float32 weights."""

import time
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UsageError

Precision = Literal["bf16", "fp32"]
PRECISIONS = ("auto", "bf16", "fp32")

_MATMULS = {"cpu": ((1024, 1024, 1024), (4096, 512, 2048)), "cuda": ((4096, 4096, 4096), (8192, 8192, 8192))}
"""(m, k, n) as training has them: tokens of a micro batch, model width, hidden width."""


def resolve(precision: str, device: torch.device) -> Precision:
    """`precision` with "auto" decided: bf16 where the device multiplies it in hardware, else fp32.

    A CPU does with AVX512-BF16 or AMX. Raises UsageError for a name that is not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context for the forward pass. In fp32 it changes nothing; in bf16 matrix products take bfloat16 inputs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def measured_matmul_flops(precision: str, device: torch.device, seconds: float = 0.3) -> float:
    """The most FLOP/s that a matrix product reaches here, measured for about `seconds`: what an MFU is a part of.

    `precision` as in `resolve`. Best of many short runs, because other load can only slow one down.
    """
    dtype = torch.bfloat16 if resolve(precision, device) == "bf16" else torch.float32
    sizes = _MATMULS.get(device.type, _MATMULS["cpu"])
    return max(_best_rate(m, k, n, dtype, device, seconds / len(sizes)) for m, k, n in sizes)


@torch.no_grad()
def _best_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    _timed(a, b)  # the first product also pays for the choice of a kernel
    end = time.perf_counter() + seconds
    best = _timed(a, b)
    while time.perf_counter() < end:
        best = min(best, _timed(a, b))
    return 2 * m * k * n / best


def _timed(a: Tensor, b: Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    _ = a @ b
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
