"""Checkpoints: published folders `step-00000100/` of safetensors and JSON, of which the newest intact one counts.

Each rank writes what it holds, so that no rank ever needs the whole: `params-00001-of-00004.safetensors` has tensors
by parameter name, whole or cut, and `index.json` says which elements of which tensor lie in which file. Rank 0 seals
the folder when the parts of all ranks are in; until then it does not exist.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import DamagedArtifact, EnvironmentProblem
from pipeline.faults import fault_point
from pipeline.publish import SCRATCH_PREFIX, publishing, verify
from pipeline.state import Piece, Shape, Shard, TrainState, whole

log = logging.getLogger("gristmill")

STATE, INDEX, RECEIPT = "state.json", "index.json", "receipt.json"
PATIENCE_SECONDS = 120.0
"""How long rank 0 waits for another rank's part."""
SPARE_BYTES = 2**24
"""Disk space that must be left after a checkpoint, for what else is written meanwhile."""
_NAME = re.compile(r"step-(\d{8,})")
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


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Which rank writes. `attempt` is a number that the ranks share for this one checkpoint and for no other."""

    rank: int = 0
    world_size: int = 1
    attempt: int = 0


def save(folder: Path, step: int, shard: Shard, extra: Mapping[str, Any], writer: Writer | None = None) -> Path:
    """Write this rank's part of `folder/step-00000100`. On rank 0, return when the whole is published and on the disk.

    `extra` must be plain JSON. Raises EnvironmentProblem where the disk is full or a rank's part does not come.
    """
    writer = writer or Writer()
    target = location(folder, step)
    try:
        _need_space(folder, shard.n_bytes)
        if writer.rank == 0:
            _publish(target, step, shard, extra, writer)
        else:
            _hand_in(_desk(target, writer, writer.rank), shard, writer)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"{target}: the checkpoint could not be written: {reason}. {_last(folder)} is intact; "
            "make room or mend the disk, and give the same command again"
        ) from error
    fault_point("checkpoint.saved")
    return target


def _publish(target: Path, step: int, shard: Shard, extra: Mapping[str, Any], writer: Writer) -> None:
    with publishing(target, {"stage": "checkpoint", "step": step, "world_size": writer.world_size}) as scratch:
        index = _write(scratch, shard, writer)
        for rank in range(1, writer.world_size):
            for tensor, places in _collect(_desk(target, writer, rank), scratch, rank).items():
                index.setdefault(tensor, []).extend(places)
        record = {"step": step, "optimizer_step": shard.optimizer_step, "shapes": shard.shapes, "extra": dict(extra)}
        (scratch / INDEX).write_text(json.dumps(index, sort_keys=True))
        (scratch / STATE).write_text(json.dumps(record, indent=2, sort_keys=True))


def _desk(target: Path, writer: Writer, rank: int) -> Path:
    """Where a rank hands in its part for rank 0 to collect."""
    return target.with_name(f"{SCRATCH_PREFIX}{target.name}-{writer.attempt}-rank-{rank}")


def _hand_in(desk: Path, shard: Shard, writer: Writer) -> None:
    desk.mkdir(parents=True)
    try:
        receipt: dict[str, Any] = {"index": _write(desk, shard, writer)}
    except Exception as error:
        _sign(desk, {"error": str(error)})
        raise
    _sign(desk, receipt)


def _sign(desk: Path, receipt: Mapping[str, Any]) -> None:
    """Last of all, at once: it says that the files are whole, or why they never will be."""
    scratch = desk / f"{SCRATCH_PREFIX}{RECEIPT}"
    scratch.write_text(json.dumps(receipt))
    scratch.rename(desk / RECEIPT)


def _collect(desk: Path, scratch: Path, rank: int) -> Index:
    """Move a rank's part into the checkpoint, as soon as it is whole."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (desk / RECEIPT).exists():
        if time.monotonic() > limit:
            raise EnvironmentProblem(
                f"rank {rank} did not hand in its part of {scratch.parent / desk.name} within "
                f"{PATIENCE_SECONDS:.0f} s; see its log, and give the same command again"
            )
        time.sleep(0.01)
    receipt = json.loads((desk / RECEIPT).read_text())
    if "error" in receipt:
        raise OSError(f"rank {rank}: {receipt['error']}")
    index: Index = receipt["index"]
    for file in {file for places in index.values() for file, _, _ in places}:
        (desk / file).rename(scratch / file)
    shutil.rmtree(desk)
    return index


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


def _last(folder: Path) -> str:
    steps = published(folder)
    return steps[-1].name if steps else "What was there before"


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


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, or None where none was ever written.

    Passing over a damaged one is logged as a warning. Raises DamagedArtifact where all are damaged: nobody starts
    afresh unasked.
    """
    found = published(folder)
    for path in reversed(found):
        try:
            return load(path)
        except DamagedArtifact as damage:
            log.warning("checkpoint passed over, going back to an older one: %s", damage)
    if found:
        raise DamagedArtifact(f"{folder}: none of its {len(found)} checkpoints is intact. Delete it to start afresh.")
    return None


def keep_last(folder: Path, k: int) -> None:
    """Delete all but the `k` newest checkpoints. For the folder's one writer only."""
    assert k >= 1, k
    for path in published(folder)[:-k]:
        aside = path.with_name(f"{SCRATCH_PREFIX}{path.name}-old")
        path.rename(aside)  # a kill in mid-delete leaves no half of one
        shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Delete what killed writers left in a folder and those below it. Call it while nobody writes there."""
    for orphan in list(folder.rglob(f"{SCRATCH_PREFIX}step-*")):
        shutil.rmtree(orphan, ignore_errors=True)


def keep_for_good(path: Path, folder: Path) -> None:
    """Give a checkpoint a second name where `keep_last` does not come. Costs no space where links can be made."""
    target = folder / path.name
    if target.exists():
        return
    scratch = folder / f"{SCRATCH_PREFIX}{path.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(path, scratch, copy_function=_link_or_copy)
    scratch.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def published(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, intact or not."""
    numbered = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def location(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"step-{step:08d}"
