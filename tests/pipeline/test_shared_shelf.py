"""Checkpoints of unfinished stages in a store that machines share."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import checkpoint, publish, remote, shelf
from pipeline.errors import EnvironmentProblem
from pipeline.shelf import SharedShelf, Writer
from pipeline.state import Shard
from pipeline.store import Store
from pipeline.tracking import Journal
from tests.pipeline.shared_stores import flip_a_bit, killed_at, new_url, steps, written
from tests.pipeline.test_checkpoint import EXTRA, SHAPES, assert_holds, halves, save_halves, shard


def shelves_of(tmp_path: Path, url: str, *names: str) -> list[SharedShelf]:
    found = [Store(tmp_path / name, url).shelf("toy", "k") for name in names]
    return [one for one in found if isinstance(one, SharedShelf)]


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_ranks_on_machines_of_their_own_make_one_checkpoint_and_any_machine_reads_it(tmp_path: Path, url: str):
    one, two, three = shelves_of(tmp_path, url, "one", "two", "three")
    assert checkpoint.newest(one) is None
    name = save_halves([one, two], 5)
    assert [files(tmp_path / machine) for machine in ("one", "two")] == [[], []]
    for shelf_ in (one, two, three):
        found = checkpoint.newest(shelf_)
        assert_holds(found, 5)
        shelf_.let_go(name)
    assert files(tmp_path) == [] or url.startswith("file")
    there = publish.parse_manifest(remote.read(f"{one.url}/{name}/{publish.MANIFEST}") or b"")
    assert there is not None
    assert [name for name in there.files if "00001-of" in name] == [
        "optimizer-00001-of-00002.safetensors",
        "params-00001-of-00002.safetensors",
    ]


def test_the_points_before_a_checkpoint_are_there_before_it(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    written(one.journal("toy", "k"), 1, 2)
    checkpoint.save(one.shelf("toy", "k"), 2, shard(2), EXTRA)
    two.pull_journal("toy", "k")
    assert steps(two) == [1, 2]


def test_once_the_artifact_is_there_its_checkpoints_are_gone(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    for below in ("", "best"):
        checkpoint.save(one.shelf("toy", "k", below), 2, shard(2), EXTRA)
        assert_holds(checkpoint.newest(two.shelf("toy", "k", below)), 2)
    with two.writing("toy", "k", {}) as out:
        (out / "a").write_text("done")
    assert not two.work("toy", "k").exists()
    assert remote.names(two.url(two.work("toy", "k"))) == []
    assert checkpoint.newest(one.shelf("toy", "k")) is None


def test_of_several_machines_that_look_the_newest_is_fetched_once(tmp_path: Path, s3: str):
    url = new_url("s3", tmp_path)
    one, two = shelves_of(tmp_path, url, "one", "two")
    save_halves([one, one], 3)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: checkpoint.newest(two), range(8)):
            assert_holds(found, 3)
    assert [path.name for path in two.folder.iterdir()] == one.names()


def test_the_last_k_are_kept_in_the_store_and_others_for_good(tmp_path: Path, url: str):
    (shelf_,), kept = shelves_of(tmp_path, url, "one"), Store(tmp_path / "one", url).kept("toy", "k")
    for step in (1, 2, 10, 30):
        name = save_halves([shelf_, shelf_], step, attempt=step)
        if step < 3:
            shelf_.keep_for_good(name, kept)
            shelf_.keep_for_good(name, kept)
        shelf_.keep_last(2)
    assert remote.names(shelf_.url) == shelf_.names() == ["step-00000010-000000000000a", "step-00000030-000000000001e"]
    assert shelf_.steps() == [10, 30]
    assert kept.names() == ["step-00000001", "step-00000002"]
    assert_holds(checkpoint.newest(kept), 2)


def test_parts_of_an_earlier_attempt_are_not_mixed_in_and_go_away(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    one, two = shelves_of(tmp_path, url, "one", "two")
    checkpoint.save(two, 5, halves(99)[1], EXTRA, Writer(rank=1, world_size=2, attempt=1 << 40))
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(EnvironmentProblem, match=r"rank 1 did not hand in .*/step-00000005-0+2 "):
            checkpoint.save(one, 5, halves(5)[0], EXTRA, Writer(world_size=2, attempt=2))
    assert checkpoint.newest(two) is None
    name = save_halves([one, two], 5, attempt=3)
    assert remote.names(one.url) == [name]
    assert_holds(checkpoint.newest(two), 5)
    name = save_halves([one, two], 5, attempt=4)
    assert remote.names(one.url) == [name]


def test_a_part_of_the_next_checkpoint_of_a_step_survives_the_sealing_of_the_one_before(tmp_path: Path, url: str):
    """Ranks do not wait for each other: the second one may be ahead by what it has handed in."""
    one, two = shelves_of(tmp_path, url, "one", "two")
    for attempt in (7, 8):
        checkpoint.save(two, 5, halves(5)[1], EXTRA, Writer(rank=1, world_size=2, attempt=attempt))
    for attempt in (7, 8):
        path = checkpoint.save(one, 5, halves(5)[0], EXTRA, Writer(world_size=2, attempt=attempt))
    assert remote.names(one.url) == [path.name]
    assert_holds(checkpoint.newest(two), 5)


def test_a_rank_that_cannot_write_its_part_says_why_to_the_others(tmp_path: Path, url: str):
    one, two = shelves_of(tmp_path, url, "one", "two")
    cannot = Shard({"no such tensor": halves(1)[1].params["a.bias"]}, {}, 1, SHAPES)
    with pytest.raises(KeyError):
        checkpoint.save(two, 1, cannot, EXTRA, Writer(rank=1, world_size=2))
    with pytest.raises(EnvironmentProblem, match="rank 1: 'no such tensor'"):
        checkpoint.save(one, 1, halves(1)[0], EXTRA, Writer(world_size=2))


def test_a_damaged_checkpoint_in_the_store_is_passed_over_aloud(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
):
    one, two = shelves_of(tmp_path, url, "one", "two")
    save_halves([one, two], 1)
    name = save_halves([one, two], 2)
    flip_a_bit(f"{one.url}/{name}/params-00001-of-00002.safetensors", tmp_path)
    assert_holds(checkpoint.newest(two), 1)
    assert "going back to an older one" in caplog.text
    assert f"{one.url}/{name}/params-00001-of-00002.safetensors: damaged" in caplog.text


def test_a_checkpoint_from_before_there_was_a_store_is_gone_on_from_and_shared(tmp_path: Path, url: str):
    checkpoint.save(Store(tmp_path / "one").shelf("toy", "k"), 4, shard(4), EXTRA)
    one, two = shelves_of(tmp_path, url, "one", "two")
    assert_holds(checkpoint.newest(one), 4)
    one.let_go("step-00000004")
    assert_holds(checkpoint.newest(two), 4)
    assert_holds(checkpoint.newest(Store(tmp_path / "one").shelf("toy", "k")), 4)


SAVE = """
import sys; from pathlib import Path; from pipeline.store import Store; from tests.pipeline.test_checkpoint import *
one, two = (Store(Path(sys.argv[1]) / name, sys.argv[2]).shelf("toy", "k") for name in ("one", "two"))
save_halves([one, two], 2, 8); one.keep_last(1)
"""


@pytest.mark.parametrize(
    ("fault", "survivor"),
    [
        ("checkpoint.receipt", 1),
        ("checkpoint.upload:2", 1),
        ("checkpoint.upload:3", 1),
        ("checkpoint.seal", 1),
        ("checkpoint.saved:2", 2),
        ("remote.delete", 2),
    ],
)
def test_a_kill_while_saving_to_a_store_leaves_a_whole_checkpoint(tmp_path: Path, fault: str, survivor: int):
    url = new_url("file", tmp_path)
    one, two = shelves_of(tmp_path, url, "one", "two")
    save_halves([one, two], 1)
    killed_at(fault, SAVE, str(tmp_path), url)
    assert_holds(checkpoint.newest(two), survivor)
    for one_of in (one, two):
        one_of.sweep()
    name = save_halves([one, two], 2, attempt=9)
    one.keep_last(1)
    assert remote.names(one.url) == [name]
    assert_holds(checkpoint.newest(two), 2)


def test_a_journal_that_grows_elsewhere_is_appended_to_under_whoever_has_it_open(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    still_open = Journal(two.journal("toy", "k"))
    written(one.journal("toy", "k"), 1, 2)
    one.push_journal("toy", "k")
    two.pull_journal("toy", "k")
    still_open.append({"b": 1.0}, step=3)
    still_open.close()
    assert steps(two) == [1, 2, 3]


@pytest.mark.parametrize("shared", [True, False])
def test_a_request_to_stop_is_seen_and_taken_back_by_the_run_that_it_is_for(tmp_path: Path, url: str, shared: bool):
    one = Store(tmp_path / "one", url if shared else None, "a")
    two = Store(tmp_path / ("two" if shared else "one"), one.remote, "a")
    other = replace(one, run="b")
    assert not two.stop_requested("toy", "k")
    one.request_stop("toy", "k")
    other.clear_stop("toy", "k")
    assert two.stop_requested("toy", "k")
    assert not other.stop_requested("toy", "k")
    two.clear_stop("toy", "k")
    assert not one.stop_requested("toy", "k")


def test_what_is_left_of_building_an_artifact_goes_when_it_is_used_again(tmp_path: Path, url: str):
    store = Store(tmp_path, url)
    with store.writing("toy", "k", {}) as out:
        (out / "a").write_text("done")
    checkpoint.save(store.shelf("toy", "k", "best"), 2, shard(2), EXTRA)
    store.forget_work("toy", "k")
    assert remote.names(store.url(store.work("toy", "k"))) == []
