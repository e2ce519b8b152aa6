"""Tokens spell what they stand for: the bytes of a text come back from its ids, whatever the vocabulary."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.bpe import blank_tokenizer
from pipeline.spelling import MOST_BYTES, spelled
from pipeline.tokens import BOS, EOS, PAD

TEXTS = ["the cat sat on the mat", "un été à la mer", "кошка и собака", "a  b\tc\n"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = blank_tokenizer(lowercase=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS, PAD], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.encode_special_tokens = True  # as load_tokenizer has it: a text may hold their characters
    return tokenizer


def bytes_of(tokenizer: Tokenizer, text: str) -> bytes:
    table = spelled(tokenizer, tokenizer.get_vocab_size() + 1)
    ids = tokenizer.encode(text).ids
    return bytes(byte for number in ids for byte in table[number].tolist() if byte >= 0)


@given(st.sampled_from(TEXTS) | st.text(max_size=30))
@example(PAD)
def test_a_byte_level_vocabulary_spells_every_text(byte_level: Tokenizer, text: str):
    read = bytes_of(byte_level, text)
    assert read in (text.encode(), b" " + text.encode())  # where a word begins, also the first


def test_special_tokens_and_rows_without_a_token_spell_nothing(byte_level: Tokenizer):
    table = spelled(byte_level, byte_level.get_vocab_size() + 1)
    assert table.shape == (byte_level.get_vocab_size() + 1, MOST_BYTES)
    for number in (*map(byte_level.token_to_id, (BOS, EOS, PAD)), -1):
        assert (table[number] == -1).all()


def test_vocabularies_of_others_are_read_as_they_are_written():
    pieces = Tokenizer(models.WordLevel({"\u2581cat": 0, "##s": 1, "\u00e9": 2, "x" * 40: 3}, unk_token="x" * 40))
    pieces.decoder = decoders.Metaspace()
    table = spelled(pieces, 4)
    read = [bytes(byte for byte in row if byte >= 0) for row in table.tolist()]
    assert read == [b" cat", b"s", "\u00e9".encode(), b"x" * MOST_BYTES]
