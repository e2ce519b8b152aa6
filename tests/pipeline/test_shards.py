import itertools
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import tables
from pipeline.encoder import Encoded, reference_engine
from pipeline.errors import DataError
from pipeline.stages import shards as shards_stage
from pipeline.stages.shards import TokenShards
from pipeline.store import Store
from pipeline.text import unit_hash
from pipeline.token_stream import TokenStream
from pipeline.tokens import BOS_ID, EOS_ID
from tests.pipeline.data_stages import corpus_of, made, opened, sentences, shards_of, tokenizer_of, toy_text

DOCUMENTS = 200


@pytest.fixture(autouse=True, scope="module")
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP_BYTES", 500)
        patch.setattr(tables, "PART_BYTES", 2000)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    toy_text(folder, DOCUMENTS)
    return folder


def shards(home: Path, **fields) -> TokenShards:
    return opened(shards_of(corpus_of(home / "toy.txt"), **{"validation_fraction": 0.2, **fields}), home / "home")


def tokens_of(stream: TokenStream) -> np.ndarray:
    return stream.rows(np.array([0]), stream.n_tokens)[0][0]


def texts_of(stream: TokenStream, home: Path, **fields) -> list[str]:
    tokenizer = opened(tokenizer_of(corpus_of(home / "toy.txt"), **fields), home / "home").load()
    bounds = [*stream.document_starts.tolist(), stream.n_tokens]
    tokens = tokens_of(stream).tolist()
    decoded = [tokenizer.decode(tokens[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return [text.removeprefix(" ") for text in decoded]


def test_the_documents_of_both_splits_decode_to_the_corpus(home):
    both = {name: texts_of(shards(home).split(name), home) for name in ("train", "validation")}
    expected = sentences(DOCUMENTS)
    assert sorted(both["train"] + both["validation"]) == sorted(expected)
    for name, chosen in (("train", False), ("validation", True)):
        assert both[name] == [text for text in expected if (unit_hash(text, "validation 0") < 0.2) == chosen]


def test_every_document_stands_between_bos_and_eos(home):
    stream = shards(home).split("train")
    starts = stream.document_starts
    tokens = tokens_of(stream)
    assert (tokens[starts] == BOS_ID).all()
    assert (tokens[np.append(starts[1:], stream.n_tokens) - 1] == EOS_ID).all()
    assert (tokens == BOS_ID).sum() == (tokens == EOS_ID).sum() == stream.n_documents == len(starts)


def test_the_index_counts_documents_tokens_and_bytes(home):
    found = shards(home)
    expected = sentences(DOCUMENTS)
    splits = [found.split(name) for name in ("train", "validation")]
    assert sum(split.n_documents for split in splits) == DOCUMENTS
    assert sum(split.n_bytes for split in splits) == sum(len(text.encode()) for text in expected)
    assert found.index["dtype"] == "<u2"
    assert found.index["vocab_size"] == 300
    assert len(found.index["splits"]["train"]["shards"]) > 3


@pytest.mark.parametrize("tasks", [1, 3, 1000])
def test_the_number_of_tasks_changes_nothing(home, tasks):
    corpus = corpus_of(home / "toy.txt")
    base = made(shards_of(corpus, validation_fraction=0.2), home / "home")
    other = made(shards_of(corpus, validation_fraction=0.2, tasks=tasks), home / f"tasks-{tasks}")
    assert (other.key, other.digest, other.status) == (base.key, base.digest, "built")


@pytest.mark.parametrize("wrong_from", [0, 100])
def test_where_the_fast_engine_disagrees_on_some_text_the_other_encodes_them_all(home, monkeypatch, caplog, wrong_from):
    corpus = corpus_of(home / "toy.txt")
    base = made(shards_of(corpus, validation_fraction=0.2), home / "home")
    texts = sentences(DOCUMENTS)
    trusted = set() if not wrong_from else set(texts[:wrong_from])

    def sometimes_wrong(file: Path):
        right = reference_engine(file)

        def encode(texts):
            found, wrong = right(texts), not trusted.issuperset(texts)
            return Encoded(found.ids + np.uint32(wrong), found.lengths)

        return encode

    monkeypatch.setattr(shards_stage, "fast_engine", sometimes_wrong)
    other = made(shards_of(corpus, validation_fraction=0.2), home / f"wrong-{wrong_from}")
    assert other.digest == base.digest
    assert "gigatoken gives other ids than tokenizers" in caplog.text
    assert "encoded by tokenizers" in other.notes["headline"]


def test_tasks_in_other_processes_write_the_same_bytes(home):
    stage = shards_of(corpus_of(home / "toy.txt"), validation_fraction=0.2, tasks=2)
    base = made(stage, home / "home")
    with ProcessPoolExecutor(1) as pool:
        made(stage.tokenizer, home / "processes")
        other = made(stage, home / "processes", lambda function, items, _: list(pool.map(function, items)))
    assert other.digest == base.digest


def test_equal_documents_fall_on_the_same_side(tmp_path):
    (tmp_path / "toy.txt").write_text("\n".join(sentences(40) * 3))
    found = shards(tmp_path, validation_fraction=0.3)
    train, validation = (set(texts_of(found.split(name), tmp_path)) for name in ("train", "validation"))
    assert not train & validation
    assert validation


def test_another_seed_chooses_other_documents(home):
    chosen = [set(texts_of(shards(home, split_seed=seed).split("validation"), home)) for seed in (0, 1)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_a_tiny_corpus_has_one_validation_document(tmp_path, fraction):
    (tmp_path / "toy.txt").write_text("\n".join(sentences(5)))
    found = shards(tmp_path, validation_fraction=fraction)
    assert (found.split("train").n_documents, found.split("validation").n_documents) == (4, 1)
    lowest = min(sentences(5), key=lambda text: unit_hash(text, "validation 0"))
    assert texts_of(found.split("validation"), tmp_path) == [lowest]


def test_one_text_alone_cannot_be_split(tmp_path):
    (tmp_path / "toy.txt").write_text("same\nsame\n")
    with pytest.raises(DataError, match="document: line"):
        shards(tmp_path)


def test_rows_are_windows_with_the_number_of_their_document(home):
    stream = shards(home).split("train")
    length = 37
    starts = np.array([0, 5, 700, stream.n_tokens - length, 123], dtype=np.int64)
    everything, (tokens, documents) = tokens_of(stream), stream.rows(starts, length)
    assert tokens.dtype == documents.dtype == np.int64
    for row, start in enumerate(starts.tolist()):
        positions = np.arange(start, start + length)
        assert (tokens[row] == everything[start : start + length]).all()
        assert (documents[row] == np.searchsorted(stream.document_starts, positions, side="right") - 1).all()


def test_reading_past_the_end_is_an_error(home):
    stream = shards(home).split("train")
    for start in (stream.n_tokens - 3, -1):
        with pytest.raises(IndexError):
            stream.rows(np.array([start]), 4)


def test_a_stream_travels_small(home):
    stream = shards(home).split("train")
    stream.rows(np.array([0]), 8)
    data = pickle.dumps(stream)
    assert len(data) < 4000
    assert (tokens_of(pickle.loads(data)) == tokens_of(stream)).all()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1), min_size=2))
def test_any_corpus_survives_whatever_the_tasks(texts):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "toy.txt").write_text("\n".join([*texts, "one", "two"]), newline="")
        corpus = corpus_of(home / "toy.txt", max_word_bytes=1 << 20)
        one = made(shards_of(corpus, tasks=1), home / "home")
        two = made(shards_of(corpus, tasks=2), home / "again")
        assert one.digest == two.digest
        found = TokenShards(Store(home / "home").path("shards", one.key))
        decoded = [text for name in ("train", "validation") for text in texts_of(found.split(name), home)]
        assert sorted(decoded) == sorted(text.removeprefix(" ") for text in [*texts, "one", "two"] if text.strip())
