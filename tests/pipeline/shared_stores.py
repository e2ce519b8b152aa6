"""Stores that machines share, as tests use them: their addresses, what is put there, and kills on the way."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

from pipeline import publish, remote
from pipeline.store import Store
from pipeline.tracking import Journal, read_journal

BUCKET = "toy-bucket"


def new_url(scheme: str, tmp_path: Path) -> str:
    name = uuid.uuid4().hex[:8]
    return {
        "file": f"file://{tmp_path}/shared/{name}",
        "memory": f"memory://{name}",
        "s3": f"s3://{BUCKET}/{name}",
    }[scheme]


def make(target: Path, text: str = "payload") -> Path:
    with publish.publishing(target, {"kind": "toy"}) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "data.txt").write_text(text)
        (scratch / "empty").write_text("")
    return target


def flip_a_bit(url: str, tmp_path: Path) -> None:
    copy = tmp_path / "flipped"
    assert remote.get_file(url, copy)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    remote.put_file(copy, url)


def killed_at(point: str, code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"GRISTMILL_FAULT": point, "PYTHONPATH": "."},
        check=False,
    )
    assert done.returncode == -9


def written(path: Path, *steps: int) -> None:
    journal = Journal(path)
    for step in steps:
        journal.append({"a": step}, step=step)
    journal.close()


def steps(store: Store) -> list[int]:
    return [point.step for point in read_journal(store.journal("toy", "k"))]
