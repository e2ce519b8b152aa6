import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from pipeline import readers, tables
from pipeline.errors import DataError
from pipeline.readers import Reading, read_rows, text_of
from pipeline.sources import KINDS, find
from pipeline.text import cut, split_long_words, split_long_words_of
from tests.pipeline.data_stages import corpus_of, made, opened

TWO = ["first document", "second, with é and 日本"]


def documents(path: Path | str, home: Path, **fields) -> list[str]:
    return list(opened(corpus_of(path, **fields), home).documents())


def refused(path: Path | str, tmp_path: Path, **fields) -> str:
    with pytest.raises(DataError) as error:
        made(corpus_of(path, **fields), tmp_path / "home")
    return str(error.value)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def encoded(name: str) -> bytes:
    """TWO in the format that a file name says."""
    kind = name.removesuffix(".gz").removesuffix(".zst")
    if kind.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": [1, 2], "text": TWO}), sink)
        data = sink.getvalue().to_pybytes()
    elif kind.endswith("jsonl"):
        data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TWO).encode()
    elif kind.endswith(".csv"):
        data = b"id,text\n" + "".join(f'1,"{text}"\n' for text in TWO).encode()
    else:
        data = "\n".join(TWO).encode()
    return {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rsplit(".")[-1], bytes)(data)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_format_gives_the_same_documents_and_bytes(tmp_path, kind, compression):
    path = write(tmp_path / f"a.{kind}{compression}", encoded(f"a.{kind}{compression}"))
    assert documents(path, tmp_path / "home") == TWO
    plain = write(tmp_path / "plain.txt", encoded("plain.txt"))
    home = tmp_path / "home"
    assert made(corpus_of(path), home).digest == made(corpus_of(plain), home).digest


def test_a_saved_dataset_is_read_and_one_with_splits_names_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"text": TWO})
    dataset.save_to_disk(tmp_path / "saved")
    other = datasets.Dataset.from_dict({"text": ["three"]})
    datasets.DatasetDict({"train": dataset, "test": other}).save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "saved", tmp_path / "home") == TWO
    assert "splits test, train" in refused(tmp_path / "splits", tmp_path)
    assert documents(tmp_path / "splits" / "train", tmp_path / "home") == TWO


def test_working_with_a_saved_dataset_leaves_its_key(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TWO}).save_to_disk(tmp_path / "saved")
    key = corpus_of(tmp_path / "saved").key({})
    datasets.Dataset.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"length": len(row["text"])})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert corpus_of(tmp_path / "saved").key({}) == key


