import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import checkpoint, shelf
from pipeline.errors import DamagedArtifact, EnvironmentProblem
from pipeline.shelf import Shelf, Writer
from pipeline.state import Piece, Shard, TrainState, join, piece
from tests.pipeline.shared_stores import killed_at

ROOT = Path(__file__).parents[2]


PARAMS, OPTIMIZER = "params-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"
EXTRA = {"seed": 7, "best": {"loss": 1.5}}
SHAPES = {"a.weight": (3, 2), "a.bias": (2,)}


def shard(value: float) -> Shard:
    moments = {"exp_avg": piece(torch.full((3, 2), value)), "exp_avg_sq": piece(torch.full((3, 2), -value))}
    params = {"a.weight": piece(torch.full((3, 2), value)), "a.bias": piece(torch.zeros(2))}
    return Shard(params, {"a.weight": moments}, int(value), SHAPES)


def state(value: float) -> TrainState:
    return join([shard(value)])


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, shard(step), EXTRA)


def halves(value: float) -> list[Shard]:
    """What `shard(value)` is, cut in two."""
    all_ = shard(value)
    one = Shard({"a.weight": all_.params["a.weight"]}, {}, all_.optimizer_step, SHAPES)
    return [one, Shard({"a.bias": all_.params["a.bias"]}, all_.optimizer, all_.optimizer_step, SHAPES)]


def save_halves(shelves: Sequence[Shelf], step: int, attempt: int = 7) -> str:
    """Save a checkpoint as two ranks do, each from a machine of its own."""
    path = Path()
    for rank in (1, 0):
        writer = Writer(rank=rank, world_size=2, attempt=attempt)
        path = checkpoint.save(shelves[rank], step, halves(step)[rank], EXTRA, writer)
    return path.name


def assert_holds(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.state.optimizer_step) == (step, step)
    assert found.extra == EXTRA
    assert_equal(found.state, state(step))


def assert_equal(one: TrainState, other: TrainState) -> None:
    assert one.shapes == other.shapes
    torch.testing.assert_close(dict(one.params), dict(other.params), rtol=0, atol=0)
    moments = [{name: dict(own) for name, own in s.optimizer.items()} for s in (one, other)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 100, shard(100), EXTRA)
    assert path == tmp_path / "step-00000100"
    assert_holds(checkpoint.load(path), 100)


def test_a_state_without_moments_can_be_kept(tmp_path: Path) -> None:
    start = Shard({"a": piece(torch.zeros(1))}, {}, 0, {"a": (1,)})
    assert checkpoint.load(checkpoint.save(tmp_path, 0, start, {})).state.optimizer == {}


def test_equal_states_make_equal_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1)
    for file in sorted((tmp_path / "a" / "step-00000001").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / "step-00000001" / file.name).read_bytes()


def test_the_newest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    save(tmp_path, 900, 1000, 100_000_000)
    assert_holds(checkpoint.newest(tmp_path), 100_000_000)


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint_is_none(exists: bool, tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path if exists else tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", [PARAMS, OPTIMIZER, checkpoint.STATE, checkpoint.INDEX])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_and_an_older_checkpoint_found(
    name: str, harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if harm != "remove":
        path.write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(DamagedArtifact, match=rf"{name}: damaged\. blake3 expected [0-9a-f]{{64}}, actual .+ Delete"):
        checkpoint.load(path.parent)
    assert_holds(checkpoint.newest(tmp_path), 1)
    assert "going back to an older one" in caplog.text
    assert str(path) in caplog.text


def test_nobody_starts_afresh_unasked_when_all_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(DamagedArtifact, match=r"none of its 1 checkpoints is intact\. Delete it to start afresh"):
        checkpoint.newest(tmp_path)


def test_the_last_k_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, 30)
    (tmp_path / ".tmp-step-00000031-abc").mkdir()
    (tmp_path / "journal").mkdir()
    Shelf(tmp_path).sweep()
    Shelf(tmp_path).keep_last(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal", "step-00000010", "step-00000030"]
    Shelf(tmp_path).keep_last(2)
    assert_holds(checkpoint.newest(tmp_path), 30)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, shard(1), {})
    save(tmp_path, 5)
    assert_holds(checkpoint.newest(tmp_path), 5)


