"""Kernels in C++ for a CPU: what stands between two matrix products, in one pass over memory, and some products.

PyTorch's own operators read and write every intermediate result, which on a CPU can take more than half of a training
step, and are slow at products that sum over many rows, as the gradient of a weight does. The sources in this folder are
compiled once for a processor (a few seconds) into the user's cache. Where there is no compiler or no Linux, or
GRISTMILL_NATIVE=0 is set, everything runs by PyTorch's operators, with the same results up to rounding. Every sum is
taken in an order of its own, whatever the number of threads.

A kernel checks no sizes: who calls it must have done so.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("gristmill")

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    # sums in the order of vector lanes; unlike -ffast-math, these keep what a NaN does
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
WIDTHS = (torch.bfloat16, torch.float32)
"""What a kernel that takes floating-point numbers of two widths takes."""

ENABLED = os.environ.get("GRISTMILL_NATIVE") != "0"
SLOW = "training on a CPU is about half as fast as it could be"

SMALL = 2**13
"""Elements below which PyTorch's operators are as fast: a call from Python costs some ten microseconds."""

Argument = Tensor | int | float | None

ARGUMENTS = {
    "add_dropped": "ppnppnnnnf",
    "attention": "ppppppnnnnnn",
    "attention_backward": "ppppppppppnnnnnn",
    "cross_entropy": "pppnnnn",
    "drop": "pnpnpnnnnf",
    "linear": "pppnnnn",
    "read_few": "pppnpnpnpfnnnnnnnnnnnn",
    "rms_norm": "pppnpnnf",
    "rms_norm_backward": "pnpppppnn",
    "rotate": "ppppnnnnn",
    "swiglu": "pppn",
    "swiglu_backward": "pppppn",
    "symmetric_product": "pppffnnn",
    "weight_gradient": "pppnnnnn",
}
"""What a kernel takes before the number of threads: p a tensor or None, n a whole number, f any number, as a float."""


def usable(x: Tensor) -> bool:
    """Whether a kernel can take the place of a few operators on this tensor, and is worth it."""
    return takes(x) and x.numel() >= SMALL  # in this order: of what is traced the size is not known


def takes(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor; not while something traces PyTorch's operators."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and x.dtype in WIDTHS and ENABLED and _library() is not None


def has(kernel: str) -> bool:
    """Whether the library is there, and this processor has what that kernel is made of."""
    return ENABLED and _library() is not None and hasattr(_library(), kernel)


def call(kernel: str, *arguments: Argument) -> None:
    """Run a kernel on contiguous tensors, with the threads that PyTorch has."""
    function = getattr(_library(), kernel)
    function.restype = None
    given = [_as_c(kind, argument) for kind, argument in zip(ARGUMENTS[kernel], arguments, strict=True)]
    function(*given, ctypes.c_int(torch.get_num_threads()))


def _as_c(kind: str, argument: Any) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_float:
    """By what the kernel takes, not by what is given: C would read the bits of one as the other."""
    if kind != "p":
        return ctypes.c_long(argument) if kind == "n" else ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    assert isinstance(argument, Tensor), f"{argument!r} is no tensor"
    assert argument.is_contiguous(), f"a kernel reads contiguous tensors, not strides {argument.stride()}"
    return ctypes.c_void_p(argument.data_ptr())


@cache
def _library() -> ctypes.CDLL | None:
    if platform.system() != "Linux":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        log.warning("%s: there is no C++ compiler; install g++, or name one in $CXX", SLOW)
        return None
    try:
        return ctypes.CDLL(str(compiled(compiler, FLAGS)))
    except subprocess.CalledProcessError as error:
        log.warning("%s: %s does not compile its kernels:\n%s", SLOW, compiler, error.stderr[-2000:])
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        log.warning("%s: its kernels cannot be kept or loaded: %s; name another folder in $XDG_CACHE_HOME", SLOW, error)
    return None


def compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library in the cache, made if need be; its name says from what, by what and for which processor."""
    sources = sorted(SOURCES.glob("*.cpp"))
    made_of = [path.read_bytes() for path in (*sources, *sorted(SOURCES.glob("*.h")))]
    key = hashlib.sha256(b"\0".join([*made_of, compiler.encode(), *map(str.encode, flags), _processor()]))
    cached = _cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            new = Path(folder, cached.name)
            log.info("compiling kernels for this processor, once")
            command = [compiler, *flags, *map(str, sources), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - the user's own compiler
            new.replace(cached)
    return cached


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gristmill")


def _processor() -> bytes:
    """The instructions that -march=native stands for: homes are shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
