"""A store that machines share: folders, artifacts and journals."""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import filesystems, publish, remote
from pipeline.errors import DamagedArtifact, EnvironmentProblem
from pipeline.runner import Built, build, plan, submit_here
from pipeline.store import Store
from pipeline.tracking import Recorder, read_journal, read_progress
from tests.pipeline.shared_stores import BUCKET, flip_a_bit, killed_at, make, steps, written
from tests.pipeline.toy_stages import Number, sum_of


def run(target, store: Store) -> dict[str, Built]:
    return {e.stage.name: e for e in build([target], store, submit_here) if isinstance(e, Built)}


def statuses(target, store: Store) -> set[str]:
    return {built.status for built in run(target, store).values()}


# ---- folders


def test_what_is_pushed_is_pulled_bit_for_bit(tmp_path: Path, url: str):
    source = make(tmp_path / "a")
    assert remote.manifest(url) is None
    assert remote.push(source, f"{url}/a")
    assert remote.names(url) == ["a"]
    assert remote.pull(f"{url}/a", tmp_path / "b") == publish.verify(tmp_path / "b") == publish.verify(source)
    assert (tmp_path / "b" / publish.MANIFEST).read_bytes() == (source / publish.MANIFEST).read_bytes()
    remote.delete(f"{url}/a")
    remote.delete(f"{url}/a")
    assert remote.manifest(f"{url}/a") is None


def test_a_file_of_many_parts_arrives_whole(tmp_path: Path, s3: str):
    with publish.publishing(tmp_path / "a", {}) as scratch:
        (scratch / "big.bin").write_bytes(os.urandom(2 * filesystems.CHUNK_BYTES + 12_345))
    remote.push(tmp_path / "a", f"s3://{BUCKET}/big")
    remote.pull(f"s3://{BUCKET}/big", tmp_path / "b")
    assert publish.verify(tmp_path / "b").digest == publish.verify(tmp_path / "a").digest


def test_equal_content_is_not_sent_again(tmp_path: Path):
    url, there = f"file://{tmp_path}/there", tmp_path / "there"
    assert remote.push(make(tmp_path / "a"), url)
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert not remote.push(make(tmp_path / "b"), url)
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before


def test_a_folder_that_is_not_published_is_not_pushed(tmp_path: Path, url: str):
    with pytest.raises(DamagedArtifact, match="no valid manifest"):
        remote.push(tmp_path, url)


def test_files_that_are_here_already_are_not_fetched(tmp_path: Path, url: str):
    remote.push(make(tmp_path / "a"), url)
    target = make(tmp_path / "b")
    (target / "deep" / "data.txt").write_text("damaged")
    remote.delete_file(f"{url}/empty")
    remote.pull(url, target)
    assert publish.verify(target) == publish.verify(tmp_path / "a")


PUSH = "import sys; from pathlib import Path; from pipeline import remote; remote.push(Path(sys.argv[1]), sys.argv[2])"


def test_a_killed_push_leaves_nothing_that_a_reader_believes(tmp_path: Path, shared_url: str):
    remote.push(make(tmp_path / "old", "old"), f"{shared_url}/replaced")
    for name in ("fresh", "replaced"):
        killed_at("remote.push", PUSH, str(make(tmp_path / "new", "new")), f"{shared_url}/{name}")
        assert remote.manifest(f"{shared_url}/{name}") is None
        with pytest.raises(DamagedArtifact, match="no valid manifest"):
            remote.pull(f"{shared_url}/{name}", tmp_path / "got" / name)
        assert not (tmp_path / "got" / name).exists()
        assert remote.push(tmp_path / "new", f"{shared_url}/{name}")
        remote.pull(f"{shared_url}/{name}", tmp_path / "got" / name)


OPEN = """
import sys
from pathlib import Path
from pipeline.store import Store
Store(Path(sys.argv[1]), sys.argv[2]).open("number", sys.argv[3])
"""


