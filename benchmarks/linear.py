"""Whose matrix products are faster, PyTorch's or those of model/linear.py: `python -m benchmarks.linear`.

In float32 without a gradient ours are oneDNN's; in bfloat16, where something is learnt, those of our kernel
where there is one (without AMX).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import machine, take_turns
from model.linear import linear, product

SHAPES = ((1, 256, 704), (8, 256, 704), (64, 256, 704), (2048, 256, 704), (2048, 704, 256), (1, 256, 16384))
LEARNT = ((2048, 256, 256), (2048, 256, 704), (2048, 704, 256), (8192, 256, 704), (2048, 256, 8192), (2048, 8192, 256))
REPEATS = 20


def compare(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> str:
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    ours = linear if dtype == torch.float32 else partial(product, transposed=True)

    def repeat(times: Callable[[Tensor, Tensor], Tensor]) -> None:
        for _ in range(REPEATS):
            times(x, weight)

    taken = take_turns({"PyTorch": lambda: repeat(functional.linear), "ours": lambda: repeat(ours)})
    rate = {name: 2e-9 * rows * inputs * outputs * REPEATS / seconds for name, seconds in taken.items()}
    return (
        f"{str(dtype)[6:]:>8} {rows:>6} {inputs:>7} {outputs:>8} {rate['PyTorch']:>13.0f} {rate['ours']:>10.0f}"
        f" {taken['PyTorch'] / taken['ours']:>6.2f}"
    )


@torch.inference_mode()
def main() -> None:
    print(machine())
    print(f"{'dtype':>8} {'rows':>6} {'inputs':>7} {'outputs':>8} {'PyTorch GF/s':>13} {'ours GF/s':>10} {'ratio':>6}")
    for dtype, shapes in ((torch.float32, SHAPES), (torch.bfloat16, LEARNT)):
        for rows, inputs, outputs in shapes:
            print(compare(rows, inputs, outputs, dtype), flush=True)


if __name__ == "__main__":
    main()
