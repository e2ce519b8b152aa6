"""Which attention kernel a CPU runs fastest over packed documents, both passes: `python -m benchmarks.attention`."""

from collections.abc import Callable

import torch

from benchmarks.timing import machine, take_turns
from model.attention import kernel
from model.masks import Pattern
from pipeline.memory import keep_freed_memory

HEADS, HEAD_DIM, TOKENS, DOCUMENT = 4, 64, 4096, 30


def passes(name: str, seq: int, dtype: torch.dtype) -> Callable[[], object]:
    """A forward and a backward pass over 4,096 tokens in rows of `seq`, which are made beforehand."""
    rows = TOKENS // seq
    ids = torch.arange(seq).div(DOCUMENT, rounding_mode="floor").int().expand(rows, seq).contiguous()
    q, k, v = (torch.randn(rows, seq, HEADS, HEAD_DIM).to(dtype).requires_grad_() for _ in range(3))
    pattern = Pattern(batch=rows, seq=seq, device=q.device, document_ids=ids)
    return lambda: torch.autograd.grad(kernel(name)(q, k, v, pattern).sum(), (q, k, v))


def main() -> None:
    keep_freed_memory()
    print(machine())
    print(f"{'positions':>9} {'dtype':>9} {'sdpa ms':>9} {'matmul ms':>10} {'auto ms':>8} {'sdpa / auto':>12}")
    for dtype in (torch.bfloat16, torch.float32):
        for seq in (64, 128, 256, 512, 1024):
            names = ("sdpa", "matmul", "auto")
            taken = take_turns({name: passes(name, seq, dtype) for name in names})
            sdpa, matmul, auto = (1e3 * taken[name] for name in names)
            print(f"{seq:>9} {str(dtype)[6:]:>9} {sdpa:>9.1f} {matmul:>10.1f} {auto:>8.1f} {sdpa / auto:>12.2f}")


if __name__ == "__main__":
    main()
