import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline import checkpoint, filesystems, publish, remote, shelf
from pipeline.errors import DamagedArtifact, EnvironmentProblem, UsageError
from pipeline.runner import Built, build, plan, submit_here
from pipeline.shelf import SharedShelf, Writer
from pipeline.state import Shard
from pipeline.store import Store
from pipeline.tracking import Journal, Recorder, read_journal, read_progress
from tests.pipeline.test_checkpoint import EXTRA, SHAPES, assert_holds, halves, save_halves, shard
from tests.pipeline.toy_stages import Number, sum_of

BUCKET = "toy-bucket"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with one bucket; this process and its children are set up to use it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        filesystems.connected.cache_clear()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield address
        server.stop()
    filesystems.connected.cache_clear()


def new_url(scheme: str, tmp_path: Path) -> str:
    name = uuid.uuid4().hex[:8]
    return {
        "file": f"file://{tmp_path}/shared/{name}",
        "memory": f"memory://{name}",
        "s3": f"s3://{BUCKET}/{name}",
    }[scheme]


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """A place that is still empty, in every kind of store."""
    return new_url(request.param, tmp_path)


@pytest.fixture(params=["file", "s3"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """As `url`, where other processes see it too."""
    return new_url(request.param, tmp_path)


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


def test_a_killed_pull_leaves_nothing_and_is_swept(tmp_path: Path):
    store, elsewhere = Store(tmp_path / "a", f"file://{tmp_path}/shared"), tmp_path / "b"
    key = run(Number(value=1), store)["number"].key
    code = "import sys; from pathlib import Path; from pipeline.store import Store; "
    code += "Store(Path(sys.argv[1]), sys.argv[2]).open('number', sys.argv[3])"
    killed_at("publish.rename", code, str(elsewhere), str(store.remote), key)
    folder = Store(elsewhere).path("number", key).parent
    assert [path.name.startswith(remote.PULLING) for path in folder.iterdir()] == [True]
    Store(elsewhere, store.remote).open("number", key)
    assert [path.name for path in folder.iterdir()] == [key]


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


def written(path: Path, *steps: int) -> None:
    journal = Journal(path)
    for step in steps:
        journal.append({"a": step}, step=step)
    journal.close()


def steps(store: Store) -> list[int]:
    return [point.step for point in read_journal(store.journal("toy", "k"))]


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


# ---- checkpoints of unfinished stages


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
    assert remote.names(f"{url}/work/toy/k") == []
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
    one, two = shelves_of(tmp_path, new_url("file", tmp_path), "one", "two")
    save_halves([one, two], 1)
    killed_at(fault, SAVE, str(tmp_path), one.url.removesuffix("/work/toy/k"))
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
def test_a_request_to_stop_is_seen_and_taken_back(tmp_path: Path, url: str, shared: bool):
    one = Store(tmp_path / "one", url if shared else None)
    two = Store(tmp_path / ("two" if shared else "one"), one.remote)
    assert not two.stop_requested("toy", "k")
    one.request_stop("toy", "k")
    assert two.stop_requested("toy", "k")
    two.clear_stop("toy", "k")
    assert not one.stop_requested("toy", "k")


# ---- what can be wrong with a store


@pytest.mark.parametrize(
    "url", ["s3://AKIA:p/ssw0rd@bucket/x", "s3://ssw0rd@x", "ftp://me:p/ssw0rd@h", "me:p/ssw0rd@h"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, url: str):
    with pytest.raises(UsageError, match="credentials") as error:
        Store(tmp_path, url)
    assert "ssw0rd" not in str(error.value)
    assert "AKIA" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "/folder", "file://folder", "s3://", "file:///", "memory://"])
def test_what_is_no_url_of_a_store_is_refused(tmp_path: Path, url: str):
    with pytest.raises(UsageError):
        Store(tmp_path, url)


def test_a_missing_bucket_is_told_apart_from_a_missing_file(tmp_path: Path, s3: str):
    store = Store(tmp_path, "s3://no-such-bucket/x")
    for use in (lambda: store.find("toy", "k"), lambda: remote.push(make(tmp_path / "a"), "s3://no-such-bucket/x")):
        with pytest.raises(EnvironmentProblem, match="no bucket 'no-such-bucket'") as error:
            use()
        assert error.value.exit_code == 3
    assert Store(tmp_path, f"s3://{BUCKET}/x").find("toy", "k") is None


def told(s3_setting: dict[str, str | None], bucket: str) -> str:
    """What the first use of a bucket says under other settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_setting.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        filesystems.connected.cache_clear()
        try:
            with pytest.raises(EnvironmentProblem) as error:
                remote.manifest(f"s3://{bucket}/x")
        finally:
            filesystems.connected.cache_clear()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_endpoint_that_does_not_answer_is_told_at_once(s3: str):
    start = time.monotonic()
    message = told({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "unreachable-bucket")
    assert time.monotonic() - start < 10
    for part in ("s3://unreachable-bucket/x", "no answer", "127.0.0.1:9", "AWS_ENDPOINT_URL"):
        assert part in message


def test_missing_credentials_are_told(s3: str):
    message = told({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "private-bucket")
    for part in ("s3://private-bucket/x", "no credentials", "AWS_ACCESS_KEY_ID"):
        assert part in message


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    code = """
import sys
sys.modules["s3fs"] = None
from pipeline import remote
from pipeline.errors import EnvironmentProblem
try:
    remote.manifest("s3://bucket/x")
except EnvironmentProblem as problem:
    print(problem)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert "s3://bucket/x" in done.stdout
    assert "pip install 'gristmill[s3]'" in done.stdout


def test_a_store_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, s3: str):
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        filesystems.connected.cache_clear()
        remote.push(make(tmp_path / "a"), f"s3://{BUCKET}/away")
        server.stop()
        again = ThreadedMotoServer(host, port, verbose=False)
        back = threading.Timer(1, again.start)
        back.start()
        found = remote.manifest(f"s3://{BUCKET}/away")
        back.join()
        again.stop()
    filesystems.connected.cache_clear()
    assert found == publish.verify(tmp_path / "a")


def test_only_a_store_that_has_answered_is_asked_again_and_only_where_that_may_help():
    place = replace(filesystems.place("memory://x"), scheme="s3", path=f"{uuid.uuid4().hex}/x")
    asked: list[int] = []

    def fails(error: Exception | None, *, times: int) -> str:
        asked.append(0)
        if error and len(asked) <= times:
            raise error
        return "answer"

    def tries(error: Exception | None, times: int) -> int:
        asked.clear()
        with suppress(EnvironmentProblem):
            filesystems.ask(place, lambda: fails(error, times=times), waits=(0.01, 0.01, 0.01))
        return len(asked)

    assert tries(ConnectionError("reset"), 1) == 1
    assert tries(None, 0) == 1
    assert tries(ConnectionError("reset"), 2) == 3
    assert tries(ConnectionError("reset"), 99) == 4
    assert tries(PermissionError("no"), 99) == 1
