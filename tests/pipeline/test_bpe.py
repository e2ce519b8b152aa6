import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline import bpe
from pipeline.bpe import FAST, REFERENCE, TokenizerConfig, by_fast, by_reference, learn

WORDS = ["the", "cat", "Sat", "ΣΑΣ", "Straße", "日本", "don't", "12", "...", "\n", "\n\n  ", "  ", "\t", "<|eos|>", "é"]
SMALL = TokenizerConfig(vocab_size=330, min_frequency=2, lowercase=True)


def drawn(count: int) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choice(WORDS) + chance.choice(["", " "]) for _ in range(30)) for _ in range(count)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.sampled_from([*WORDS, " ", "a", "b"]), max_size=12).map("".join), min_size=1),
    vocab_size=st.integers(259, 400),
    min_frequency=st.integers(1, 3),
    lowercase=st.booleans(),
)
def test_the_fast_engine_learns_the_merges_of_the_reference(
    tmp_path: Path, texts: list[str], vocab_size: int, min_frequency: int, lowercase: bool
):
    config = TokenizerConfig(vocab_size=vocab_size, min_frequency=min_frequency, lowercase=lowercase)
    assert by_fast(texts, config, tmp_path, 1).to_str() == by_reference(texts, config).to_str()
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_is_learned_by_the_fast_engine(tmp_path: Path):
    texts = drawn(50)
    tokenizer, engine = learn(lambda: texts, SMALL, tmp_path, 2)
    assert engine == FAST
    assert tokenizer.get_vocab_size() == 330
    assert tokenizer.to_str() == by_reference(texts, SMALL).to_str()


def test_a_text_with_the_character_that_stands_for_a_newline_is_left_to_the_reference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    texts = [*drawn(50), "a page\vand\v\v more"]
    tokenizer, engine = learn(lambda: texts, SMALL, tmp_path, 1)
    assert engine == REFERENCE
    assert tokenizer.to_str() == by_reference(texts, SMALL).to_str()
    assert "vertical tab" in caplog.text
    assert not list(tmp_path.iterdir())


def test_an_engine_that_learns_other_merges_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def greedy(texts: list[str], config: TokenizerConfig, work: Path, threads: int) -> Tokenizer:
        del work, threads
        return by_reference(texts[:1], config)

    monkeypatch.setattr(bpe, "by_fast", greedy)
    texts = drawn(50)
    tokenizer, engine = learn(lambda: texts, SMALL, tmp_path, 1)
    assert engine == REFERENCE
    assert tokenizer.to_str() == by_reference(texts, SMALL).to_str()
    assert "other merges" in caplog.text


def test_without_the_extra_the_reference_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bpe, "FAST", "no_such_package")
    assert learn(lambda: drawn(5), SMALL, tmp_path, 1)[1] == REFERENCE
