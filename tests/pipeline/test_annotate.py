"""A file of rows comes back with its rows as they were, in order, and columns added; or not at all."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.annotate import check_target, writing
from pipeline.errors import DataError, EnvironmentProblem, UsageError
from pipeline.pieces import PIECE_BYTES, PIECE_ROWS, read_pieces, source_of
from pipeline.readers import Reading

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t"), max_size=20)
"""No tabs: with line ends they may look like rows of TSV in quotes, which are refused."""


def annotated(path: Path, target: Path, column: str = "text") -> list[str]:
    """Write a file again with the number of each row; gives back its texts."""
    texts: list[str] = []
    source = source_of(str(path))
    with writing(target) as write:
        for piece in read_pieces(source, column, ["number"], Reading()):
            write(piece, {"number": list(range(len(texts), len(texts) + len(piece.texts)))})
            texts += piece.texts
    return texts


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none()), min_size=1),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
)
def test_json_lines_keep_every_byte(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], suffix: str):
    folder = tmp_path_factory.mktemp("json")
    rows = [
        {key: value for key, value in row.items() if key != "number"} | {"text": f"t{i}"} for i, row in enumerate(rows)
    ]
    lines = [json.dumps(row, ensure_ascii=bool(i % 2)) for i, row in enumerate(rows)]
    (folder / "in.jsonl").write_text("\n \n".join(lines) + "\n", encoding="utf-8")
    assert annotated(folder / "in.jsonl", folder / f"out.jsonl{suffix}") == [row["text"] for row in rows]
    again = annotated_rows(folder / f"out.jsonl{suffix}")
    assert [json.loads(line) for line in again] == [row | {"number": i} for i, row in enumerate(rows)]
    assert all(new.startswith(old[:-1]) for new, old in zip(again, lines, strict=True))


def annotated_rows(path: Path) -> list[str]:
    pieces = read_pieces(source_of(str(path)), "text", ["nothing"], Reading())
    return [row for piece in pieces for row in piece.rows]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8),
    kinds=st.sampled_from([(".csv", ".csv"), (".tsv", ".csv.gz"), (".csv", ".tsv.zst")]),
)
def test_csv_keeps_every_value(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], kinds: tuple[str, str]
):
    folder = tmp_path_factory.mktemp("csv")
    path, target = folder / f"in{kinds[0]}", folder / f"out{kinds[1]}"
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t" if kinds[0] == ".tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([("other", "text"), *rows])
    assert annotated(path, target) == [text for _, text in rows]
    [piece] = read_pieces(source_of(str(target)), "text", ["nothing"], Reading())
    assert piece.header == ("other", "text", "number")
    assert piece.rows == [[*row, str(i)] for i, row in enumerate(rows)]


def test_parquet_keeps_types_nulls_and_metadata(tmp_path: Path):
    n = PIECE_ROWS + 700
    table = pa.table(
        {
            "id": pa.array(range(n), pa.int16()),
            "text": pa.array([None if i % 7 == 0 else f"t{i}" for i in range(n)]).dictionary_encode(),
            "tags": pa.array([["a"] * (i % 3) for i in range(n)]),
        }
    ).replace_schema_metadata({"who": "me"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1000)
    texts = annotated(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert texts == ["" if i % 7 == 0 else f"t{i}" for i in range(n)]
    back = pq.read_table(tmp_path / "out.parquet")
    assert back.drop_columns(["number"]).cast(table.schema).equals(table)
    assert back.column("number").to_pylist() == list(range(n))
    assert back.schema.metadata[b"who"] == b"me"


def test_a_file_comes_in_pieces_of_bounded_size(tmp_path: Path):
    (tmp_path / "in.csv").write_text("text\n" + "".join(f"t{i}\n" for i in range(PIECE_ROWS + 5)))
    sizes = [len(piece.texts) for piece in read_pieces(source_of(str(tmp_path / "in.csv")), "text", [], Reading())]
    assert sizes == [PIECE_ROWS, 5]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_long_column_beside_the_text_counts_too(tmp_path: Path, suffix: str):
    long = "x" * (PIECE_BYTES // 4)
    row, header = (json.dumps({"text": "t", "html": long}), "") if suffix == "jsonl" else (f"t,{long}", "text,html\n")
    (tmp_path / f"in.{suffix}").write_text(header + f"{row}\n" * 5)
    pieces = read_pieces(source_of(str(tmp_path / f"in.{suffix}")), "text", [], Reading())
    assert [len(piece.texts) for piece in pieces] == [4, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2:\d+: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: a JSON list"),
        ("a.jsonl", '{"txt": "x"}\n', r"a\.jsonl:1: no column 'text'. There are: 'txt'"),
        ("a.jsonl", '{"text": 5}\n', r"a\.jsonl:1: text is 5, not a text"),
        ("a.jsonl", '{"text": "x", "number": 1}\n', r"a\.jsonl:1: there is a column 'number' already.*--prefix"),
        ("a.csv", "text,number\nx,1\n", r"a\.csv:1: there is a column 'number' already"),
        ("a.csv", "text,b\nx\n", r"a\.csv:2: 1 fields, but the header has 2"),
        ("a.csv", 'text,b\n"x,1\n', r"a\.csv:2: not valid CSV"),
        ("a.tsv", "txt\nx\n", r"a\.tsv:1: no column 'text'"),
        ("a.parquet", "PAR1", r"a\.parquet: cannot be read"),
        ("a.jsonl.gz", "no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", "x", r"a\.txt: a txt\. Give one file of \.jsonl"),
        ("a.xls", "x", r"unknown kind of file|a\.xls"),
    ],
)
def test_what_cannot_be_read_is_one_message_and_no_output(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        annotated(tmp_path / name, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_only_one_file_is_read(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"2 files\. Give one file"):
        source_of(str(tmp_path))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("out.csv", r"the kind of the input: name it \.jsonl or \.ndjson"),
        ("out", "the kind of the input"),
        (".", "the kind of the input"),
    ],
)
def test_an_output_of_another_kind_is_refused(tmp_path: Path, target: str, message: str):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=message):
        check_target(source_of(str(tmp_path / "a.jsonl")), tmp_path / target)


def test_an_output_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(EnvironmentProblem, match=r"a\.jsonl/out\.jsonl: cannot be written"):
        annotated(tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "out.jsonl")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    alive = tmp_path / f".tmp-out.jsonl-{os.getppid()}"
    for orphan in (tmp_path / ".tmp-out.jsonl-4194305", alive):  # no process has so high a number
        orphan.write_text("half a row")
    annotated(tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out.jsonl", alive.name}
