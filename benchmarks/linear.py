"""Whose float32 matrix product is faster, PyTorch's default or oneDNN's: `python -m benchmarks.linear`."""

import torch
from torch.nn import functional

from benchmarks.timing import machine, take_turns
from model.linear import linear

SHAPES = ((1, 256, 704), (8, 256, 704), (64, 256, 704), (2048, 256, 704), (2048, 704, 256), (1, 256, 16384))
REPEATS = 20


@torch.inference_mode()
def main() -> None:
    print(machine())
    print(f"{'rows':>6} {'inputs':>7} {'outputs':>8} {'default GF/s':>13} {'ours GF/s':>10} {'ratio':>6}")
    for rows, inputs, outputs in SHAPES:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)

        def repeat(product: object, x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            for _ in range(REPEATS):
                product(x, weight)  # pyright: ignore[reportCallIssue]

        taken = take_turns({"default": lambda: repeat(functional.linear), "ours": lambda: repeat(linear)})
        rate = {name: 2e-9 * rows * inputs * outputs * REPEATS / seconds for name, seconds in taken.items()}
        print(
            f"{rows:>6} {inputs:>7} {outputs:>8} {rate['default']:>13.0f} {rate['ours']:>10.0f}"
            f" {taken['default'] / taken['ours']:>6.2f}"
        )


if __name__ == "__main__":
    main()
