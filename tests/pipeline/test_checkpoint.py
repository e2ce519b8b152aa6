import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.engine import TrainState
from pipeline.errors import DamagedArtifact

ROOT = Path(__file__).parents[2]


def state(value: float) -> TrainState:
    moments = {"exp_avg": torch.full((3, 2), value), "exp_avg_sq": torch.full((3, 2), -value)}
    params = {"a.weight": torch.full((3, 2), value), "a.bias": torch.zeros(2)}
    return TrainState(params, {"a.weight": moments}, int(value))


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, state(step), {"seed": 7, "best": {"loss": 1.5}})


def assert_holds(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.state.optimizer_step) == (step, step)
    assert found.extra == {"seed": 7, "best": {"loss": 1.5}}
    torch.testing.assert_close(found.state.params, state(step).params, rtol=0, atol=0)
    torch.testing.assert_close(found.state.optimizer, state(step).optimizer, rtol=0, atol=0)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 100, state(100), {"seed": 7, "best": {"loss": 1.5}})
    assert path == tmp_path / "step-00000100"
    assert_holds(checkpoint.load(path), 100)


def test_a_state_without_moments_can_be_kept(tmp_path: Path) -> None:
    start = TrainState({"a": torch.zeros(1)}, {}, 0)
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


@pytest.mark.parametrize("name", [checkpoint.PARAMS, checkpoint.OPTIMIZER, checkpoint.STATE])
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


def test_nothing_is_left_when_all_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_the_last_k_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, 30)
    (tmp_path / ".tmp-step-00000031-abc").mkdir()
    (tmp_path / "journal").mkdir()
    checkpoint.keep_last(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal", "step-00000010", "step-00000030"]
    checkpoint.keep_last(tmp_path, 2)
    assert_holds(checkpoint.newest(tmp_path), 30)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, state(1), {})
    save(tmp_path, 5)
    assert_holds(checkpoint.newest(tmp_path), 5)


def test_extra_that_json_cannot_hold_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, state(1), {"bad": object()})
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
    save(tmp_path, 3)
    checkpoint.keep_last(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
