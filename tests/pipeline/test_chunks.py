"""A corpus in chunks that are read side by side is the corpus as it stands in its files."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import chunks
from pipeline.errors import DataError
from pipeline.readers import Reading, read_rows
from pipeline.sources import find
from pipeline.stage import Told
from tests.pipeline.data_stages import corpus_of, made, opened

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SMALLEST_BYTES", 32)
    monkeypatch.setattr(chunks, "LARGEST_BYTES", 64)


def written(path: Path, texts: list[str], first: bytes = b"") -> Path:
    """Plain text or, by its name, JSON lines."""
    lines = texts if path.suffix == ".txt" else [f'{{"text": "{text}"}}' for text in texts]
    path.write_bytes(first + "\n".join([*lines, ""]).encode())
    return path


def last_first(function: Callable[[Any], Any], items: Sequence[Any], told: Told) -> list[Any]:
    """`Map` that ends with what the caller gave first."""
    results = [function(item) for item in reversed(items)][::-1]
    told(len(results))
    return results


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab é日\r\ufeff", max_size=90), max_size=30).map(lambda lines: "\n".join(lines).encode()),
    st.booleans(),
    st.integers(1, 40),
)
def test_the_rows_of_all_chunks_are_those_of_the_file(tmp_path, monkeypatch, data, with_bom, smallest):
    monkeypatch.setattr(chunks, "SMALLEST_BYTES", smallest)
    path = tmp_path / "a.txt"
    path.write_bytes((BOM if with_bom else b"") + data)
    [whole] = find(str(path))
    pieces = [piece for chunk in chunks.chunks([whole], by_line=True) for piece in chunk]
    rows = [row.values for piece in pieces for row in read_rows(piece, ["text"], Reading())]
    assert rows == [row.values for row in read_rows(whole, ["text"], Reading())]
    spans = [piece.span or (0, whole.n_bytes) for piece in pieces]
    assert (spans[0][0], spans[-1][1]) == (0, whole.n_bytes)
    assert all(before[1] == after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.usefixtures("small")
def test_a_corpus_in_many_chunks_is_the_corpus(tmp_path, name):
    texts = [f"document number {number}" for number in range(200)]
    corpus = opened(corpus_of(written(tmp_path / name, texts, BOM)), tmp_path / "home")
    assert list(corpus.documents()) == texts
    assert len(corpus.parts) == corpus.counts["parts"] > 20
    assert [part.name for part in corpus.parts[:2]] == ["part-00000.parquet", "part-00001.parquet"]
    assert (corpus.n_documents, corpus.counts["documents_read"]) == (200, 200)
    again = made(corpus_of(tmp_path / name), tmp_path / "other", last_first)
    assert again.digest == made(corpus_of(tmp_path / name), tmp_path / "home").digest


@pytest.mark.usefixtures("small")
def test_what_is_dropped_and_split_is_counted_over_all_chunks(tmp_path):
    texts = ["good one", "   ", "x", "y" * 300, ""] * 20
    config = {"min_chars": 2, "max_word_bytes": 64}
    corpus = opened(corpus_of(written(tmp_path / "a.txt", texts), **config), tmp_path / "home")
    assert (corpus.counts["dropped"], corpus.counts["long_words_split"]) == (
        {"blank": 40, "duplicate": 0, "short": 20},
        20,
    )
    assert corpus.n_documents == 40


@pytest.mark.usefixtures("small")
def test_equal_documents_are_found_across_chunks(tmp_path):
    path = written(tmp_path / "a.txt", [f"text {number % 7}" for number in range(100)])
    corpus = opened(corpus_of(path, dedupe=True), tmp_path / "home")
    assert list(corpus.documents()) == [f"text {number}" for number in range(7)]


@pytest.mark.usefixtures("small")
def test_the_first_wrong_line_of_all_chunks_is_named(tmp_path):
    path = written(tmp_path / "a.jsonl", [f"document {number}" for number in range(100)])
    lines = path.read_text().splitlines()
    lines[80], lines[60] = "{", '{"other": 1}'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:61: no column 'text'"):
        made(corpus_of(path), tmp_path / "home", last_first)


@pytest.mark.usefixtures("small")
def test_small_files_are_read_together_and_what_has_no_lines_is_not_cut(tmp_path):
    for number in range(8):
        written(tmp_path / f"{number}.txt", [f"file {number}"])
    (tmp_path / "8.csv").write_text("text\n" + "one\n" * 100)
    cut = chunks.chunks(find(str(tmp_path)), by_line=True)
    assert [len(chunk) for chunk in cut] == [5, 4]
    assert [source.name for chunk in cut for source in chunk] == [f"{n}.txt" for n in range(8)] + ["8.csv"]
    whole = written(tmp_path / "long.txt", ["a line"] * 100)
    assert len(chunks.chunks(find(str(whole)), by_line=True)) > 5
    assert chunks.chunks(find(str(whole)), by_line=False) == [tuple(find(str(whole)))]