def test_a_killed_pull_leaves_nothing_and_is_swept(tmp_path: Path):
    store, elsewhere = Store(tmp_path / "a", f"file://{tmp_path}/shared"), tmp_path / "b"
    key = run(Number(value=1), store)["number"].key
    killed_at("publish.rename", OPEN, str(elsewhere), str(store.remote), key)
    folder = Store(elsewhere).path("number", key).parent
    assert [path.name.startswith(remote.PULLING) for path in folder.iterdir()] == [True]
    Store(elsewhere, store.remote).open("number", key)
    assert [path.name for path in folder.iterdir()] == [key]


def test_what_a_killed_pull_had_brought_is_not_fetched_again(tmp_path: Path):
    store, elsewhere = Store(tmp_path / "a", f"file://{tmp_path}/shared"), tmp_path / "b"
    key = run(Number(value=1), store)["number"].key
    killed_at("remote.pull", OPEN, str(elsewhere), str(store.remote), key)
    remote.delete_file(f"{store.url(store.path('number', key))}/n.txt")
    folder = Store(elsewhere, store.remote).open("number", key)
    assert publish.verify(folder) == publish.verify(store.path("number", key))
    assert [path.name for path in folder.parent.iterdir()] == [key]


def test_a_flipped_bit_in_the_remote_is_refused(tmp_path: Path, url: str):
    remote.push(make(tmp_path / "a"), url)
    flip_a_bit(f"{url}/deep/data.txt", tmp_path)
    with pytest.raises(DamagedArtifact) as error:
        remote.pull(url, tmp_path / "b")
    expected, actual = publish.file_digest(tmp_path / "a/deep/data.txt"), publish.file_digest(tmp_path / "flipped")
    for part in (f"{url}/deep/data.txt", expected, actual, f"Delete {url}"):
        assert part in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} - {"shared"} == {"a", "flipped"}


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "deep/../../outside.txt"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(tmp_path: Path, name: str):
    files = {name: {"blake3": "0" * 64, "bytes": 1}}
    (tmp_path / "there").mkdir()
    record = {"schema": publish.SCHEMA, "files": files, "digest": publish.combined(files)}
    (tmp_path / "there" / publish.MANIFEST).write_text(json.dumps(record))
    with pytest.raises(DamagedArtifact, match="outside"):
        remote.pull(f"file://{tmp_path}/there", tmp_path / "in" / "b")


