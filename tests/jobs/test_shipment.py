"""What is sent to a cluster, and what is decided before one is asked."""

import json
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.shipment import packed, read_config
from jobs.submit_ray import Order, entrypoint, variables
from pipeline.errors import UsageError
from pipeline.identity import fingerprint
from pipeline.pipeline_config import PipelineConfig
from tests.jobs.sent_folder import CANARIES, furnish


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    furnish(tmp_path / "folder")
    return tmp_path / "folder"


def config(folder: Path, *settings: str) -> PipelineConfig:
    return read_config(folder / "smoke.yaml", ["labels=null", *settings])


def test_a_shipment_is_the_code_the_resolved_config_and_the_inputs_it_names(folder: Path, tmp_path: Path):
    with packed(config(folder), folder, folder / "runs") as shipment, zipfile.ZipFile(shipment.archive) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "there")
    assert {name for name in names if not name.startswith(("model/", "pipeline/", "jobs/"))} == {
        "config.yaml",
        "data/corpus.txt",
    }
    assert {"jobs/supervise.py", "pipeline/report.html", "model/attention/__init__.py"} <= names
    assert not [name for name in names if "__pycache__" in name]
    there = read_config(tmp_path / "there" / "config.yaml", [])
    assert fingerprint(there) == fingerprint(config(folder))


def test_equal_contents_have_equal_digests_and_a_changed_input_another(folder: Path):
    def digest() -> str:
        with packed(config(folder), folder, folder / "runs") as shipment:
            return shipment.digest

    first = digest()
    assert digest() == first
    (folder / "data" / "corpus.txt").write_text("other words")
    assert digest() != first


def test_a_shipment_over_the_limit_is_refused_with_sizes_and_a_remedy(folder: Path):
    (folder / "data" / "corpus.txt").write_bytes(os.urandom(3 << 20))
    with (
        pytest.raises(UsageError, match=r"The largest: data/corpus.txt 3.0 MiB.*--set corpus.path=/shared"),
        packed(config(folder), folder, folder / "runs", limit_bytes=2 << 20),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../elsewhere.txt", "outside the current folder"),
        ("none.txt", "no such file"),
        ("**/*.txt", "never goes along"),
        ("runs", "never goes along"),
    ],
)
def test_an_input_that_cannot_go_along_is_refused(folder: Path, path: str, why: str):
    for name in ("runs/log.txt", ".venv/lib/top_level.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("words")
    with (
        pytest.raises(UsageError, match=why),
        packed(config(folder, f"corpus.path='{path}'"), folder, folder / "runs"),
    ):
        pass


def started_from(folder: Path, start: str) -> PipelineConfig:
    sizes = [f"model.{size}=null" for size in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")]
    return config(folder, f"init_from={start}", *sizes)


def test_a_model_to_start_from_goes_along_and_a_registered_one_is_the_clusters(folder: Path):
    (folder / "start").mkdir()
    for name in ("config.json", "model-1.safetensors", "tokenizer.json", "notes.txt"):
        (folder / "start" / name).write_text("words")
    with packed(started_from(folder, "start"), folder, folder / "runs") as shipment:
        names = {name for name in zipfile.ZipFile(shipment.archive).namelist() if name.startswith("start")}
    assert names == {"start/config.json", "start/model-1.safetensors", "start/tokenizer.json"}
    with packed(started_from(folder, "models:/base@champion"), folder, folder / "runs"):
        pass
    with (
        pytest.raises(UsageError, match="init_from=nowhere: no folder with a model in it"),
        packed(started_from(folder, "nowhere"), folder, folder / "runs"),
    ):
        pass


def test_an_absolute_path_is_the_clusters(folder: Path):
    with packed(config(folder, "corpus.path=/shared/none.txt"), folder, folder / "runs") as shipment:
        assert "data/corpus.txt" not in zipfile.ZipFile(shipment.archive).namelist()


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("tracking.uri=http://user:pw@host:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("corpus.path=s3://key:secret@bucket/text", "corpus.path: a password in a config"),
    ],
)
def test_a_config_with_a_password_is_refused(folder: Path, setting: str, why: str):
    with pytest.raises(UsageError, match=why) as refused:
        config(folder, setting)
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ({"env": ["HF_TOKEN=hunter2"]}, "HF_TOKEN: give a name"),
        ({"env": ["no name"]}, "give a name"),
        ({"key": "a key"}, "letters, digits"),
        ({"home": "relative/path"}, "absolute path of the cluster"),
    ],
    ids=str,
)
def test_an_order_that_makes_no_sense_is_refused(order: dict[str, Any], why: str):
    with pytest.raises(UsageError, match=why) as refused:
        Order(to="local", **order)
    assert "hunter2" not in str(refused.value)


def test_what_a_job_is_given_has_no_value_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jobs.submissions import Submission

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    env = ["HF_TOKEN", "PASSWORD=file:/run/secrets/a b"]
    job = Submission(
        job_id="j", key="j", to="local", name="n", folder=str(tmp_path), submitted_ms=0, home="/h", env=env
    )
    given = json.dumps(variables(job)) + entrypoint(job)
    assert not [value for value in CANARIES.values() if value in given]
    assert entrypoint(job) == (
        "exec python -m jobs.supervise --tree-signalled --home /h --env HF_TOKEN "
        "--env 'PASSWORD=file:/run/secrets/a b' -- run config.yaml --json"
    )


def test_a_job_is_told_what_code_it_is_since_what_is_sent_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jobs.submissions import Submission

    job = Submission(job_id="j", key="j", to="local", name="n", folder=str(tmp_path / "gone"), submitted_ms=0)
    monkeypatch.delenv("GRISTMILL_COMMIT", raising=False)
    assert not {"GRISTMILL_COMMIT", "GRISTMILL_DIRTY"} & set(variables(job)), (
        "nothing is known of a folder that is gone"
    )
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=tmp_path, check=True)
    told = variables(replace(job, folder=str(tmp_path)))
    assert (len(told["GRISTMILL_COMMIT"]), told["GRISTMILL_DIRTY"]) == (40, "0")
    (tmp_path / "new").touch()
    assert variables(replace(job, folder=str(tmp_path)))["GRISTMILL_DIRTY"] == "1"
