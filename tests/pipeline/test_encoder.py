import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from pipeline import encoder
from pipeline.bpe import TokenizerConfig, by_reference
from pipeline.encoder import (
    JUDGED_CHARS,
    Disagreement,
    Encoded,
    checked,
    fast_engine,
    prepared,
    reference_engine,
)
from pipeline.tokens import BOS_ID, EOS_ID, encode_documents, load_tokenizer

LEARNT = [
    "the cat sat on the mat",
    "  and the dog's bone\n\nwas THE best",
    "ein Straßenkätzchen, 12 34 567",
    "ΣΑΣ 日本",
]
ODD = [
    "",
    " ",
    "a",
    "\n\nfoo ",
    "\x1cfoo",
    "\u2003 b",
    "\u0085x",
    "ΑΣ ΣΑΣ",
    "İstanbul",
    "\U00016ea0 \ua7cb",
    "<|bos|> x <|eos|>",
    "😀 e\u0301",
    "\ufeffx",
]


@pytest.fixture(scope="module", params=[True, False], ids=["lowercase", "cased"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = by_reference(LEARNT * 3, TokenizerConfig(vocab_size=320, min_frequency=2, lowercase=request.param))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def documents(encoded: Encoded) -> list[list[int]]:
    ends = np.cumsum(encoded.lengths)
    return [ids.tolist() for ids in np.split(encoded.ids, ends[:-1])]


@given(texts=st.lists(st.one_of(st.text(), st.sampled_from(LEARNT + ODD)), min_size=1))
def test_the_fast_engine_gives_the_ids_of_the_reference(file: Path, texts: list[str]):
    fast = fast_engine(file)
    assert fast is not None
    expected = [ids.tolist() for ids in encode_documents(load_tokenizer(file), texts)]
    assert documents(fast(texts)) == expected


def test_every_character_has_the_small_letter_that_tokenizers_gives_it():
    codes = (code for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    characters = [chr(code) for code in codes if code != ord("\n")]
    lowered = normalizers.Lowercase().normalize_str("\n".join(characters)).split("\n")
    wrong = [(c, small) for c, small in zip(characters, lowered, strict=True) if prepared(True, False, c) != small]
    assert wrong == []


def test_odd_texts_stand_between_bos_and_eos_whatever_they_spell(file: Path):
    fast = fast_engine(file)
    assert fast is not None
    found = documents(checked(fast, reference_engine(file), JUDGED_CHARS, ODD))
    assert found == [ids.tolist() for ids in encode_documents(load_tokenizer(file), ODD)]
    assert all(ids[0] == BOS_ID and ids[-1] == EOS_ID and not {BOS_ID, EOS_ID} & set(ids[1:-1]) for ids in found)


def test_an_engine_that_disagrees_anywhere_is_found_out_where_all_is_judged(file: Path):
    right = reference_engine(file)

    def wrong_on_digits(texts: Sequence[str]) -> Encoded:
        found = right(texts)
        digits = any(character.isdigit() for text in texts for character in text)
        return Encoded(found.ids + np.uint32(digits), found.lengths)

    encode = partial(checked, wrong_on_digits, right, JUDGED_CHARS)
    assert documents(encode(["the cat sat"])) == documents(right(["the cat sat"]))
    with pytest.raises(Disagreement):
        encode(LEARNT)


def test_an_engine_that_leaves_out_a_document_is_found_out(file: Path):
    right = reference_engine(file)
    with pytest.raises(Disagreement):
        checked(lambda texts: right(texts[1:]), right, JUDGED_CHARS, LEARNT)


def test_what_the_fast_engine_cannot_read_is_left_to_the_reference(file: Path, tmp_path: Path):
    tokenizer = load_tokenizer(file)
    tokenizer.normalizer = normalizers.Sequence([normalizers.StripAccents(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert fast_engine(tmp_path / "tokenizer.json") is None


def test_added_tokens_that_texts_may_hold_are_left_to_the_reference(file: Path, tmp_path: Path):
    tokenizer = load_tokenizer(file)
    tokenizer.add_tokens(["catfish"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert fast_engine(tmp_path / "tokenizer.json") is None


def test_a_request_to_stop_is_not_lost_in_what_the_fast_engine_imports(file: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupting:
        """A signal that arrives while awkward is imported."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "awkward":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "awkward", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    fast_engine.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        fast_engine(file)


def test_without_the_extra_the_reference_encodes_and_says_how_to_change_that(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(encoder, "FAST", "no_such_package")
    with caplog.at_level("INFO"):
        fast_engine.cache_clear()
        assert fast_engine(file) is None
    assert "pip install gristmill[fast]" in caplog.text


@pytest.mark.parametrize(("n", "length"), [(700, 1500), (5000, 50), (3, 100_000), (100, 700), (20_000, 1700)])
def test_as_much_is_judged_as_is_said_however_long_the_texts_are(n: int, length: int):
    seen: list[int] = []

    def counted(texts: Sequence[str]) -> Encoded:
        seen.append(sum(map(len, texts)))
        return Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))

    checked(counted, counted, JUDGED_CHARS, ["x " * (length // 2)] * n)
    by_reference, judged, all_of_them = seen
    expected = max(JUDGED_CHARS, n * length // 256)
    assert by_reference == judged
    assert 0.99 * expected <= judged <= expected
    assert all_of_them == n * length
