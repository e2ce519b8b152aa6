import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import publish
from pipeline.errors import DamagedArtifact
from tests.pipeline.shared_stores import killed_at


def make(target: Path, text: str = "payload") -> Path:
    with publish.publishing(target, {"kind": "toy"}) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "data.txt").write_text(text)
        (scratch / "empty").write_text("")
    return target


def test_what_is_published_is_complete_and_verified(tmp_path: Path):
    manifest = publish.verify(make(tmp_path / "a"))
    assert manifest.meta == {"kind": "toy"}
    assert manifest.files.keys() == {"deep/data.txt", "empty"}


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096])
def test_a_file_is_digested_window_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.setattr(publish, "WINDOW_BYTES", mmap.ALLOCATIONGRANULARITY)
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert publish.file_digest(tmp_path / "a") == blake3(data).hexdigest()


def test_others_may_read_what_its_writer_kept_to_itself(tmp_path: Path):
    with publish.publishing(tmp_path / "a", {}) as scratch:
        (scratch / "weights").touch(mode=0o600)
        (scratch / "usual").touch()
    weights, usual = ((tmp_path / "a" / name).stat().st_mode for name in ("weights", "usual"))
    assert weights == usual


def test_a_block_that_raises_leaves_nothing(tmp_path: Path):
    def stop_half_way() -> None:
        with publish.publishing(tmp_path / "a", {}) as scratch:
            (scratch / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_older_artifact_is_replaced_whole(tmp_path: Path):
    make(tmp_path / "a", "old")
    make(tmp_path / "a", "new")
    assert (tmp_path / "a" / "deep" / "data.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_equal_bytes_have_equal_digests_and_meta_does_not_count(tmp_path: Path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    with publish.publishing(second, {"kind": "other", "notes": {"seconds": 3}}) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "data.txt").write_text("payload")
        (scratch / "empty").write_text("")
    assert publish.verify(first).digest == publish.verify(second).digest


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, where: int, bit: int):
    target = make(tmp_path_factory.mktemp("flip") / "a", "x" * 997)
    path = target / "deep" / "data.txt"
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact) as error:
        publish.verify(target)
    for part in (str(path), "expected", "actual", "Delete"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["deep/data.txt", "empty", publish.MANIFEST])
def test_a_missing_file_is_found(tmp_path: Path, name: str):
    target = make(tmp_path / "a")
    (target / name).unlink()
    with pytest.raises(DamagedArtifact, match="Delete"):
        publish.verify(target)


def test_a_manifest_cut_short_is_no_manifest(tmp_path: Path):
    target = make(tmp_path / "a")
    text = (target / publish.MANIFEST).read_text()
    (target / publish.MANIFEST).write_text(text[: len(text) // 2])
    assert publish.read_manifest(target) is None


KILLED = """
from pathlib import Path
from pipeline import publish
import sys
with publish.publishing(Path(sys.argv[1]), {}) as scratch:
    (scratch / "data.txt").write_text("new")
"""


@pytest.mark.parametrize("point", ["publish.manifest", "publish.rename"])
def test_a_kill_at_any_point_leaves_the_old_artifact_or_none(tmp_path: Path, point: str):
    make(tmp_path / "a", "old")
    for target in ("a", "b"):
        killed_at(f"{point}:1", KILLED, str(tmp_path / target))
    assert (tmp_path / "a" / "deep" / "data.txt").read_text() == "old"
    publish.verify(tmp_path / "a")
    assert publish.read_manifest(tmp_path / "b") is None
    publish.sweep(tmp_path / "a")
    publish.sweep(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_artifact_that_was_moved_aside_when_its_writer_was_killed_is_put_back(tmp_path: Path):
    make(tmp_path / "a", "old")
    killed_at("publish.aside:1", KILLED, str(tmp_path / "a"))
    assert publish.read_manifest(tmp_path / "a") is None
    publish.sweep(tmp_path / "a")
    publish.verify(tmp_path / "a")
    assert (tmp_path / "a" / "deep" / "data.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fills_up_leaves_the_old_artifact(tmp_path: Path):
    make(tmp_path / "a", "old")
    code = """
import resource, signal, sys
from pathlib import Path
from pipeline import publish
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with publish.publishing(Path(sys.argv[1]), {}) as scratch:
    (scratch / "data.txt").write_text("x" * 100_000)
"""
    full = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large" in full.stderr
    assert (tmp_path / "a" / "deep" / "data.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
