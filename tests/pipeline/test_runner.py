import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import DataError, Preempted, StageFailed
from pipeline.runner import Built, Started, build, build_one, job_for, plan, reuse, submit_here, topological
from pipeline.store import Store
from pipeline.tracking import read_journal
from tests.pipeline.toy_stages import Dies, Fit, Fitted, Number, sum_of


def run(target, store: Store) -> dict[str, Built]:
    return {e.stage.name: e for e in build([target], store, submit_here) if isinstance(e, Built)}


def statuses(target, store: Store) -> dict[str, str]:
    return {name: built.status for name, built in run(target, store).items()}


def test_inputs_come_first_and_each_once():
    shared = Number(value=1, label="left")
    target = sum_of(1, 2)
    assert [s.name for s in topological([shared, target])] == ["number-left", "number-right", "sum"]


def test_two_stages_of_one_name_are_a_programming_error():
    with pytest.raises(AssertionError, match="label"):
        topological([Number(value=1), Number(value=2)])


def test_a_second_run_reuses_everything(tmp_path: Path):
    store = Store(tmp_path)
    assert set(statuses(sum_of(1, 2), store).values()) == {"built"}
    assert set(statuses(sum_of(1, 2), store).values()) == {"reused"}


def test_a_change_rebuilds_what_follows_only(tmp_path: Path):
    store = Store(tmp_path)
    run(sum_of(1, 2), store)
    assert statuses(sum_of(1, 3), store) == {"number-left": "reused", "number-right": "built", "sum": "built"}


def test_equal_bytes_upstream_stop_the_rebuild(tmp_path: Path):
    store = Store(tmp_path)
    run(sum_of(1, 2), store)
    assert statuses(sum_of(-1, 2), store) == {"number-left": "built", "number-right": "reused", "sum": "reused"}


def test_events_start_before_they_end(tmp_path: Path):
    events = list(build([sum_of(1, 2)], Store(tmp_path), submit_here))
    order = [(type(e), e.stage.name) for e in events]
    for name in ("number-left", "number-right", "sum"):
        assert order.index((Started, name)) < order.index((Built, name))


def test_a_plan_says_what_and_why_and_builds_nothing(tmp_path: Path):
    store = Store(tmp_path)
    assert next(p.reasons for p in plan([sum_of(1, 2)], store)) == ["no number has been built yet"]
    assert not (tmp_path / "store").exists()
    run(sum_of(1, 2), store)
    left, right, total = plan([sum_of(1, 2, scale=3)], store)
    assert (left.status, right.status, total.status) == ("reused", "reused", "built")
    assert total.reasons == ["scale: 1 -> 3"]
    *_, blocked = plan([sum_of(1, 9)], store)
    assert blocked.key is None
    assert any("inputs.right" in reason for reason in blocked.reasons)


def test_a_changed_setting_is_named_by_where_a_config_has_it(tmp_path: Path):
    store = Store(tmp_path)
    (tmp_path / "config.json").write_text("one")
    run(Fitted(config=Fit(rate=1.0), folder=tmp_path, section="midtrain"), store)
    (tmp_path / "config.json").write_text("two")
    (planned,) = plan([Fitted(config=Fit(rate=2.0), folder=tmp_path, section="midtrain")], store)
    assert planned.reasons == ["midtrain.rate: 1.0 -> 2.0", "sources.config.json: one -> two"]
    (planned,) = plan([Fitted(config=Fit(rate=2.0), folder=tmp_path)], store)
    assert planned.reasons[0] == "fitted.rate: 1.0 -> 2.0"


@pytest.mark.parametrize("overwrites", [False, True], ids=["before it starts", "while it reads"])
def test_an_artifact_never_has_the_key_of_files_that_were_there_before(tmp_path: Path, overwrites: bool):
    store, source = Store(tmp_path), tmp_path / "config.json"
    source.write_text("one")
    job = job_for(Fitted(config=Fit(rate=1.0), folder=tmp_path, overwrites=overwrites), store, {})
    source.write_text("one" if overwrites else "two")
    with pytest.raises(DataError, match="fitted: the files it reads changed"):
        build_one(job)
    assert store.find("fitted", job.key) is None


def test_a_stage_that_dies_leaves_no_artifact(tmp_path: Path):
    with pytest.raises(StageFailed, match="power cut"):
        run(Dies(), Store(tmp_path))
    assert not list(tmp_path.rglob("*.bin"))
    assert not [p for p in (tmp_path / "store").rglob("*") if p.is_file()]


def test_a_damaged_artifact_is_rebuilt_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path)
    built = run(sum_of(1, 2), store)["sum"]
    (store.path("sum", built.key) / "n.txt").write_text("4")
    with caplog.at_level(logging.WARNING, "gristmill"):
        assert statuses(sum_of(1, 2), store)["sum"] == "built"
    assert "damaged" in caplog.text
    assert built.stage.load(store.open("sum", built.key)) == 3


def test_metrics_land_in_the_journal_of_the_stage(tmp_path: Path):
    store = Store(tmp_path)
    built = run(Number(value=5), store)["number"]
    assert [p.metrics for p in read_journal(store.journal("number", built.key))] == [{"value": 5.0}]


def test_stages_with_no_path_between_them_overlap(tmp_path: Path):
    together = threading.Barrier(2, timeout=10)

    with ThreadPoolExecutor(2) as pool:

        def submit(job) -> Future:
            def work() -> Built:
                if job.stage.kind == "number":
                    together.wait()  # passes only if both numbers are being built at once
                return build_one(job)

            return pool.submit(work)

        assert len([e for e in build([sum_of(1, 2)], Store(tmp_path), submit, cpus=2) if isinstance(e, Built)]) == 3


def test_what_reads_from_outside_goes_first(tmp_path: Path):
    total, late = sum_of(1, 2), Number(value=3, label="late")
    started = [e.stage.name for e in build([total, late], Store(tmp_path), submit_here) if isinstance(e, Started)]
    assert started == ["number-left", "number-right", "number-late", "sum"]


def test_four_builders_of_one_artifact_build_it_once(tmp_path: Path):
    store = Store(tmp_path)
    job = job_for(Number(value=1), store, {})
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build_one(job), range(4)))
    assert sorted(b.status for b in built) == ["built", "reused", "reused", "reused"]


def test_who_waits_for_another_to_build_can_be_stopped(tmp_path: Path):
    store = Store(tmp_path, run="waits")
    job = job_for(Number(value=1), store, {})
    with Store(tmp_path).lock("number", job.key), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build_one, job)
        store.request_stop("number", job.key)
        with pytest.raises(Preempted, match=r"stopped on request, while number .* is being built by another process"):
            waiting.result(timeout=30)
    assert build_one(job).status == "built"


def test_what_a_builder_that_was_killed_after_it_published_kept_is_deleted_unless_somebody_is_at_work_there(
    tmp_path: Path,
):
    store = Store(tmp_path)
    job = job_for(Number(value=1), store, {})
    build_one(job)
    work = store.work("number", job.key)
    (work / "step-00000001").mkdir(parents=True)
    with store.lock("number", job.key):
        assert reuse(job) is not None
    assert work.exists()
    assert reuse(job) is not None
    assert not work.exists()
