"""The product as a user meets it: the command line, from a config to a classifier, killed and started again."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.explain import show_config
from jobs.lineage import lineage
from jobs.mlflow_client import default_uri

from .commands import SMOKE, answer, digests, gristmill, keys, run, statuses

STAGES = [
    "corpus",
    "tokenizer",
    "shards",
    "pretrain",
    "labels",
    "baseline-tfidf-logreg",
    "baseline-linear-svm",
    "finetune",
    "finetune-random-init",
    "evaluate",
    "export",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home: Path) -> dict[str, Any]:
    """An undisturbed run, and what MLflow shows of it before other tests add to it."""
    return run(home) | {"points": points_in_mlflow(home)}


@pytest.mark.slow
def test_a_run_ends_with_its_contract(first: dict[str, Any], home: Path):
    assert first["status"] == "succeeded"
    assert list(statuses(first)) == STAGES
    assert set(statuses(first).values()) == {"built"}
    for score in ("accuracy", "macro_f1", "ece"):
        assert 0 <= first[score] <= 1
    low, high = first["accuracy_ci"]
    assert low <= first["accuracy"] <= high
    assert set(first["baseline"]) >= {"name", "accuracy", "macro_f1"}
    assert set(first["random_init"]) >= {"accuracy", "macro_f1"}
    assert (Path(first["export_dir"]) / "config.json").is_file()
    assert (Path(first["report_dir"]) / "report.html").is_file()
    assert first["model_uri"].startswith("models:/smoke/")
    assert first["tracking_uri"].endswith("mlflow.db")
    assert first["mlflow_run_id"]


@pytest.mark.slow
def test_a_second_run_reuses_every_stage(first: dict[str, Any], home: Path):
    again = run(home)
    assert set(statuses(again).values()) == {"reused"}
    assert keys(again) == keys(first)
    assert again["model_uri"] == first["model_uri"]


@pytest.mark.slow
def test_a_knob_rebuilds_nothing_and_a_learning_rate_what_follows(first: dict[str, Any], home: Path, tmp_path: Path):
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(Path("data/smoke/corpus.txt").read_bytes())
    knobs = ["pretrain.micro_batch_size=3", "shards.tasks=2", "cluster.workers=1", f"corpus.path={copy}"]
    plan = answer(gristmill(home, "plan", SMOKE, "--json", *(p for k in knobs for p in ("--set", k))))
    assert {row["status"] for row in plan} == {"reused"}

    plan = answer(gristmill(home, "plan", SMOKE, "--json", "--set", "finetune.lr=1e-3"))
    assert [row["name"] for row in plan if row["status"] == "built"] == [
        "finetune",
        "finetune-random-init",
        "evaluate",
        "export",
    ]
    why = answer(gristmill(home, "why", SMOKE, "finetune", "--json", "--set", "finetune.lr=1e-3"))
    assert why["reasons"] == ["finetune.lr: 0.005 -> 0.001"]


@pytest.mark.slow
def test_equal_bytes_upstream_stop_the_rebuild(first: dict[str, Any], home: Path):
    """A word cap that cuts no word is another recipe for the corpus, and the same corpus."""
    result = run(home, "corpus.max_word_bytes=2048")
    assert [name for name, status in statuses(result).items() if status == "built"] == ["corpus"]


@pytest.mark.slow
def test_predict_by_name_uri_and_folder_agree(first: dict[str, Any], home: Path):
    text = "the old wolf runs through the forest"
    models = ["smoke", "models:/smoke@candidate", first["model_uri"], first["export_dir"]]
    answers = [answer(gristmill(home, "predict", model, text, "--json")) for model in models]
    assert all(rows == answers[0] for rows in answers)
    [row] = answers[0]
    assert row["text"] == text
    assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_generate_continues_a_prompt_the_same_way_twice(first: dict[str, Any], home: Path):
    rows = [answer(gristmill(home, "generate", "smoke", "the old", "--json", "--seed", "3")) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0]["prompt"] == "the old"


@pytest.mark.slow
def test_generate_searches_when_given_beams(first: dict[str, Any], home: Path):
    command = ("generate", "smoke", "the old", "--json", "--max-new-tokens", "8", "--beams")
    found, *others = (answer(gristmill(home, *command, "4", "--seed", seed)) for seed in ("3", "4"))
    assert others == [found]  # nothing is drawn
    refused = gristmill(home, *command, "0")
    assert (refused.returncode, "--beams" in refused.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "writes"), [("next_token", True), ("masked", False)])
def test_a_run_proposes_a_prompt_where_its_base_can_write(
    objective: str, writes: bool, first: dict[str, Any], home: Path
):
    settings = (f"name={objective}", f"pretrain.objective={objective}", "pretrain.steps=2", "labels=null")
    told = gristmill(home, "run", SMOKE, "--inline", *(word for setting in settings for word in ("--set", setting)))
    assert told.returncode == 0, told.stderr
    assert (f"gristmill generate {objective} " in told.stdout) == writes
    prompted = gristmill(home, "generate", objective, "the old", "--max-new-tokens", "1")
    assert prompted.returncode == (0 if writes else 2), prompted.stderr


@pytest.mark.slow
def test_ray_makes_the_same_bytes_as_one_process(first: dict[str, Any], home: Path, tmp_path: Path):
    result = run(tmp_path, inline=False)
    assert keys(result) == keys(first)
    made, expected = digests(tmp_path, result), digests(home, first)
    assert made == expected


FAULTS = ["checkpoint.save:2", "checkpoint.saved:40"]
"""A few of what `python -m benchmarks.kill` draws from, here with the tracker."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_killed_run_goes_on_to_the_same_bytes(first: dict[str, Any], home: Path, tmp_path: Path, fault: str):
    killed = gristmill(tmp_path, "run", SMOKE, "--json", "--inline", GRISTMILL_FAULT=fault)
    assert killed.returncode == -9
    result = run(tmp_path)
    assert digests(tmp_path, result) == digests(home, first)
    assert len(list((tmp_path / "records").glob("*/record.json"))) == 1  # one run, gone on with
    assert points_in_mlflow(tmp_path) == first["points"]


