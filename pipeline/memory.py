"""Memory that stays: every training step frees and takes the same large blocks, and need not give them back."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
UNLIMITED = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed blocks instead of returning them to the kernel; False where it is not glibc.

    By default a block of some MiB is mapped anew each time, and the kernel clears every page of it: about a
    sixth of a training step on a CPU (`python -m benchmarks.step`). torch's CUDA allocator does the same by itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, UNLIMITED) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