def test_a_folder_a_glob_and_another_place_have_the_same_key(tmp_path):
    for place in ("one", "else/where"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        write(folder / "b.txt", "from b")
        write(folder / "a.txt", "from a")
        write(folder / "notes.md", "not data")
    paths = [tmp_path / "one", f"{tmp_path}/one/*.txt", tmp_path / "else" / "where"]
    assert len({corpus_of(path).key({}) for path in paths}) == 1
    assert documents(paths[0], tmp_path / "home") == ["from a", "from b"]


def test_what_is_hidden_is_read_where_it_is_named_alone(tmp_path):
    folder = tmp_path / "data"
    (folder / ".checkpoints").mkdir(parents=True)
    for name in ("a.txt", "._a.txt", ".checkpoints/b.txt"):
        write(folder / name, f"from {name}")
    for path in (folder, f"{folder}/*.txt", f"{folder}/**/*.txt"):
        assert documents(path, tmp_path / "home") == ["from a.txt"]
    assert documents(f"{folder}/.check*/*.txt", tmp_path / "home") == ["from .checkpoints/b.txt"]


def test_another_content_or_rule_is_another_key_and_the_path_is_not(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    key = corpus_of(path).key({})
    assert corpus_of(path, dedupe=True).key({}) != key
    write(path, "two")
    assert corpus_of(path).key({}) != key


def test_loops_of_links_are_harmless_and_a_file_counts_once(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write(folder / "sub" / "a.txt", "once")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    (folder / "again.txt").symlink_to(folder / "sub" / "a.txt")
    assert documents(folder, tmp_path / "home") == ["once"]
    assert documents(f"{folder}/**/*.txt", tmp_path / "home") == ["once"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "no such file" in refused(tmp_path / "pipe.txt", tmp_path)


def test_a_missing_path_shows_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("data/none.txt", tmp_path).startswith(f"{tmp_path}/data/none.txt: no such file")
    assert "Known kinds are .txt" in refused(write(tmp_path / "a.docx", "x"), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no readable file" in refused(tmp_path / "empty", tmp_path)
    assert "no such file" in refused("no-[such]-*.txt", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    assert "locked" in refused(tmp_path / "locked", tmp_path)


def test_quoted_tsv_keeps_tabs_and_line_ends(tmp_path):
    path = write(tmp_path / "a.tsv", b'id\ttext\n1\t"two\ttabs\there\nand ""two"" lines"\n2\tsaid "so"\n')
    assert documents(path, tmp_path / "home") == ['two\ttabs\there\nand "two" lines', 'said "so"']


def test_bom_line_ends_and_blank_lines_do_not_reach_the_documents(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\n  \t\r\ntwo\rlines\nthree")
    built = made(corpus_of(path), tmp_path / "home")
    assert documents(path, tmp_path / "home") == ["one", "two\nlines", "three"]
    assert built.notes["metrics"]["dropped_blank"] == 2
    assert built.notes["datasets"][0]["name"] == "a.txt"


def test_a_file_with_nothing_but_a_bom_has_no_rows(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", b"\xef\xbb\xbf")
    write(tmp_path / "data" / "b.jsonl", '{"text": "one"}\n')
    assert documents(tmp_path / "data", tmp_path / "home") == ["one"]


def test_a_nul_that_a_record_spells_out_becomes_the_replacement_character_and_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\u0000\\u0000b"}\n{"text": "c"}\n')
    assert documents(path, tmp_path / "home") == ["a\ufffd\ufffdb", "c"]
    assert made(corpus_of(path), tmp_path / "home").notes["metrics"]["texts_with_nul"] == 1


def test_a_whole_file_can_be_one_document(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert documents(path, tmp_path / "home", document="file") == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\nb\xc3\xa9 \xff bad\n", "a.txt:2:5: invalid UTF-8 byte 0xff"),
        ("a.txt", b"good\nPNG\0\0", "a.txt:2: a NUL character"),
        ("a.txt", "wide".encode("utf-16"), "a.txt:1:1: invalid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2:"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "a.jsonl:3:11: invalid UTF-8"),
        ("a.jsonl", b'{"text": "a\0b"}\n', "a.jsonl:1: a NUL character"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1:"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: a JSON list"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: text is 5, not a text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', "a.jsonl:2: no column 'text'. There are: 'body', 'id'"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1:"),
        ("a.csv", b"id,body\n1,x\n", "a.csv:1: no column 'text'. There are: 'id', 'body'"),
        ("a.csv", b'id,text\n1,"two\nlines"\n2,a,b\n', "a.csv:4: 3 fields, but the header has 2"),
        ("a.csv", b'text\n"never closed\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"text,text\na,b\n", "more than one column"),
        ("a.tsv", b'text\tid\n"Yes\t1\nno\t2\nmaybe"\t3\n', "a.tsv:2: quotes hold what looks like 3 rows"),
        ("a.tsv", b'id\ttext\n1\t"Yes\n2\tno\n3"\tmaybe\n', "a.tsv:2: quotes hold what looks like 3 rows"),
        ("a.parquet", b"", "a.parquet: cannot be read: Parquet file size is 0 bytes"),
        ("a.parquet", b"PAR1 but no more PAR1", "a.parquet: cannot be read"),
        ("a.txt.gz", b"", "a.txt.gz: cannot be read: it has 0 bytes"),
        ("a.txt.gz", gzip.compress(bytes(range(256)) * 99, mtime=0)[:90], "a.txt.gz: cannot be read"),
        ("a.txt.gz", b"plain text", "a.txt.gz: cannot be read"),
        ("a.txt.zst", b"", "a.txt.zst: cannot be read: it has 0 bytes"),
        ("a.txt.zst", zstandard.compress(os.urandom(300_000))[:200_000], "a.txt.zst"),
        (
            "a.txt.zst",
            zstandard.compress(b"some text\n" * 99)[:15],
            "a.txt.zst: cannot be read: the compressed data ends",
        ),
        ("a.txt.zst", b"plain text", "a.txt.zst: cannot be read"),
        ("a.txt", b"", "an empty corpus"),
        ("a.csv", b"", "an empty corpus"),
        ("a.csv", b"text\n", "an empty corpus"),
        ("a.jsonl", b'{"text": null}\n\n{"text": " "}', "an empty corpus: 2 documents read, dropped 2 blank"),
    ],
)
def test_bad_input_is_refused_with_file_and_line(tmp_path, name, data, message):
    assert message in refused(write(tmp_path / name, data), tmp_path)
    assert not (tmp_path / "home" / "store").exists() or not list((tmp_path / "home" / "store" / "corpus").iterdir())


def test_parquet_says_which_columns_there_are_and_which_row_is_bad(tmp_path):
    bad = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": bad, "n": [1, 2]}), tmp_path / "a.parquet")
    assert "no column 'text'. There are: 'body', 'n'" in refused(tmp_path / "a.parquet", tmp_path)
    assert "a.parquet:2:1: invalid UTF-8" in refused(tmp_path / "a.parquet", tmp_path, text="body")
    assert "a.parquet:1: n is 1, not a text" in refused(tmp_path / "a.parquet", tmp_path, text="n")


def test_a_damaged_parquet_page_is_an_error(tmp_path):
    pq.write_table(pa.table({"text": TWO}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = b"\xff" * 56
    assert "a.parquet: cannot be read" in refused(write(tmp_path / "a.parquet", bytes(data)), tmp_path)


def test_invalid_utf8_can_be_repaired_and_is_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"good\nb\xff\n")
    built = made(corpus_of(path, invalid_utf8="repair"), tmp_path / "home")
    assert documents(path, tmp_path / "home", invalid_utf8="repair") == ["good", "b\ufffd"]
    assert built.notes["metrics"]["repaired_utf8"] == 1


def test_equal_documents_are_dropped_only_when_asked(tmp_path):
    path = write(tmp_path / "a.txt", "x\ny\nx\n")
    assert documents(path, tmp_path / "home") == ["x", "y", "x"]
    assert documents(path, tmp_path / "home", dedupe=True) == ["x", "y"]
    assert documents(write(path, "long enough\nno\n"), tmp_path / "home", min_chars=3) == ["long enough"]


def test_a_giant_line_becomes_several_documents_with_nothing_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_PIECE_BYTES", 1000)
    line = "é日本 words " * 700
    path = write(tmp_path / "a.txt", f"{line}\nshort\n")
    for fields in ({}, {"document": "file"}):
        found = documents(path, tmp_path / "home" / str(len(fields)), **fields)
        assert len(found) > 8
        assert "".join(found).replace("\n", "") == line + "short"
    unbroken = write(tmp_path / "b.txt", "日本" * 2000)
    assert "".join(documents(unbroken, tmp_path / "home")).replace(" ", "") == "日本" * 2000


def test_a_giant_json_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * (1 << 20) + b'"}\n')
    assert "a.jsonl:1: a line of 1 MiB or more" in refused(path, tmp_path)


def test_one_unbroken_megabyte_is_split_and_counted(tmp_path):
    path = write(tmp_path / "a.txt", "a" * 1_000_000 + " end\n" + " " * 100_000 + "x\n")
    built = made(corpus_of(path), tmp_path / "home")
    found = documents(path, tmp_path / "home")
    assert max(len(word) for text in found for word in text.split(" ")) <= 1024
    assert "".join(found).replace(" ", "") == "a" * 1_000_000 + "endx"
    assert built.notes["metrics"]["long_words_split"] == 2


def test_chinese_text_without_spaces_is_left_as_it_is():
    text = "他们说\uff0c这是一个很长的句子\u3002" * 500
    assert split_long_words(text, 1024) == (text, 0)


@given(st.text(max_size=90), st.sampled_from(["x", " ", "é", "\t ", "-"]), st.integers(16, 400), st.text(max_size=90))
def test_no_word_is_too_long_for_the_quick_look(before, of, limit, after):
    text = f"{before} word {of * limit} word {after}"
    split, _ = split_long_words(text, limit)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(split)
    assert all(len(split[start:end].encode()) <= limit + 1 for _, (start, end) in words)
    assert "".join(split.split()) == "".join(text.split())


@given(st.text(max_size=300), st.integers(4, 40))
def test_splitting_words_loses_nothing_but_spaces(text, limit):
    split, count = split_long_words(text, limit)
    assert "".join(split.split()) == "".join(text.split())
    assert count or split == text


@given(
    st.lists(st.tuples(st.sampled_from(" \n\t\r\x1c\xa0\u3000\u200baé1.日'"), st.integers(1, 60)), max_size=12),
    st.integers(4, 100),
)
def test_looking_only_where_a_long_word_could_be_changes_nothing(runs, limit):
    text, pieces, end = "".join(character * count for character, count in runs), [], 0
    for _, (start, stop) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
        word, step = text[start:stop], limit // 4
        if len(word.encode()) > limit:
            broken = word[:step] if word.isspace() else " ".join(word[i : i + step] for i in range(0, len(word), step))
            pieces, end = [*pieces, text[end:start], broken], stop
    assert split_long_words(text, limit)[0] == "".join([*pieces, text[end:]])


RUNS = st.lists(st.tuples(st.sampled_from("aé日 \n\t\xa0"), st.integers(1, 150)), max_size=6)


@given(
    st.lists(RUNS.map(lambda runs: "".join(one * count for one, count in runs)), min_size=1, max_size=8),
    st.integers(4, 400),
)
def test_looking_at_many_texts_at_once_changes_nothing(texts, limit):
    one_by_one = [split_long_words(text, limit) for text in texts]
    together = [text for text, _ in one_by_one], sum(found for _, found in one_by_one)
    assert split_long_words_of(texts, limit) == together


@given(st.text(max_size=200), st.integers(1, 50))
def test_cutting_a_text_loses_nothing(text, limit):
    pieces = cut(text, limit)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit


def test_parts_and_groups_depend_on_the_text_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "GROUP_BYTES", 100)
    monkeypatch.setattr(tables, "PART_BYTES", 400)
    texts = [f"document number {i}" for i in range(100)]
    path = write(tmp_path / "a.txt", "\n".join(texts))
    one, two = (made(corpus_of(path), tmp_path / home) for home in ("one", "two"))
    assert one.digest == two.digest
    corpus = opened(corpus_of(path), tmp_path / "one")
    assert list(corpus.documents()) == texts
    assert len(corpus.parts) == corpus.counts["parts"] > 3
    assert (corpus.n_documents, corpus.n_bytes) == (100, sum(map(len, texts)))


def test_no_bytes_make_the_readers_raise_anything_but_a_data_error(tmp_path):
    count = Counter()
    json_like = st.text(alphabet='{}[]":,text \\u00\n\r0dé', max_size=80).map(str.encode)
    csv_like = st.text(alphabet='text,"\n\r;\tb', max_size=60).map(str.encode)
    framed = st.binary(max_size=60).map(lambda data: b"PAR1" + data + b"PAR1")
    packed = st.binary(max_size=60).flatmap(
        lambda d: st.sampled_from([gzip.compress(d, mtime=0), zstandard.compress(d)])
    )
    torn = st.tuples(packed, st.integers(0, 90)).map(lambda pair: pair[0][: pair[1]])

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(st.binary(max_size=200), json_like, csv_like, framed, torn),
        st.sampled_from(KINDS),
        st.sampled_from(["", ".gz", ".zst"]),
        st.booleans(),
    )
    def check(data: bytes, kind: str, compression: str, repair: bool) -> None:
        path = write(tmp_path / f"fuzz{kind}{compression}", data)
        try:
            for source in find(str(path)):
                rows = read_rows(source, ["text"], Reading(repair=repair))
                count["documents"] += sum(isinstance(text_of(row, source, "text"), str) for row in rows)
        except DataError as error:
            assert "fuzz." in str(error)  # noqa: PT017
            count["refused"] += 1

    check()
    assert count["documents"] > 10
    assert count["refused"] > 10
