"""The ledger of training: which rank read which samples in which step, one JSON line each, and how to check it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.batches import Ints
from pipeline.engine import Engine
from pipeline.train import StepReport


class Ledger:
    """One rank's file in a folder. What a step read is written after it; a restart strikes out what it does again."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        folder.mkdir(parents=True, exist_ok=True)

    def forget_from(self, step: int) -> None:
        """Strike out `step` and what came after, in the files of all ranks. Every rank calls it."""
        if self._engine.rank == 0:
            for path in self._folder.glob("rank-*.jsonl"):
                kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < step]
                scratch = path.with_suffix(".tmp")
                scratch.write_text("".join(kept))
                scratch.replace(path)
        self._engine.agree([])

    def follow(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """Pass reports through, and write down what this rank read."""
        with (self._folder / f"rank-{self._engine.rank:05d}.jsonl").open("a") as file:
            for report in reports:
                _append(file, report.step, self._engine.world_size, report.own_ids)
                yield report


def _append(file: IO[str], step: int, world_size: int, ids: Ints) -> None:
    file.write(json.dumps({"step": step, "world_size": world_size, "ids": ids.tolist()}) + "\n")
    file.flush()


def _whole_lines(path: Path) -> list[str]:
    """A kill in mid-write leaves a last line without its end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read(folder: Path) -> dict[int, "Counter[int]"]:
    """`{step: how often each sample was read in it}`, all ranks together."""
    steps: dict[int, Counter[int]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in _whole_lines(path):
            entry: dict[str, Any] = json.loads(line)
            steps.setdefault(entry["step"], Counter()).update(entry["ids"])
    return steps


def check(folder: Path, expected: Callable[[int], Ints], steps: int) -> list[str]:
    """What is wrong with a ledger, a line a fault; nothing where every step read its samples, each once.

    `expected(step)` are the samples that step should have read, all ranks together.
    """
    seen = read(folder)
    faults = [f"step {step}: read, but there are {steps} steps" for step in sorted(seen) if step >= steps]
    for step in range(steps):
        wanted, got = Counter(expected(step).tolist()), seen.get(step, Counter())
        lost, doubled = sorted((wanted - got).elements()), sorted((got - wanted).elements())
        faults += [f"step {step}: samples never read: {lost}"] if lost else []
        faults += [f"step {step}: samples read too often: {doubled}"] if doubled else []
    return faults