def points_in_mlflow(home: Path) -> dict[str, list[tuple[str, int, float]]]:
    """Every point of every run by the run's name, sorted: a doubled run or point shows. Speeds are left out."""
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "select r.name, m.key, m.step, m.value from metrics m join runs r on r.run_uuid = m.run_uuid "
            "where r.lifecycle_stage = 'active' and r.name glob '[0-9]*-*'"
        ).fetchall()
        parents = database.execute("select count(*) from runs where name like 'smoke-%' and lifecycle_stage = 'active'")
        assert parents.fetchone() == (1,)
    points: dict[str, list[tuple[str, int, float]]] = {}
    for name, key, step, value in sorted(rows):
        if not any(word in key for word in ("second", "latency", "mfu", "share", "system/")):
            points.setdefault(name, []).append((key, step, value))
    return points


@pytest.mark.slow
def test_a_dead_tracking_server_stops_no_run(first: dict[str, Any], home: Path, tmp_path: Path):
    result = run(tmp_path, "tracking.uri=http://127.0.0.1:9")
    assert result["status"] == "succeeded"
    assert result["model_uri"] is None
    assert digests(tmp_path, result) == digests(home, first)


@pytest.mark.slow
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "ray"])
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, inline: bool):
    command = [sys.executable, "-m", "jobs.cli", "run", SMOKE, "--json", *(["--inline"] if inline else [])]
    environment = os.environ | {"GRISTMILL_HOME": str(tmp_path), "PYTHONPATH": "."}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("built"))
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=100)
    assert process.returncode == 130, said + rest
    assert "goes on where it stopped" in rest
    assert "Traceback" not in rest
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"
    [record] = (tmp_path / "records").glob("*/record.json")
    assert json.loads(record.read_text())["status"] == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "no such config file"),
        (["run", SMOKE, "--set", "pretrain.stpes=3"], "--set #1  pretrain.stpes: unknown key. Did you mean `steps`?"),
        (["run", SMOKE, "--set", "model.d_model=33"], "d_model=33 must be a multiple of n_heads=2"),
        (["run", SMOKE, "--set", "corpus.path=none.txt"], "none.txt"),
        (["plan", SMOKE, "--set", "corpus.path=/"], "corpus.path=/: runs write into "),
        (["plan", SMOKE, "--set", "init_from=''"], "init_from"),
        (["why", SMOKE, "pretrian"], "there are corpus, tokenizer"),
        (["compare", "a", "b", "--seed=-1"], "Must be >= 0"),
        (["predict", "none", "text"], "mlflow.db: no such MLflow database"),
        (["generate", "none", "text"], "none"),
        (["frobnicate"], "frobnicate"),
        (["config", "explain", "pretrain.lrr"], "pretrain.lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str):
    done = gristmill(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_explain_gives_type_default_range_and_meaning(tmp_path: Path):
    text = gristmill(tmp_path, "config", "explain", "finetune.lr").stdout
    assert text.startswith("finetune.lr: number > 0, <= 1, default 0.0014")
    assert "Peak learning rate" in text
    place = gristmill(tmp_path, "config", "explain", "labels.path").stdout
    assert place.startswith("labels.path: string, required; what is there counts, not where that is\n")
    _, *meaning = gristmill(tmp_path, "config", "explain", "labels.split").stdout.splitlines()
    assert len(meaning) > 1
    assert all(line.startswith("    ") for line in meaning)


def test_every_value_that_was_given_has_an_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "tasks.yaml"
    config.write_text(
        "name: two\ninit_from: base\nfinetune:\n  epochs: 3\ntasks:\n  one:\n    labels: {path: a.csv}\n"
        "  two:\n    labels: {path: b.csv}\n    finetune:\n      epochs: 4\n"
    )
    show_config(config, ["ngrams={order: 2}"], origin=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert f"tasks.one.finetune.epochs = 3  # {config}:4:3" in lines
    assert f"tasks.two.finetune.epochs = 4  # {config}:11:7" in lines
    assert "tasks.one.ngrams.order = 2  # --set #1" in lines
    assert "seed = 0  # default" in lines


@pytest.mark.slow
def test_several_tasks_become_classifiers_on_the_same_base(tmp_path: Path):
    config = tmp_path / "tasks.yaml"
    config.write_text(
        f"""
extends: {Path(SMOKE).absolute()}
labels: null
evaluate: {{random_init: false}}
finetune: {{epochs: 1}}
tasks:
  one:
    labels: {{path: data/smoke/labels.jsonl, split: [0.7, 0.1, 0.2]}}
    register: {{name: own-name}}
  two:
    labels: {{path: data/smoke/labels.jsonl, split: [0.6, 0.2, 0.2]}}
    adapt: {{steps: 4, objective: masked, global_batch_tokens: 256}}
    finetune: {{pooling: mean}}
"""
    )
    home = tmp_path / "home"
    result = answer(gristmill(home, "run", str(config), "--json", "--inline"))
    assert {name: task["model_uri"] for name, task in result["tasks"].items()} == {
        "one": "models:/own-name/1",
        "two": "models:/smoke-two/1",
    }
    for task in result["tasks"].values():
        assert 0 <= task["macro_f1"] <= 1
        assert (Path(task["report_dir"]) / "report.html").exists()
    bases = home / "store" / "pretrain"
    both_ways = next(path.parent for path in bases.glob("*/model.json") if '"causal": false' in path.read_text())
    refused = gristmill(home, "generate", str(both_ways))
    assert (refused.returncode, "reads both ways" in refused.stderr) == (2, True), refused.stderr
    said = answer(gristmill(home, "predict", "smoke-two", "the sea was calm", "--json"))
    assert said[0]["label"] in said[0]["probabilities"]


@pytest.mark.slow
def test_a_registered_classifier_is_a_start_for_another_one(first: dict[str, Any], home: Path, tmp_path: Path):
    config = tmp_path / "again.yaml"
    config.write_text(
        f"""
extends: {Path(SMOKE).absolute()}
name: again
init_from: models:/smoke@candidate
corpus: null
pretrain: null
model: {{d_model: null, n_layers: null, n_heads: null, n_kv_heads: null, d_ff: null}}
evaluate: {{random_init: false}}
finetune: {{epochs: 1, method: head}}
"""
    )
    result = answer(gristmill(home, "run", str(config), "--json", "--inline"))
    assert result["model_uri"] == "models:/again/1"
    chain = lineage("again", default_uri(home)).stages
    assert {"importmodel", "pretrain", "corpus"} <= {stage.kind for stage in chain}
    ours, start = (load_file(Path(run["export_dir"]) / "model.safetensors") for run in (result, first))
    body = [name for name in start if name.startswith("model.")]
    assert body
    assert all(torch.equal(ours[name], start[name]) for name in body)  # only the head was trained
    assert not torch.equal(ours["score.weight"], start["score.weight"])

    refused = gristmill(home, "run", str(config), "--json", "--set", "init_from=models:/smoke@nobody")
    assert (refused.returncode, "candidate" in refused.stderr) == (2, True), refused.stderr


@pytest.mark.slow
def test_a_compiled_body_learns_what_the_plain_one_does_and_is_saved_as_it(tmp_path: Path):
    """In processes of their own: torch.compile does not read what checks shapes in these tests."""
    base = ["labels=null", "export=null", "pretrain.steps=6", "pretrain.precision=fp32"]
    made = [keys(run(tmp_path, *base, f"pretrain.compile={yes}"))["pretrain"] for yes in ("false", "true")]
    assert made[0] != made[1]
    plain, compiled = (load_file(tmp_path / "store" / "pretrain" / key / "model.safetensors") for key in made)
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-2)
