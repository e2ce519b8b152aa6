"""Texts with several classes, or none: out of lists and strings, into splits that keep every class in train."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.classes import class_names
from pipeline.errors import DataError
from pipeline.splitting import Example, by_fractions, carve_validation, few_of_each
from pipeline.stages.labels import Labels, LabelsConfig
from pipeline.store import Store
from tests.pipeline.data_stages import labels_of, made, opened
from tests.pipeline.toy_multilabel import CLASSES, rows_of, written

MULTI = {"multi_label": True, "split": "split"}


def labels(path: Path, **fields: Any) -> Labels:
    return opened(labels_of(path, **(MULTI | fields)), path.parent / "home")


def refused(path: Path, **fields: Any) -> str:
    with pytest.raises(DataError) as error:
        made(labels_of(path, **(MULTI | fields)), path.parent / "home")
    return str(error.value)


def as_strings(rows: list[dict[str, Any]], separator: str) -> list[dict[str, Any]]:
    return [{**row, "label": separator.join(row["label"])} for row in rows]


def csv_of(rows: list[dict[str, Any]], separator: str) -> str:
    lines = [f'{row["text"]},"{separator.join(row["label"])}",{row["split"]}\n' for row in rows]
    return "".join(["text,label,split\n", *lines])


def test_every_kind_of_file_gives_the_same_artifact(tmp_path: Path):
    rows = rows_of(60)
    table = pa.table({name: [row[name] for row in rows] for name in ("text", "label", "split")})
    files = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "b.jsonl": "".join(json.dumps(row) + "\n" for row in as_strings(rows, " , ")),
        "c.csv": csv_of(rows, ","),
        "d.tsv": csv_of(rows, ",").replace(",", "\t"),
    }
    found = []
    for name, body in files.items():
        (tmp_path / name).write_text(body)
    pq.write_table(table, tmp_path / "e.parquet")
    for name in (*files, "e.parquet"):
        separator = {"d.tsv": "\t"}.get(name, ",")
        found.append(made(labels_of(tmp_path / name, **MULTI, separator=separator), tmp_path / "home").digest)
    assert len(set(found)) == 1


def test_the_artifact_holds_lists_and_gives_ones_and_zeros(tmp_path: Path):
    rows = rows_of(60)
    found = labels(written(tmp_path / "a.jsonl", rows))
    test = [row for row in rows if row["split"] == "test"]
    assert found.multi_label
    assert found.names == sorted(CLASSES)
    split = found.split("test")
    assert split.targets.dtype == np.int64
    assert [{found.names[i] for i in np.flatnonzero(row)} for row in split.targets] == [set(r["label"]) for r in test]
    assert {0, 1, 2} <= set(split.targets.sum(axis=1).tolist())
    assert pq.read_schema(found.path / "test.parquet").field("label").type == pa.list_(pa.string())
    assert found.counts["rows"]["test"] == len(test)
    assert found.counts["classes"]["test"]["fruit"] == sum("fruit" in row["label"] for row in test)


def test_a_split_without_rows_has_no_rows_of_as_many_classes(tmp_path: Path):
    rows = [row for row in rows_of(60) if row["split"] != "validation"]
    found = labels(written(tmp_path / "a.jsonl", rows), validation_fraction=0.0)
    assert found.split("validation").targets.shape == (0, len(CLASSES))
    assert pq.read_schema(found.path / "validation.parquet").field("label").type == pa.list_(pa.string())


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("b, a,,a", ("a", "b")),
        (" ", ()),
        ("", ()),
        ([], ()),
        (["b", "a", "b"], ("a", "b")),
        ([2, True, " x "], ("2", "true", "x")),
        (["a,b"], ("a,b",)),
    ],
)
def test_classes_are_sorted_and_count_once(value: Any, names: tuple[str, ...]):
    assert class_names(value, "here", ",") == names


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"is None: give a list of classes, \[\] for none, or leave the row out"),
        (float("nan"), "is nan: give a list of classes"),
        (3, r"is 3: not a list of classes\. Give \[3\]; .* set labels\.multi_label to false"),
        (True, r"is True: not a list"),
        ({"a": 1}, "not a list of classes"),
        (["a", None], "None in it is not a class"),
        (["a", " "], "' ' in it is not a class"),
        ([["a"]], r"\['a'\] in it is not a class"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(value: Any, message: str):
    with pytest.raises(DataError, match=f"^here {message}|^here is .*: {message}"):
        class_names(value, "here", ",")


def single(n: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": "ab"[i % 2], "split": ("train", "test")[i % 4 == 0]} for i in range(n)]


def test_a_file_of_one_class_a_row_is_told_from_one_with_another_separator(tmp_path: Path):
    message = refused(written(tmp_path / "a.jsonl", single()))
    assert message.startswith(f"{tmp_path}/a.jsonl:1: label is 'a', one class, and so it is in all 40 rows. ")
    assert "Set labels.multi_label to false, or labels.separator" in message
    rows = [{**row, "label": ["a;b", "a", "b"][i % 3]} for i, row in enumerate(single())]
    assert "labels.separator" in refused(written(tmp_path / "b.jsonl", rows))
    assert labels(tmp_path / "b.jsonl", separator=";").names == ["a", "b"]
    numbers = [{**row, "label": i % 2} for i, row in enumerate(single())]
    assert refused(written(tmp_path / "c.jsonl", numbers)).startswith(f"{tmp_path}/c.jsonl:1: label is 0: not a list")


def test_lists_of_one_class_each_are_what_they_say(tmp_path: Path):
    rows = [{**row, "label": [row["label"]]} for row in single()]
    found = labels(written(tmp_path / "a.jsonl", rows)).split("train").targets
    assert (found.sum(axis=1) == 1).all()


def test_a_file_of_several_classes_a_row_read_as_one_is_refused_with_the_remedy_or_doubted(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", rows_of(20))
    message = refused(path, multi_label=False)
    assert message.startswith(f"{path}:1: label is [")
    assert "for several classes a text, or none, set labels.multi_label to true" in message
    joined = [{**row, "label": ["a,b", "a", "b"][i % 3]} for i, row in enumerate(single())]
    built = made(labels_of(written(tmp_path / "b.jsonl", joined), split="split"), tmp_path / "home")
    assert built.notes["headline"].endswith("'a,b' looks like several classes: is labels.multi_label meant?")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "t", "label": ["a"], "split": "train"}] * 3, "every row has no class but 'a'"),
        ([{"text": "t", "label": [], "split": "train"}], "no labelled text"),
        (
            [{"text": "t", "label": ["a", "b"], "split": "train"}, {"text": "u", "label": ["b", "c"], "split": "test"}],
            ":2: the class 'c' of this test row is in no train row",
        ),
        (
            [
                {"text": "t", "label": ["a", "b"], "split": "train"},
                {"text": "u", "label": ["a"], "split": "train"},
                {"text": "v", "label": [], "split": "test"},
            ],
            "a.jsonl:3: no test row has a class",
        ),
    ],
)
def test_unusable_labels_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str):
    assert message in refused(written(tmp_path / "a.jsonl", rows))


def test_a_separator_without_several_classes_is_refused():
    with pytest.raises(ValueError, match="separator=';' is of use with multi_label alone"):
        LabelsConfig(path="a.csv", separator=";")


def test_bytes_of_a_list_that_are_no_text_are_named(tmp_path: Path):
    bad = pa.array([[b"a"], [b"a", b"\xff"]], pa.list_(pa.binary())).cast(pa.list_(pa.string()), safe=False)
    pq.write_table(pa.table({"text": ["x", "y"], "label": bad, "split": ["train", "test"]}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet:2")


def test_the_new_settings_leave_old_keys_alone(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", single())
    recipe = labels_of(path).recipe({})
    assert not {"multi_label", "separator"} & recipe["config"].keys()
    assert labels_of(path, multi_label=True).recipe({})["config"]["multi_label"] is True
    built = made(labels_of(path, split="split"), tmp_path / "home")
    record = json.loads((Store(tmp_path / "home").path("labels", built.key) / "labels.json").read_text())
    assert record.keys() == {"names", "rows", "classes"}


sets = st.lists(st.sampled_from("XYZ"), max_size=3, unique=True).map(lambda names: tuple(sorted(names)))
examples = st.lists(
    st.tuples(st.sampled_from("abcdefghijkl"), sets).map(lambda pair: Example(*pair, "", "")), min_size=1
)


@given(examples, st.integers(0, 5), st.booleans())
def test_splits_lose_nothing_keep_texts_together_and_leave_every_class_in_train(
    rows: list[Example], seed: int, in_time_order: bool
):
    fractions = (0.8, 0.1, 0.1), (0.7, 0.0, 0.3)
    divided, without = (by_fractions(rows, each, seed, in_time_order=in_time_order) for each in fractions)
    for splits in (divided, carve_validation(without, 0.3, seed, in_time_order=in_time_order)):
        assert sorted(row for part in splits.values() for row in part) == sorted(rows)
        learned = {name for row in splits["train"] for name in row.classes}
        assert learned == {name for row in rows for name in row.classes}
        assert not {r.text for r in splits["train"]} & {r.text for r in [*splits["validation"], *splits["test"]]}


@given(rows=st.lists(st.tuples(st.text(max_size=4), sets), max_size=30), most=st.integers(1, 4))
def test_a_few_of_each_class_are_enough_of_each_and_a_larger_number_keeps_the_smaller_one_s(
    rows: list[tuple[str, tuple[str, ...]]], most: int
):
    given_rows = [Example(text, label, "", f"row {i}") for i, (text, label) in enumerate(rows)]
    few, more = few_of_each(given_rows, most, 0), few_of_each(given_rows, most + 1, 0)
    assert [example for example in given_rows if example in few] == few
    assert set(few) <= set(more)
    for name in "XYZ":
        there = sum(name in example.classes for example in given_rows)
        assert sum(name in example.classes for example in few) >= min(there, most)
    assert sum(not example.classes for example in few) <= most
    assert len(few) <= 4 * most
