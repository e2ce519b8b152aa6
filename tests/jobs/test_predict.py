"""Labels for texts and for files: as the evaluation gives them, in place, by one process or several, whole or not."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs import cli_use
from jobs.cli import app
from jobs.predict_files import Order, default_target, predict_file
from jobs.scoring import PASS_TOKENS, alike
from jobs.use import predict
from pipeline import export
from pipeline.classify import probabilities
from pipeline.errors import DataError, UsageError
from pipeline.pieces import read_pieces, source_of
from pipeline.readers import Reading
from tests.jobs.commands import answer, gristmill
from tests.pipeline.toy_export import LABELS, classifier_folder, subject_of

TEMPERATURE = 1.7
TEXTS = ["the cat sat", "Mat", "the cat sat on the mat and " * 9, "", "<|eos|> a dog", 'été\r\nand\nmore, "quoted"']


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("classifier") / "artifact")


@pytest.fixture(scope="module")
def model(artifact: Path) -> str:
    """An export folder."""
    folder = artifact.parent / "export"
    folder.mkdir()
    export.load("hf").write(folder, subject_of(artifact, TEMPERATURE)[0])
    return str(folder)


def calibrated(artifact: Path, texts: list[str]) -> np.ndarray:
    """What an evaluation reports: the softmax of log p over the temperature."""
    texts = [text.replace("\r\n", "\n") for text in texts]
    table = torch.from_numpy(probabilities(subject_of(artifact, 1.0)[1], texts))
    return (table.log() / TEMPERATURE).softmax(-1).numpy()


def written(path: Path, rows: int) -> list[str]:
    """A file of the kind of its name, with a column before the text and one after it; gives back the texts."""
    texts = [TEXTS[i % len(TEXTS)] for i in range(rows)]
    table = pa.table({"id": [str(i) for i in range(rows)], "text": texts, "z": ["é"] * rows})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return texts
    import csv
    import gzip

    import zstandard

    out = io.StringIO(newline="")
    if ".jsonl" in path.suffixes:
        out.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    else:
        csv.writer(out).writerows([table.column_names, *(row.values() for row in table.to_pylist())])
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(out.getvalue().encode()))
    return texts


def rows_of(path: Path) -> list[dict[str, Any]]:
    pieces = list(read_pieces(source_of(str(path)), "text", [], Reading()))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if ".jsonl" in path.suffixes:
        return [json.loads(row) for piece in pieces for row in piece.rows]
    return [dict(zip(piece.header, row, strict=True)) for piece in pieces for row in piece.rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.parquet"])
def test_rows_keep_their_order_and_columns_and_get_calibrated_labels(
    artifact: Path, model: str, tmp_path: Path, name: str
):
    texts = written(tmp_path / name, 20)
    result = predict_file(Order(model=model, input=str(tmp_path / name), probabilities=True))
    target = tmp_path / name.replace("a.", "a.predictions.")
    assert result["output"] == str(target)
    assert result["rows"] == 20
    rows, table = rows_of(target), calibrated(artifact, texts)
    assert [row["id"] for row in rows] == [str(i) for i in range(20)]
    assert [row["text"] for row in rows] == texts
    assert list(rows[0]) == ["id", "text", "z", "label", "confidence", *(f"p_{label}" for label in LABELS)]
    assert [row["label"] for row in rows] == [LABELS[i] for i in table.argmax(axis=1)]
    given = np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in rows])
    assert np.abs(given - table).max() < 1e-5
    assert np.abs(given.max(axis=1) - [float(row["confidence"]) for row in rows]).max() == 0
    assert result["labels"] == {label: int((table.argmax(axis=1) == i).sum()) for i, label in enumerate(LABELS)}


@given(st.lists(st.integers(1, 128), max_size=80))
def test_every_text_is_in_one_group_and_little_is_padded(lengths: list[int]):
    groups = list(alike(lengths))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    # the k-th text from the end is shorter than the first of its group by PASS_TOKENS / k at most
    assert padded <= sum(lengths) + sum(PASS_TOKENS / k for k in range(1, len(lengths) + 1))
    assert len(groups) <= 1 + len(set(lengths))


def test_texts_are_labelled_as_files_are(artifact: Path, model: str):
    rows = predict(model, TEXTS)
    table = calibrated(artifact, TEXTS)
    assert [row["text"] for row in rows] == TEXTS
    assert [row["label"] for row in rows] == [LABELS[i] for i in table.argmax(axis=1)]
    assert np.abs(np.array([[row["probabilities"][label] for label in LABELS] for row in rows]) - table).max() < 1e-5


def test_each_line_of_standard_input_has_its_answer(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the cat\r\n\nété\n".encode())))
    assert [row["text"] for row in predict(model, ["-"])] == ["the cat", "", "été"]


def test_the_command_takes_a_hyphen_for_standard_input_and_a_wrong_option_for_no_text(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\nthe dog\n")))
    for texts in (["-"], ["-5 degrees"]):
        app(["predict", model, *texts, "--json"], exit_on_error=False, result_action="return_value")
    lines, text = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["text"] for row in (*lines, *text)] == ["the cat", "the dog", "-5 degrees"]
    with pytest.raises(UsageError, match="--inptu: no such option"):
        app(["predict", model, "--inptu", "x"], exit_on_error=False, result_action="return_value")


def test_what_is_not_utf8_is_one_message(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n\xe9t\xe9\n")))
    with pytest.raises(DataError, match="standard input:2:1: invalid UTF-8 byte 0xe9"):
        predict(model, ["-"])
    with pytest.raises(DataError, match="text 2:1:1: invalid UTF-8 byte 0xe9"):
        predict(model, ["the cat", os.fsdecode(b"\xe9t\xe9")])


def test_a_person_reads_texts_as_they_were_given(model: str, capsys: pytest.CaptureFixture[str]):
    texts = ["see [/INST] end", "arr[i] x [red]"]
    app(["predict", model, *texts], exit_on_error=False, result_action="return_value")
    said = capsys.readouterr().out
    assert all(text in said for text in texts), said


def test_a_classifier_artifact_is_used_without_calibration(artifact: Path):
    [row] = predict(str(artifact), TEXTS[:1])
    [expected] = probabilities(subject_of(artifact, 1.0)[1], TEXTS[:1]).tolist()
    assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-6)


def test_only_a_language_model_continues_prompts(artifact: Path, model: str, tmp_path: Path):
    for folder, message in (
        (str(artifact), "not the weights of a LanguageModel"),
        (model, "LlamaForSequenceClassification"),
        (str(tmp_path), "no language model that can be read: .*config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            cli_use.generate(folder, ["the cat"])


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(model: str, tmp_path: Path):
    written(tmp_path / "a.jsonl", 9000)
    for workers in (1, 2):
        order = Order(
            model=model, input=str(tmp_path / "a.jsonl"), output=tmp_path / f"{workers}.jsonl", workers=workers
        )
        assert predict_file(order)["rows"] == 9000
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


@pytest.mark.slow
def test_a_bad_line_far_into_a_file_leaves_nothing(model: str, tmp_path: Path):
    written(tmp_path / "a.jsonl", 5000)
    with (tmp_path / "a.jsonl").open("a") as out:
        out.write('{"text": }\n')
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:5001:10: not valid JSON"):
            predict_file(Order(model=model, input=str(tmp_path / "a.jsonl"), workers=workers))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_that_is_there_is_kept_unless_forced(model: str, tmp_path: Path):
    written(tmp_path / "a.csv", 3)
    target = tmp_path / "out.csv"
    target.write_text("mine")
    order = {"model": model, "input": str(tmp_path / "a.csv"), "output": target}
    with pytest.raises(UsageError, match=r"such a file already.*--force"):
        predict_file(Order(**order))
    assert target.read_text() == "mine"
    predict_file(Order(**order, force=True))
    assert len(rows_of(target)) == 3
    with pytest.raises(UsageError, match="would replace its own input"):
        predict_file(Order(**order | {"output": tmp_path / "a.csv"}, force=True))


def test_a_column_of_the_name_needs_a_prefix(model: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    with pytest.raises(DataError, match=r"a\.csv:1: there is a column 'label' already\. Give --prefix"):
        predict_file(Order(model=model, input=str(tmp_path / "a.csv")))
    predict_file(Order(model=model, input=str(tmp_path / "a.csv"), prefix="predicted_"))
    [row] = rows_of(tmp_path / "a.predictions.csv")
    assert list(row) == ["text", "label", "predicted_label", "predicted_confidence"]
    assert row["label"] == "y"


def test_the_default_output_is_beside_the_input():
    assert default_target(Path("x/a.b.jsonl.gz")) == Path("x/a.b.predictions.jsonl.gz")
    assert default_target(Path("a.CSV")) == Path("a.predictions.CSV")
    assert default_target(Path("a.parquet.gz")) == Path("a.predictions.parquet")


@pytest.mark.slow
def test_the_command_ends_with_its_contract_or_with_one_message(model: str, tmp_path: Path):
    (tmp_path / "a.tsv").write_text("text\nthe cat\na dog\n")
    command = ["predict", model, "--input", str(tmp_path / "a.tsv"), "--json"]
    result = answer(gristmill(tmp_path, *command))
    assert result.keys() == {"rows", "seconds", "rows_per_second", "output", "labels"}
    assert result["rows"] == sum(result["labels"].values()) == 2
    done = gristmill(tmp_path, *command, "--text", "txt", "--force")
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/a.tsv:1: no column 'txt'. There are: 'text'. Name one of them\n"


def test_what_is_to_be_labelled_is_given_once(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing to label"):
        cli_use.predict("model")
    with pytest.raises(UsageError, match="give one of them"):
        cli_use.predict("model", ["a text"], input_="a.csv")
    with pytest.raises(UsageError, match="--output, --workers: only with --input FILE"):
        cli_use.predict("model", ["a text"], output=Path("a.csv"), workers=4)
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        predict_file(Order(model="model", input=str(tmp_path / "none.csv")))


def test_a_file_without_rows_is_refused(model: str, tmp_path: Path):
    for name, content in (("a.csv", ""), ("b.csv", "text\n"), ("c.jsonl", "\n \n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: no rows in this file"):
            predict_file(Order(model=model, input=str(tmp_path / name)))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_kill_leaves_no_output_and_no_process(model: str, tmp_path: Path):
    written(tmp_path / "a.jsonl", 100_000)
    command = ["predict", model, "--input", str(tmp_path / "a.jsonl"), "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command], env=os.environ | {"PYTHONPATH": "."}, start_new_session=True
    ) as process:
        scratch = tmp_path / f".tmp-a.predictions.jsonl-{process.pid}"
        until = time.monotonic() + 100
        while not (scratch.is_file() and scratch.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert scratch.is_file()
    assert not (tmp_path / "a.predictions.jsonl").exists()
    until = time.monotonic() + 30
    while _alive_in(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive_in(process.pid)


def _alive_in(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found
