"""Where the checkpoints of an unfinished stage lie: a folder of this machine or, where machines share a store, its URL.

What stands on a shelf may be the work of many ranks: each `put`s its part, and rank 0 seals the whole when all parts
are in. What is not sealed does not exist. On a shared shelf no part goes through another rank: every one goes straight
to a folder that only this attempt writes, so that nothing of an earlier attempt can be taken for a part of it.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import publish, remote
from pipeline.errors import EnvironmentProblem, GristmillError
from pipeline.faults import fault_point
from pipeline.publish import MANIFEST, SCRATCH_PREFIX

PATIENCE_SECONDS = 120.0
"""How long rank 0 waits for another rank's part."""
LOOK_SECONDS, ASK_SECONDS = 0.01, 0.2
"""How often it looks for it on the disk, and asks a store."""
ATTEMPTS_AHEAD = 1 << 16
"""Numbers that follow one of this training; another training's numbers, which begin at random, are not so near."""
RECEIPT = "receipt.json"
_NAME = re.compile(r"step-(\d{8,})(?:-([0-9a-f]{13}))?")

Card = dict[str, Any]
"""What a rank says of its part: plain JSON."""
Files = dict[str, dict[str, Any]]
"""As in a manifest: `{name: {"blake3", "bytes"}}`."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Which rank writes. `attempt` is a number that the ranks share for this one checkpoint and for no other."""

    rank: int = 0
    world_size: int = 1
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the ranks put on a shelf together.

    `write` writes this rank's files into a folder; on rank 0, `describe` gets the cards of all ranks, in their order,
    and writes what describes the whole. `meta` goes into the manifest.
    """

    meta: dict[str, Any]
    write: Callable[[Path], Card]
    describe: Callable[[Path, Sequence[Card]], None]


def named(step: int, attempt: int = -1) -> str:
    """What the checkpoint after so many steps is called; -1 is no attempt."""
    return f"step-{step:08d}" + (f"-{attempt:013x}" if attempt >= 0 else "")


def parsed(name: str) -> tuple[int, int] | None:
    """The step and the attempt of a name; None where it is not a checkpoint's."""
    match = _NAME.fullmatch(name)
    return match and (int(match[1]), int(match[2], 16) if match[2] else -1)


def _step_of(name: str) -> int:
    found = parsed(name)
    assert found is not None, name
    return found[0]


def _in_order(names: Iterable[str]) -> list[str]:
    numbered = [(found, name) for name in names if (found := parsed(name))]
    return [name for _, name in sorted(numbered)]


@dataclass(frozen=True)
class Shelf:
    """A folder that all ranks reach. Parts change hands by a rename."""

    folder: Path

    def names(self) -> list[str]:
        """The checkpoints, the fewest steps first, intact or not."""
        return _in_order(path.name for path in self.folder.glob("step-*"))

    def steps(self) -> list[int]:
        """How many steps were done at each checkpoint, in order."""
        return sorted({_step_of(name) for name in self.names()})

    def open(self, name: str) -> Path:
        """Where a checkpoint can be read, which is also when it is checked. Raises DamagedArtifact."""
        return self.folder / name

    def let_go(self, name: str) -> None:
        """Say that nobody on this machine reads what `open` gave any more."""

    def put(self, step: int, parts: Parts, writer: Writer) -> str:
        """Put this rank's part on the shelf, and return what the whole is called. On rank 0, when it is sealed.

        It takes the place of an earlier checkpoint of that step. Raises OSError where a rank fails, EnvironmentProblem
        where one never comes.
        """
        target = self.folder / named(step)
        if writer.rank:
            _hand_in(_desk(target, writer, writer.rank), parts)
            return target.name
        with publish.publishing(target, parts.meta) as scratch:
            own, others = parts.write(scratch), range(1, writer.world_size)
            parts.describe(scratch, [own, *(_collect(_desk(target, writer, n), scratch, n) for n in others)])
        return target.name

    def drop(self, name: str) -> None:
        """Delete a checkpoint. A kill in mid-delete leaves no half of one."""
        aside = self.folder / f"{SCRATCH_PREFIX}{name}-old"
        with suppress(FileNotFoundError):
            (self.folder / name).rename(aside)
            shutil.rmtree(aside)

    def keep_last(self, k: int) -> None:
        """Delete all but the `k` newest checkpoints. For the shelf's one writer only."""
        assert k >= 1, k
        first = min(self.steps()[-k:], default=0)
        for name in self._leavings():
            if _step_of(name) < first:
                self.drop(name)

    def _leavings(self) -> list[str]:
        """All that stands there, sealed or not."""
        return self.names()

    def keep_for_good(self, name: str, where: "Shelf") -> None:
        """Give a checkpoint a second place, of the same kind of shelf. Costs no space where links can be made."""
        target = where.folder / named(_step_of(name))
        if target.exists():
            return
        scratch = where.folder / f"{SCRATCH_PREFIX}{target.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.folder / name, scratch, copy_function=_link_or_copy)
        scratch.rename(target)

    def sweep(self) -> None:
        """Clear up what killed writers left on this machine, here and below. Call it while nobody writes there."""
        for prefix in (SCRATCH_PREFIX, remote.PULLING):
            for orphan in list(self.folder.rglob(f"{prefix}step-*")):
                publish.clear(orphan, prefix)


