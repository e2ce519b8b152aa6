"""Checkpoints: published folders `step-00000100/` of safetensors and JSON, of which the newest intact one counts."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import TrainState
from pipeline.errors import DamagedArtifact
from pipeline.faults import fault_point
from pipeline.publish import SCRATCH_PREFIX, publishing, verify

log = logging.getLogger("gristmill")

PARAMS, OPTIMIZER, STATE = "params.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_SEPARATOR = "::"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What training goes on from."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: TrainState
    extra: dict[str, Any] = field(default_factory=dict)
    """What the training loop kept beside it: plain JSON."""


def save(folder: Path, step: int, state: TrainState, extra: Mapping[str, Any]) -> Path:
    """Publish `folder/step-00000100`, whole or not at all; on return it is on the disk. `extra` must be plain JSON."""
    target = folder / f"step-{step:08d}"
    with publishing(target, {"stage": "checkpoint", "step": step}) as scratch:
        save_file(state.params, scratch / PARAMS)
        fault_point("checkpoint.save")
        save_file(_flat(state.optimizer), scratch / OPTIMIZER)
        record = {"step": step, "optimizer_step": state.optimizer_step, "extra": dict(extra)}
        (scratch / STATE).write_text(json.dumps(record, indent=2, sort_keys=True))
    fault_point("checkpoint.saved")
    return target


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, every byte checked. Raises DamagedArtifact with the file, its digests and the remedy."""
    verify(path)
    record = json.loads((path / STATE).read_bytes())
    moments = _nested(load_file(path / OPTIMIZER))
    state = TrainState(load_file(path / PARAMS), moments, record["optimizer_step"])
    return Checkpoint(path, record["step"], state, record["extra"])


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, or None. Passing over a damaged one is logged as a warning."""
    for path in reversed(_published(folder)):
        try:
            return load(path)
        except DamagedArtifact as damage:
            log.warning("checkpoint passed over, going back to an older one: %s", damage)
    return None


def keep_last(folder: Path, k: int) -> None:
    """Delete all but the `k` newest checkpoints, and what killed writers left. For the folder's one writer only."""
    assert k >= 1, k
    for path in _published(folder)[:-k]:
        path.rename(path.with_name(f"{SCRATCH_PREFIX}{path.name}-old"))  # a kill in mid-delete leaves no half of one
    for orphan in folder.glob(f"{SCRATCH_PREFIX}step-*"):
        shutil.rmtree(orphan)


def _published(folder: Path) -> list[Path]:
    """Oldest first, intact or not."""
    numbered = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _flat(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}{_SEPARATOR}{key}": value for name, own in moments.items() for key, value in own.items()}


def _nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    for joined, value in flat.items():
        name, _, key = joined.rpartition(_SEPARATOR)
        moments.setdefault(name, {})[key] = value
    return moments