def test_extra_that_json_cannot_hold_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, shard(1), {"bad": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "survivor"),
    [("checkpoint.save:1", 1), ("publish.manifest:1", 1), ("publish.rename:1", 1), ("checkpoint.saved:1", 2)],
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(fault: str, survivor: int, tmp_path: Path) -> None:
    save(tmp_path, 1)
    code = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_checkpoint; "
        "test_checkpoint.save(pathlib.Path(sys.argv[1]), 2)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path, ROOT, Path(__file__).parent],
        env=os.environ | {"GRISTMILL_FAULT": fault},
        check=False,
    )
    assert killed.returncode == -9
    assert_holds(checkpoint.newest(tmp_path), survivor)
    Shelf(tmp_path).sweep()
    save(tmp_path, 3)
    Shelf(tmp_path).keep_last(1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_kill_while_the_only_checkpoint_is_replaced_leaves_it(tmp_path: Path) -> None:
    save(tmp_path / "best", 1)
    code = (
        "import sys, pathlib; from tests.pipeline import test_checkpoint; "
        "test_checkpoint.save(pathlib.Path(sys.argv[1]), 1)"
    )
    killed_at("publish.aside:1", code, str(tmp_path / "best"))
    Shelf(tmp_path).sweep()
    assert_holds(checkpoint.newest(tmp_path / "best"), 1)


@settings(max_examples=25, deadline=None)
@given(world_size=st.integers(1, 5), data=st.data())
def test_any_cut_into_ranks_makes_the_same_whole(world_size: int, data: st.DataObject) -> None:
    wanted = state(3)
    inner = {
        n: sorted(data.draw(st.integers(0, v.numel())) for _ in range(world_size - 1)) for n, v in wanted.params.items()
    }
    ends = {name: (0, *inner[name], value.numel()) for name, value in wanted.params.items()}

    def cut(name: str, value: torch.Tensor, rank: int) -> Piece:
        start, end = ends[name][rank : rank + 2]
        return Piece(value.flatten()[start:end].clone(), start)

    with tempfile.TemporaryDirectory() as folder:
        for rank in reversed(range(world_size)):
            params = {name: cut(name, value, rank) for name, value in wanted.params.items()}
            moments = {
                n: {key: cut(n, value, rank) for key, value in own.items()} for n, own in wanted.optimizer.items()
            }
            writer = checkpoint.Writer(rank=rank, world_size=world_size, attempt=7)
            checkpoint.save(Path(folder), 3, Shard(params, moments, 3, SHAPES), EXTRA, writer)
        assert [p.name for p in Path(folder).iterdir()] == ["step-00000003"]
        assert_holds(checkpoint.newest(Path(folder)), 3)


def test_without_every_part_there_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(EnvironmentProblem, match="rank 1 did not hand in its part"):
        checkpoint.save(tmp_path, 1, shard(1), {}, checkpoint.Writer(world_size=2))
    assert checkpoint.newest(tmp_path) is None


def test_a_full_disk_leaves_the_last_one_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 10**18)
    with pytest.raises(EnvironmentProblem, match=r"nearly full: it needs .* MB are free. step-00000001 is intact"):
        save(tmp_path, 2)
    assert_holds(checkpoint.newest(tmp_path), 1)


def test_a_disk_that_fills_up_in_mid_write_leaves_the_last_one(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the write itself fails."""
    save(tmp_path, 1)
    code = (
        "import resource, signal, sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "test_checkpoint.save(pathlib.Path(sys.argv[1]), 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, ROOT, Path(__file__).parent], capture_output=True, text=True, check=False
    )
    assert "step-00000001 is intact; make room or mend the disk" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert_holds(checkpoint.newest(tmp_path), 1)


def test_a_checkpoint_kept_for_good_outlives_the_others(tmp_path: Path) -> None:
    save(tmp_path / "work", 1)
    Shelf(tmp_path / "work").keep_for_good("step-00000001", Shelf(tmp_path / "kept"))
    save(tmp_path / "work", 2, 3)
    Shelf(tmp_path / "work").keep_last(1)
    assert_holds(checkpoint.newest(tmp_path / "kept"), 1)
