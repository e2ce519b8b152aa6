"""Which points of a journal a tracker has not been sent yet: a byte offset for each, kept only to send less."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.record import Record, folder
from pipeline.store import Store
from pipeline.tracking import Point, system_path

STATE = "mirror.json"


@dataclass(frozen=True)
class Offsets:
    """How much of each journal a tracker run has. Losing the file is harmless: a point sent again changes nothing."""

    path: Path

    @classmethod
    def of(cls, home: Path, run: str) -> "Offsets":
        return cls(folder(home, run) / STATE)

    def get(self, key: str, run_id: str) -> int:
        """How many bytes of the journal of this key this tracker run has: 0 where it is another run's offset."""
        known = self._read().get(key, {})
        return int(known["bytes"]) if known.get("run_id") == run_id else 0

    def put(self, key: str, run_id: str, sent_bytes: int) -> None:
        state = self._read() | {key: {"run_id": run_id, "bytes": sent_bytes}}
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(state, indent=2))
        scratch.replace(self.path)

    def sent(self, key: str) -> int:
        """How many bytes of this journal any tracker run has."""
        return int(self._read().get(key, {}).get("bytes", 0))

    def _read(self) -> dict[str, dict[str, int | str]]:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}


def journals(store: Store, kind: str, key: str) -> dict[str, Path]:
    """The journals of a stage, by the names that their offsets are kept under: its own, and that of the machine."""
    journal = store.journal(kind, key)
    return {key: journal, f"{key}.system": system_path(journal)}


def points_after(journal: Path, offset: int) -> Iterator[tuple[Point, int]]:
    """The whole lines from a byte offset on, each with the offset behind it. A torn last line is left for later."""
    if not journal.exists():
        return
    with journal.open("rb") as lines:
        lines.seek(max(0, offset - 1))
        if offset and lines.read(1) != b"\n":  # another journal has taken the place of the one that was sent
            lines.seek(0)
        end = lines.tell()
        for line in lines:
            if line.endswith(b"\n"):
                end += len(line)
                yield Point(**json.loads(line)), end


def unsent(home: Path, record: Record) -> int:
    """How many values the journals of a run hold that its tracker does not have."""
    store, offsets = Store(home), Offsets.of(home, record.run)
    keyed = [journals(store, stage.kind, stage.key) for stage in record.stages if stage.key]
    return sum(
        len(point.metrics)
        for of_stage in keyed
        for name, journal in of_stage.items()
        for point, _ in points_after(journal, offsets.sent(name))
    )
