"""Models in MLflow: linked to what they were made from, and registered, the newest as the candidate."""

import re
import shutil
from pathlib import Path

from jobs.mlflow_client import connect
from jobs.track_mlflow import sync, sync_all
from pipeline.store import Store
from tests.jobs.conftest import Corpus, Export, Pretrain, Run
from tests.jobs.mlflow_seen import child_named, everything_in, toy_with_export


def test_models_link_the_chain(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy(toy_with_export())
    sync(home, record.run, uri)
    shown = everything_in(home)
    assert [model[:3] for model in shown["models"]] == [
        ("export", "classifier", "READY"),
        ("pretrain", "base", "READY"),
    ]
    assert child_named(home, "3-export")["models"] == (1, 1)
    (base,) = [model for model in connect(uri).search_logged_models(["1"]) if model.model_type == "base"]
    manifest = Store(home).find("pretrain", str(record.stage("pretrain").key))
    assert base.tags["gristmill.digest"] == manifest.digest
    assert not list((home / "mlartifacts").rglob(f"{base.model_id}/artifacts/*")), "big files are not copied"


def test_one_version_for_each_export_and_the_newest_run_proposes_its_own(home: Path, uri: str, run_toy: Run) -> None:
    first = sync(home, run_toy(toy_with_export(), "p1", "clf").run, uri)
    second_run = run_toy(toy_with_export(seed=1), "p2", "clf").run
    second = sync(home, second_run, uri)
    assert (first.model_uri, second.model_uri) == ("models:/clf/1", "models:/clf/2")
    again = run_toy(toy_with_export(), "p3", "clf").run
    third = sync(home, again, uri)
    assert third.model_uri == "models:/clf/1", "the same export is the same version"
    client = connect(uri)
    assert str(client.get_model_version_by_alias("clf", "candidate").version) == "1"
    sync(home, second_run, uri)
    assert str(client.get_model_version_by_alias("clf", "candidate").version) == "1", "an old run takes no alias back"


def test_runs_that_are_sent_late_become_versions_in_their_order_and_the_newest_is_the_candidate(
    home: Path, uri: str, run_toy: Run
) -> None:
    runs = [run_toy(toy_with_export(seed=seed), f"p{seed}", "clf").run for seed in range(3)]
    rows = sync_all(home, uri)
    assert [row["run"] for row in rows] == runs
    client = connect(uri)
    versions = {str(v.version): v.tags["gristmill.run"] for v in client.search_model_versions("name = 'clf'")}
    assert versions == dict(zip("123", runs, strict=True))
    assert str(client.get_model_version_by_alias("clf", "candidate").version) == "3"


def test_an_older_run_that_is_sent_after_a_newer_one_proposes_nothing(home: Path, uri: str, run_toy: Run) -> None:
    older, newer = (run_toy(toy_with_export(seed=seed), f"p{seed}", "clf").run for seed in range(2))
    assert [sync(home, run, uri).model_uri for run in (newer, older)] == ["models:/clf/1", "models:/clf/2"]
    assert str(connect(uri).get_model_version_by_alias("clf", "candidate").version) == "1"


def test_a_version_tells_where_it_comes_from(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy(toy_with_export(), register_name="clf")
    sync(home, record.run, uri)
    client = connect(uri)
    version = client.get_model_version("clf", "1")
    corpus = Store(home).find("corpus", str(record.stage("corpus").key))
    assert version.tags["gristmill.corpus.digest"] == corpus.digest
    assert version.tags["gristmill.corpus.source"] == "/data/toy.txt"
    assert version.tags["gristmill.corpus.source_digest"] == "d" * 64
    assert version.tags["gristmill.pretrain.key"] == record.stage("pretrain").key
    maker = client.get_run(version.run_id)
    assert maker.info.run_name == "3-export"
    model = client.get_logged_model(maker.outputs.model_outputs[0].model_id)
    assert '"clf"' in model.tags["mlflow.modelVersions"]


LINK = re.compile(
    r"\[(?P<text>[^]]+)\]\(#/experiments/(?P<experiment>\d+)/runs/(?P<run>\w+)\?workflowType=machine_learning\)"
)


def test_the_texts_of_a_version_and_of_the_runs_link_down_to_the_raw_data(home: Path, uri: str, run_toy: Run) -> None:
    first = run_toy()
    sync(home, first.run, uri)  # its stages are reused below, and shown by its runs
    record = run_toy(toy_with_export(), plan="another", register_name="clf")
    sync(home, record.run, uri)
    client = connect(uri)
    text = client.get_model_version("clf", "1").description
    linked = {m["text"]: client.get_run(m["run"]).info.run_name for m in LINK.finditer(text)}
    assert linked == {
        record.run: record.run,
        "export": "3-export",
        "pretrain": "2-pretrain",
        "corpus": "1-corpus",
    }
    assert "- corpus: /data/toy.txt, content `dddd" in text
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    note = runs["2-pretrain"].data.tags["mlflow.note.content"]
    assert [client.get_run(m["run"]).info.run_name for m in LINK.finditer(note)] == ["1-corpus"]
    note = runs[record.run].data.tags["mlflow.note.content"]
    assert [m["text"] for m in LINK.finditer(note)] == ["corpus", "pretrain", "export"]


def test_each_task_of_a_pipeline_has_a_name_of_its_own(home: Path, uri: str, run_toy: Run) -> None:
    targets = [
        Export(base=Pretrain(corpus=Corpus()), seed=seed, label=label) for seed, label in enumerate(("tone", "topic"))
    ]
    mirrored = sync(home, run_toy(targets, register_name="clf").run, uri)
    assert mirrored.model_uris == {"export-tone": "models:/clf-tone/1", "export-topic": "models:/clf-topic/1"}
    assert sorted(everything_in(home)["aliases"]) == ["clf-tone", "clf-topic"]


def test_a_task_whose_export_cannot_be_shown_leaves_the_others_their_models(home: Path, uri: str, run_toy: Run) -> None:
    targets = [
        Export(base=Pretrain(corpus=Corpus()), seed=seed, label=label) for seed, label in enumerate(("tone", "topic"))
    ]
    record = run_toy(targets, register_name="clf")
    shutil.rmtree(Store(home).path("export", str(record.stage("export-tone").key)))
    assert sync(home, record.run, uri).model_uris == {"export-topic": "models:/clf-topic/1"}