def test_a_folder_replaced_by_several_at_once_is_one_of_theirs(tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: make(tmp_path / "a", str(n % 3)), range(24)))
    publish.verify(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- two machines


def test_what_one_machine_builds_another_reuses(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    assert statuses(sum_of(1, 2), one) == {"built"}
    assert {planned.status for planned in plan([sum_of(1, 2)], two)} == {"reused"}
    assert not (tmp_path / "two" / "store").exists()
    assert statuses(sum_of(1, 2), two) == {"reused"}
    assert statuses(sum_of(1, 2, scale=2), two) == {"reused", "built"}
    assert statuses(sum_of(1, 2, scale=2), one) == {"reused"}


def test_a_plan_compares_with_what_others_built(tmp_path: Path, url: str):
    run(Number(value=1), Store(tmp_path / "one", url))
    two = Store(tmp_path / "two", url)
    run(Number(value=2, unit="mile"), two)
    assert [manifest.meta["recipe"]["value"] for manifest in two.manifests("number")] == [2, 1]
    assert plan([Number(value=3)], two)[0].reasons == ["value: 1 -> 3"]


def test_a_damaged_remote_copy_is_rebuilt_aloud_and_replaced(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
):
    one, two, three = (Store(tmp_path / name, url) for name in ("one", "two", "three"))
    key = run(Number(value=5), one)["number"].key
    flip_a_bit(f"{url}/store/number/{key}/n.txt", tmp_path)
    with caplog.at_level(logging.WARNING, "gristmill"):
        assert statuses(Number(value=5), two) == {"built"}
    assert f"{url}/store/number/{key}/n.txt: damaged" in caplog.text
    assert statuses(Number(value=5), three) == {"reused"}


def test_a_damaged_copy_here_is_mended_from_the_remote(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path / "one", url)
    key = run(Number(value=5), store)["number"].key
    (store.path("number", key) / "n.txt").write_text("6")
    with caplog.at_level(logging.WARNING, "gristmill"):
        assert statuses(Number(value=5), store) == {"reused"}
    assert "damaged" in caplog.text
    assert (store.path("number", key) / "n.txt").read_text() == "5"


def test_what_was_built_before_there_was_a_remote_is_shared(tmp_path: Path, url: str):
    run(Number(value=5), Store(tmp_path / "one"))
    assert statuses(Number(value=5), Store(tmp_path / "one", url)) == {"reused"}
    assert statuses(Number(value=5), Store(tmp_path / "two", url)) == {"reused"}


def test_a_machine_may_have_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    assert Store(tmp_path).here() == Store(tmp_path)
    assert Store(tmp_path, "memory://x/").here() == Store(tmp_path / "cache", "memory://x")


# ---- journals


def test_points_of_a_stage_arrive_with_its_artifact(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    key = run(Number(value=5), one)["number"].key
    two.pull_journal("number", key)
    assert [p.metrics for p in read_journal(two.journal("number", key))] == [{"value": 5.0}]


def test_a_pull_brings_what_is_new_and_loses_nothing_that_is_only_here(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    two.pull_journal("toy", "k")
    assert steps(two) == []
    written(one.journal("toy", "k"), 1, 2)
    one.push_journal("toy", "k")
    two.pull_journal("toy", "k")
    assert steps(two) == [1, 2]
    written(two.journal("toy", "k"), 3)
    two.pull_journal("toy", "k")
    assert steps(two) == [1, 2, 3]
    with two.journal("toy", "k").open("a") as torn:
        torn.write('{"step": 4, "time')
    written(one.journal("toy", "k"), 3, 4)
    one.push_journal("toy", "k")
    two.pull_journal("toy", "k")
    assert steps(two) == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "two" / "journal" / "toy").iterdir()] == ["k.jsonl"]


def test_progress_and_points_are_seen_elsewhere_while_a_stage_runs(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    recorder = Recorder(one.journal("toy", "k"), lambda: one.push_journal("toy", "k"))
    recorder.progress(3, 10, "loss 2.0")
    deadline = time.monotonic() + 10
    while (seen := read_progress(two.journal("toy", "k"))) is None and time.monotonic() < deadline:
        two.pull_journal("toy", "k")
    assert seen is not None
    assert (seen["done"], seen["text"]) == (3, "loss 2.0")
    recorder.metrics({"a": 1.0}, step=7)
    recorder.close()
    two.pull_journal("toy", "k")
    assert steps(two) == [7]
    assert read_progress(two.journal("toy", "k")) is None


def test_the_progress_of_a_killed_attempt_is_not_seen_elsewhere_once_another_has_begun(tmp_path: Path, url: str):
    one, two = Store(tmp_path / "one", url), Store(tmp_path / "two", url)
    killed = Recorder(one.journal("toy", "k"))
    killed.progress(90, 100)
    one.push_journal("toy", "k")
    two.pull_journal("toy", "k")
    assert read_progress(two.journal("toy", "k"))
    again = Recorder(one.journal("toy", "k"), lambda: one.push_journal("toy", "k"))
    deadline = time.monotonic() + 10
    while read_progress(two.journal("toy", "k")) and time.monotonic() < deadline:
        two.pull_journal("toy", "k")
    assert read_progress(two.journal("toy", "k")) is None
    again.close()


def test_a_journal_is_sent_seldom_and_a_failure_to_send_it_stops_no_stage(tmp_path: Path):
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        raise EnvironmentProblem("the network is down")

    recorder = Recorder(tmp_path / "j.jsonl", send)
    for step in range(200):
        recorder.metrics({"a": 1.0}, step=step)
        recorder.progress(step, 200)
    recorder.close()
    assert 1 <= len(sent) <= 2
    assert len(list(read_journal(tmp_path / "j.jsonl"))) == 200