@dataclass(frozen=True)
class SharedShelf(Shelf):
    """A folder of a store that all machines reach. What lies in `folder` is a copy, or from before it was shared."""

    url: str
    pull: Callable[[Path], object]
    """Makes a folder of this machine what it is in the store, whoever else wants that too. Raises DamagedArtifact."""
    before_seal: Callable[[], None]
    """Brings there what has to be there before a checkpoint counts."""

    def names(self) -> list[str]:
        here = super().names()
        there = [name for name in remote.names(self.url) if parsed(name) and name not in here]
        return _in_order([*here, *(name for name in there if self._is_sealed(name))])

    def open(self, name: str) -> Path:
        if self._is_sealed(name):
            self.pull(self.folder / name)
        else:  # it is from before there was a store, or outlived what was there
            publish.verify(self.folder / name)
            remote.push(self.folder / name, f"{self.url}/{name}")
        return self.folder / name

    def let_go(self, name: str) -> None:
        if name != named(_step_of(name)):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def put(self, step: int, parts: Parts, writer: Writer) -> str:
        name = named(step, writer.attempt)
        with _scratch(self.folder / f"{SCRATCH_PREFIX}{name}-rank-{writer.rank}") as scratch:
            if writer.rank:
                self._upload_part(name, scratch, parts, writer.rank)
            else:
                self._seal(name, scratch, parts, writer)
                self._forget_other_attempts(name)
        return name

    def drop(self, name: str) -> None:
        remote.delete(f"{self.url}/{name}")
        super().drop(name)

    def keep_for_good(self, name: str, where: Shelf) -> None:
        assert isinstance(where, SharedShelf)
        remote.copy(f"{self.url}/{name}", f"{where.url}/{named(_step_of(name))}")

    def _leavings(self) -> list[str]:
        return _in_order({*super().names(), *remote.names(self.url)})

    def _is_sealed(self, name: str) -> bool:
        return remote.manifest(f"{self.url}/{name}") is not None

    def _upload_part(self, name: str, scratch: Path, parts: Parts, rank: int) -> None:
        receipt = f"{self.url}/{name}/{_receipt_of(rank)}"
        try:
            card = parts.write(scratch)
            files = self._upload(name, scratch)
        except Exception as error:
            with suppress(GristmillError):
                remote.put(json.dumps({"error": str(error)}).encode(), receipt)
            raise
        fault_point("checkpoint.receipt")
        remote.put(json.dumps({"card": card, "files": files}).encode(), receipt)

    def _seal(self, name: str, scratch: Path, parts: Parts, writer: Writer) -> None:
        cards, files = [parts.write(scratch)], self._upload(name, scratch)
        receipts = [f"{self.url}/{name}/{_receipt_of(rank)}" for rank in range(1, writer.world_size)]
        for rank, url in enumerate(receipts, 1):
            receipt = _awaited(lambda url=url: remote.read(url), ASK_SECONDS, rank, f"{self.url}/{name}")
            cards.append(receipt["card"])
            files |= receipt["files"]
        parts.describe(scratch, cards)
        files |= self._upload(name, scratch, but=files)
        self.before_seal()
        fault_point("checkpoint.seal")
        remote.put(publish.manifest_bytes(parts.meta, files), f"{self.url}/{name}/{MANIFEST}")
        for url in receipts:
            remote.delete_file(url)

    def _upload(self, name: str, folder: Path, but: Iterable[str] = ()) -> Files:
        """Bring the files of a folder into the store; what a manifest says of them."""
        paths = sorted(path for path in folder.iterdir() if path.name not in but)
        files = {path.name: publish.entry(path) for path in paths}
        remote.put_files(folder, files, f"{self.url}/{name}")
        fault_point("checkpoint.upload")
        return files

    def _forget_other_attempts(self, name: str) -> None:
        """Only now, when this one counts, so that there is one at any time.

        Not those that come after it: another rank may have handed in its part of the next one already.
        """
        for other in self._leavings():
            (step, attempt), (other_step, other_attempt) = parsed(name) or (0, 0), parsed(other) or (0, 0)
            if other_step == step and not 0 <= other_attempt - attempt < ATTEMPTS_AHEAD:
                self.drop(other)


def _receipt_of(rank: int) -> str:
    return f"rank-{rank:05d}.{RECEIPT}"


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _desk(target: Path, writer: Writer, rank: int) -> Path:
    """Where a rank hands in its part for rank 0 to collect."""
    return target.with_name(f"{SCRATCH_PREFIX}{target.name}-{writer.attempt}-rank-{rank}")


def _hand_in(desk: Path, parts: Parts) -> None:
    desk.mkdir(parents=True)
    try:
        card = parts.write(desk)
    except Exception as error:
        _sign(desk, {"error": str(error)})
        raise
    fault_point("checkpoint.receipt")
    _sign(desk, {"card": card})


def _sign(desk: Path, receipt: dict[str, Any]) -> None:
    """Last of all, at once: it says that the files are whole, or why they never will be."""
    scratch = desk / f"{SCRATCH_PREFIX}{RECEIPT}"
    scratch.write_text(json.dumps(receipt))
    scratch.rename(desk / RECEIPT)


def _collect(desk: Path, scratch: Path, rank: int) -> Card:
    """Move a rank's part to the others, as soon as it is whole."""
    receipt = _awaited(lambda: _read(desk / RECEIPT), LOOK_SECONDS, rank, str(desk))
    (desk / RECEIPT).unlink()
    for path in list(desk.iterdir()):
        path.rename(scratch / path.name)
    desk.rmdir()
    return receipt["card"]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _awaited(look: Callable[[], bytes | None], pause: float, rank: int, where: str) -> dict[str, Any]:
    """The receipt of a rank. Raises OSError with what it says if it failed, EnvironmentProblem if it never comes."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while (found := look()) is None:
        if time.monotonic() > limit:
            raise EnvironmentProblem(
                f"rank {rank} did not hand in its part of {where} within "
                f"{PATIENCE_SECONDS:.0f} s; see its log, and give the same command again"
            )
        time.sleep(pause)
    receipt = json.loads(found)
    if "error" in receipt:
        raise OSError(f"rank {rank}: {receipt['error']}")
    return receipt


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
