import os
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bpe import blank_tokenizer
from pipeline.errors import StageFailed
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.tokens import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    PAD,
    encode_documents,
    load_tokenizer,
    one_thread,
    panics,
    special_tokens,
)
from tests.pipeline.data_stages import corpus_of, made, opened, tokenizer_of, toy_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFile:
    folder = tmp_path_factory.mktemp("tokenizer")
    return opened(tokenizer_of(corpus_of(toy_text(folder)), vocab_size=320), folder / "home")


def test_special_tokens_come_first_and_stand_around_a_document(trained):
    tokenizer = trained.load()
    assert [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)] == [BOS_ID, EOS_ID, 2] == [0, 1, 2]
    ids = encode_documents(tokenizer, ["the cat", ""])
    assert [(i[0], i[-1]) for i in ids] == [(BOS_ID, EOS_ID)] * 2
    assert len(ids[1]) == 2
    assert trained.vocab_size == 320


@given(st.text(max_size=60))
def test_any_text_survives_the_round_trip(trained, text):
    tokenizer = trained.load()
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids.tolist()) in (text, f" {text}")
    assert ids.min() >= 0
    assert ids.max() < trained.vocab_size


@pytest.mark.parametrize("forged", ["<|eos|>", "a<|bos|>b", " <|pad|>", "<|eos|><|eos|>"])
def test_a_text_cannot_forge_a_special_token(trained, forged):
    for tokenizer in (trained.load(), load_tokenizer(trained.file)):
        (ids,) = encode_documents(tokenizer, [forged])
        assert not np.isin(ids[1:-1], [BOS_ID, EOS_ID, 2]).any()
        assert tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False).lstrip(" ") == forged.lstrip(" ")
        assert tokenizer.encode(forged).ids == ids.tolist()


def test_a_corpus_full_of_forged_tokens_does_not_learn_them(tmp_path):
    (tmp_path / "a.txt").write_text("<|eos|> <|bos|>\n" * 500)
    tokenizer = opened(tokenizer_of(corpus_of(tmp_path / "a.txt")), tmp_path / "home").load()
    (ids,) = encode_documents(tokenizer, ["<|eos|> <|bos|>"])
    assert (ids[1:-1] > 2).all()


def test_lowercase_is_part_of_the_tokenizer(tmp_path):
    corpus = corpus_of(toy_text(tmp_path))
    tokenizer = opened(tokenizer_of(corpus, lowercase=True), tmp_path / "home").load()
    assert tokenizer.decode(encode_documents(tokenizer, ["The CAT É"])[0].tolist()) == " the cat é"


def test_the_same_corpus_gives_the_same_bytes_on_any_number_of_threads(tmp_path, monkeypatch):
    stage = tokenizer_of(corpus_of(toy_text(tmp_path)))
    one = made(stage, tmp_path / "one")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert made(stage, tmp_path / "two").digest == one.digest


@pytest.mark.parametrize("before", [None, "true"])
def test_one_thread_leaves_the_setting_as_it_was_also_after_an_error(before, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with suppress(KeyError), one_thread():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        raise KeyError
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_economy_is_measured(tmp_path):
    metrics = made(tokenizer_of(corpus_of(toy_text(tmp_path))), tmp_path / "home").notes["metrics"]
    assert 1 < metrics["bytes_per_token"] < 10
    assert metrics["fertility"] >= 1


def test_a_tiny_corpus_gives_a_small_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n")
    assert opened(tokenizer_of(corpus_of(tmp_path / "a.txt")), tmp_path / "home").vocab_size == 259


def test_transformers_reads_the_file(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained.file), **special_tokens(trained.load()))
    assert theirs("the cat sat").input_ids == encode_documents(trained.load(), ["the cat sat"])[0].tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_a_panic_becomes_an_error_of_ours():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(StageFailed, match="no luck: tokenizers stopped with: boom"), panics("no luck"):
        raise panic("boom")
    with pytest.raises(KeyboardInterrupt), panics("no luck"):
        raise KeyboardInterrupt


def test_what_the_corpus_raises_while_it_is_learned_from_comes_through():
    def texts():
        yield ["a b"]
        raise StageFailed("gone")

    with pytest.raises(StageFailed, match="gone"):
        blank_tokenizer(lowercase=False).train_from_iterator(texts())
