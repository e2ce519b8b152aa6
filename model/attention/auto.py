"""The fastest kernel that takes the tensors: flash on CUDA; on a CPU our own, matrix products, or PyTorch's."""

import importlib.util
import logging
from functools import cache

import torch

from model.attention import KeyValue, Query, _native, kernel, matmul, sdpa
from model.masks import Pattern

log = logging.getLogger(__name__)

SHORT = 1024
"""Positions up to which, in half precision on a CPU, two matrix products beat PyTorch's fused kernel, forward and
backward (`python -m benchmarks.attention`). In float32 the fused kernel is ahead."""

EVERYWHERE = {"matmul": matmul.attend, "native": _native.attend, "sdpa": sdpa.attend}
"""The kernels that need no package, imported here so that torch.compile can see them."""

FLASH = importlib.util.find_spec("flash_attn") is not None


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Attention by the fastest kernel that takes these tensors; which one, and why, is logged once."""
    name, reason = _choice(q, pattern)
    if not torch.compiler.is_compiling():
        _say(name, reason)
    return (EVERYWHERE.get(name) or kernel(name))(q, k, v, pattern)


def _choice(q: Query, pattern: Pattern) -> tuple[str, str]:
    half = q.dtype in (torch.bfloat16, torch.float16)
    if _native.takes(q):
        return "native", "this processor multiplies bfloat16"
    if q.device.type == "cpu" and half and pattern.seq <= SHORT:
        return "matmul", "on a CPU, in half precision, rows are short"
    if q.device.type != "cuda":
        return "sdpa", f"tensors are on {q.device.type}"
    if not half:
        return "sdpa", "tensors are not in half precision"
    if not FLASH:
        return "sdpa", "flash_attn is not installed; `pip install gristmill[flash]` adds it"
    return "flash", "flash_attn is installed"


@cache
def _say(name: str, reason: str) -> None:
    log.info("attention=auto uses %s: %s", name, reason)
