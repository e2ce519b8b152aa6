"""Flash where it can run, PyTorch's own kernel everywhere else."""

import importlib.util
import logging
from functools import cache

import torch

from model.attention import KeyValue, Query, kernel, matmul, sdpa
from model.masks import Pattern

log = logging.getLogger(__name__)

SHORT = 1024
"""Positions up to which, in half precision on a CPU, two matrix products beat PyTorch's fused kernel: at 128 positions
by 3, at 512 by 2, forward and backward (`python -m benchmarks.attention`). In float32 the fused kernel is ahead."""

EVERYWHERE = {"matmul": matmul.attend, "sdpa": sdpa.attend}
"""The kernels that need no package, imported here so that torch.compile can see them."""


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Attention by the fastest kernel that takes these tensors; which one, and why, is logged once."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    short = pattern.seq <= SHORT
    name = _choice(q.device.type, half, short)
    return (EVERYWHERE.get(name) or kernel(name))(q, k, v, pattern)


@torch.compiler.assume_constant_result
def _choice(device_type: str, half: bool, short: bool) -> str:
    """A graph that is compiled keeps the choice that was made when it was."""
    return _chosen(device_type, half, short)


@cache
def _chosen(device_type: str, half: bool, short: bool) -> str:
    if device_type == "cpu" and half and short:
        return _say("matmul", "on a CPU, in half precision, rows are short")
    if device_type != "cuda":
        return _say("sdpa", f"tensors are on {device_type}")
    if not half:
        return _say("sdpa", "tensors are not in half precision")
    if importlib.util.find_spec("flash_attn") is None:
        return _say("sdpa", "flash_attn is not installed; `pip install gristmill[flash]` adds it")
    return _say("flash", "flash_attn is installed")


def _say(name: str, reason: str) -> str:
    log.info("attention=auto uses %s: %s", name, reason)
    return name
