"""What training remembers, free of the world size: whole tensors by parameter name, or the pieces that a rank holds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UsageError

Shape = tuple[int, ...]

AVERAGE = "average"
"""The running mean of a parameter, among what its optimizer remembers."""


@dataclass(frozen=True, eq=False)
class TrainState:
    """All that training remembers, as whole float32 tensors on the CPU. The mappings may read a tensor when asked."""

    params: Mapping[str, Tensor]
    """A parameter tied under two names stands here once."""
    optimizer: Mapping[str, Mapping[str, Tensor]]
    """`{parameter name: {"exp_avg": ..., ...}}`, each shaped like its parameter. Empty before the first step."""
    optimizer_step: int
    """Steps that changed the weights: what AdamW's bias correction counts."""
    shapes: Mapping[str, Shape]
    """Of every parameter."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements `start` and on of a tensor, flattened."""

    values: Tensor
    """float32 on the CPU, 1-dim, in memory of its own."""
    start: int = 0


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part of a TrainState. The shards of all ranks hold every element once."""

    params: Mapping[str, Piece]
    optimizer: Mapping[str, Mapping[str, Piece]]
    optimizer_step: int
    shapes: Mapping[str, Shape]
    """Of every parameter, whoever holds it."""

    @property
    def n_bytes(self) -> int:
        pieces = [*self.params.values(), *(piece for own in self.optimizer.values() for piece in own.values())]
        return sum(piece.values.nbytes for piece in pieces)

    def weights_only(self) -> "Shard":
        """Without the optimizer, and with its running mean of the weights, if it has one, in their place: what is kept
        of training that is over.
        """
        params = {name: self.optimizer.get(name, {}).get(AVERAGE, own) for name, own in self.params.items()}
        return Shard(params, {}, self.optimizer_step, self.shapes)


def piece(tensor: Tensor, start: int = 0) -> Piece:
    """A copy of a tensor's values as they are now."""
    return Piece(tensor.detach().flatten().to("cpu", torch.float32, copy=True), start)


def owners(shapes: Mapping[str, Shape], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor where all ranks hold all: by size, the largest first, each to the least laden."""
    laden = [0] * world_size
    chosen: dict[str, int] = {}
    for name in sorted(shapes, key=lambda n: (-math.prod(shapes[n]), n)):
        chosen[name] = laden.index(min(laden))
        laden[chosen[name]] += math.prod(shapes[name])
    return chosen


def whole(pieces: Iterable[Piece], shape: Shape) -> Tensor:
    """The tensor that these pieces make up."""
    out = torch.empty(math.prod(shape), dtype=torch.float32)
    for part in pieces:
        out[part.start : part.start + part.values.numel()] = part.values
    return out.reshape(shape)


def join(shards: Sequence[Shard]) -> TrainState:
    """The state that the shards of all ranks make up."""
    shapes = shards[0].shapes
    params = {n: whole([s.params[n] for s in shards if n in s.params], shape) for n, shape in shapes.items()}
    keys = {name: own.keys() for shard in shards for name, own in shard.optimizer.items()}
    optimizer = {
        name: {k: whole([s.optimizer[name][k] for s in shards if name in s.optimizer], shapes[name]) for k in own}
        for name, own in keys.items()
    }
    return TrainState(params, optimizer, shards[0].optimizer_step, shapes)


def check_same_model(saved: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raise UsageError, naming the first difference, unless both have the same names and shapes."""
    for name in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(name, "absent"), wanted.get(name, "absent")
        if old != new:
            raise UsageError(
                f"{name}: {old} in the checkpoint, {new} in the model; "
                "it was written for another model, so start in an empty run folder or restore the model's config"
            )
