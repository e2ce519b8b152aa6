"""Counter-based randomness: bits that are a pure function of where they are used, so that no generator has a state.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the mixers are splitmix64 and Murmur3's fmix32.
"""

import torch
from jaxtyping import Int32, Int64
from torch import Tensor


def _signed(constant: int, width: int) -> int:
    """The two's complement reading of an unsigned constant: torch's integers are signed and wrap."""
    return constant - (1 << width) if constant >> (width - 1) else constant


_GOLDEN_64, _GOLDEN_32 = _signed(0x9E3779B97F4A7C15, 64), _signed(0x9E3779B9, 32)
_MIX_64 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_MIX_32 = _signed(0x85EBCA6B, 32), _signed(0xC2B2AE35, 32)


def bits(keys: Int64[Tensor, " rows"], site: int, seq: int, width: int) -> Int32[Tensor, "rows seq width"]:
    """Uniform 32-bit integers for one place in a model (`site`): element (row, i, j) depends on keys[row], i and j."""
    place = places(keys, site)
    position = torch.arange(seq, device=keys.device) * _GOLDEN_64
    lane = (_mix_64(place[:, None] + position) >> 32).to(torch.int32)
    channel = torch.arange(width, device=keys.device, dtype=torch.int32) * _GOLDEN_32
    return _mix_32(lane[:, :, None] + channel)


def places(keys: Int64[Tensor, " rows"], site: int) -> Int64[Tensor, " rows"]:
    """Where the bits of each row begin at one place in a model."""
    return _mix_64(keys + site * _GOLDEN_64 % 2**63)


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30, 64)) * _MIX_64[0]
    x = (x ^ _shift(x, 27, 64)) * _MIX_64[1]
    return x ^ _shift(x, 31, 64)


def _mix_32(x: Tensor) -> Tensor:
    x = x.bitwise_xor_(_shift(x, 16, 32)).mul_(_MIX_32[0])
    x = x.bitwise_xor_(_shift(x, 13, 32)).mul_(_MIX_32[1])
    return x.bitwise_xor_(_shift(x, 16, 32))


def _shift(x: Tensor, by: int, width: int) -> Tensor:
    """A logical right shift: torch's own copies the sign bit."""
    return (x >> by).bitwise_and_((1 << (width - by)) - 1)
