"""Checkpoints: published folders `step-00000100/` of safetensors and JSON, of which the newest intact one counts.

Each rank writes what it holds, so that no rank ever needs the whole: `params-00001-of-00004.safetensors` has tensors
by parameter name, whole or cut, and `index.json` says which elements of which tensor lie in which file. Where they lie,
and how the parts of all ranks become one, is the business of a shelf (`pipeline/shelf.py`).
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import DamagedArtifact, EnvironmentProblem
from pipeline.faults import fault_point
from pipeline.publish import verify
from pipeline.shelf import Card, Parts, Shelf, Writer, named
from pipeline.state import Piece, Shape, Shard, TrainState, whole

log = logging.getLogger("gristmill")

STATE, INDEX = "state.json", "index.json"
SPARE_BYTES = 2**24
"""Disk space that must be left after a checkpoint, for what else is written meanwhile."""
_SEPARATOR = "::"

Index = dict[str, list[tuple[str, int, int]]]
"""`{tensor: [(file, first element, number of elements), ...]}`."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What training goes on from."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: TrainState
    extra: dict[str, Any] = field(default_factory=dict)
    """What the training loop kept beside it: plain JSON."""


def save(where: Path | Shelf, step: int, shard: Shard, extra: Mapping[str, Any], writer: Writer | None = None) -> Path:
    """Write this rank's part of a checkpoint; return where the whole lies, or will once it is opened here.

    On rank 0, return when the whole is published and on the disk, or in the store. `extra` must be plain JSON. Raises
    EnvironmentProblem where the disk is full, the store away, or a rank's part does not come.
    """
    shelf, writer = on(where), writer or Writer()

    def describe(folder: Path, cards: Sequence[Card]) -> None:
        index: Index = {}
        for tensor, places in ((tensor, places) for card in cards for tensor, places in card.items()):
            index.setdefault(tensor, []).extend(places)
        record = {"step": step, "optimizer_step": shard.optimizer_step, "shapes": shard.shapes, "extra": dict(extra)}
        (folder / INDEX).write_text(json.dumps(index, sort_keys=True))
        (folder / STATE).write_text(json.dumps(record, indent=2, sort_keys=True))

    parts = Parts(
        meta={"stage": "checkpoint", "step": step, "world_size": writer.world_size},
        write=lambda folder: _write(folder, shard, writer),
        describe=describe,
    )
    try:
        _need_space(shelf.folder, shard.n_bytes)
        name = shelf.put(step, parts, writer)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"{shelf.folder / named(step)}: the checkpoint could not be written: {reason}. {_last(shelf)} is intact; "
            "make room or mend the disk, and give the same command again"
        ) from error
    fault_point("checkpoint.saved")
    return shelf.folder / name


def on(where: Path | Shelf) -> Shelf:
    """A plain folder is a shelf of this machine alone."""
    return where if isinstance(where, Shelf) else Shelf(where)


def _write(folder: Path, shard: Shard, writer: Writer) -> Index:
    suffix = f"{writer.rank:05d}-of-{writer.world_size:05d}.safetensors"
    moments = {f"{n}{_SEPARATOR}{key}": part for n, own in shard.optimizer.items() for key, part in own.items()}
    index = _write_pieces(folder / f"params-{suffix}", shard.params, shard.shapes)
    fault_point("checkpoint.save")
    return index | _write_pieces(folder / f"optimizer-{suffix}", moments, shard.shapes)


def _write_pieces(path: Path, pieces: Mapping[str, Piece], shapes: Mapping[str, Shape]) -> Index:
    """Whole tensors keep their shape, so that other tools read them; a cut one is flat."""
    tensors: dict[str, Tensor] = {}
    for name, part in pieces.items():
        shape = shapes[name.split(_SEPARATOR)[0]]
        is_whole = part.start == 0 and part.values.numel() == math.prod(shape)
        tensors[name] = part.values.reshape(shape) if is_whole else part.values
    save_file(tensors, path)
    return {name: [(path.name, part.start, part.values.numel())] for name, part in pieces.items()}


def _need_space(folder: Path, n_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE_BYTES:
        reason = f"it needs {n_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise OSError(28, f"the disk is nearly full: {reason}")


def _last(shelf: Shelf) -> str:
    with suppress(EnvironmentProblem):
        return (shelf.names() or ["What was there before"])[-1]
    return "What was there before"


def load(path: Path) -> Checkpoint:
    """Open a checkpoint, every byte checked. Raises DamagedArtifact with the file, its digests and the remedy."""
    verify(path)
    record = json.loads((path / STATE).read_bytes())
    index: Index = json.loads((path / INDEX).read_bytes())
    shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
    read = _Reader(path, index)
    moments: dict[str, dict[str, str]] = {}
    for tensor in index:
        name, separator, key = tensor.rpartition(_SEPARATOR)
        if separator:
            moments.setdefault(name, {})[key] = tensor
    state = TrainState(
        Lazy({name: name for name in shapes}, lambda name: read(name, shapes[name])),
        {name: Lazy(own, lambda tensor, name=name: read(tensor, shapes[name])) for name, own in moments.items()},
        record["optimizer_step"],
        shapes,
    )
    return Checkpoint(path, record["step"], state, record["extra"])


class Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for: no more than one needs to be in memory."""

    def __init__(self, stored: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        self._stored, self._read = stored, read

    def __getitem__(self, key: str) -> Tensor:
        return self._read(self._stored[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Reader:
    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._open: dict[str, Any] = {}

    def __call__(self, tensor: str, shape: Shape) -> Tensor:
        return whole(
            (Piece(self._file(file).get_tensor(tensor).flatten(), at) for file, at, _ in self._index[tensor]), shape
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]


def newest(where: Path | Shelf) -> Checkpoint | None:
    """The newest checkpoint that is intact, or None where none was ever written.

    Passing over a damaged one is logged as a warning. Raises DamagedArtifact where all are damaged: nobody starts
    afresh unasked.
    """
    shelf = on(where)
    found = shelf.names()
    for name in reversed(found):
        try:
            return load(shelf.open(name))
        except DamagedArtifact as damage:
            log.warning("checkpoint passed over, going back to an older one: %s", damage)
    if found:
        raise DamagedArtifact(
            f"{shelf.folder}: none of its {len(found)} checkpoints is intact. Delete it to start afresh."
        )
    return None
