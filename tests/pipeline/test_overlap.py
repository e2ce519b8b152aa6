import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.overlap import ENOUGH, SHORTEST, N, excerpts, overlap

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "ua", "ei")]


def sentence(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def by_hand(text: str, documents: list[str]) -> float:
    """The same share by sets of tuples of words."""
    words = text.lower().split()
    size = min(N, len(words))
    there = {tuple(d[i : i + size]) for d in (x.lower().split() for x in documents) for i in range(len(d) - size + 1)}
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return sum(gram in there for gram in grams) / len(grams)


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=SHORTEST, max_size=20).map(" ".join), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from("abc"), max_size=40).map(" ".join), max_size=5),
)
def test_the_share_is_that_of_sets_of_word_tuples(texts: list[str], documents: list[str]):
    np.testing.assert_allclose(overlap(texts, documents).coverage, [by_hand(text, documents) for text in texts])


def test_case_and_punctuation_do_not_hide_a_copy():
    text = "The quick brown fox -- it jumps -- over the lazy dog, again & again!"
    seen = overlap([text], ["Once: the QUICK brown fox: it jumps over (the lazy) dog again again. The end."])
    assert seen.coverage.tolist() == [1.0]
    assert seen.source.tolist() == [0]


def test_a_copy_with_one_word_changed_is_found_if_it_is_long_and_a_text_of_its_own_is_not():
    long, other = sentence(100, 1), sentence(100, 2)
    changed = long.replace(long.split()[50], "otherwise", 1)
    seen = overlap([changed, other], [sentence(40, 3), long])
    assert seen.found.tolist() == [True, False]
    assert ENOUGH <= seen.coverage[0] < 1
    assert seen.source.tolist() == [1, -1]


def test_a_short_text_is_found_only_as_a_whole_and_a_tiny_one_is_not_checked():
    texts = ["one two three four five", "one two three four six", "one two three four", "", "?!"]
    seen = overlap(texts, ["zero one two three four five six", "one two", "three four six"])
    assert seen.found.tolist() == [True, False, False, False, False]
    assert seen.checked.tolist() == [True, True, False, False, False]


def test_no_run_of_words_crosses_from_one_document_into_the_next():
    text = sentence(12, 4)
    words = text.split()
    assert overlap([text], [" ".join(words[:6]), " ".join(words[6:])]).coverage.tolist() == [0.0]


def test_the_source_is_the_document_with_most_of_the_text_and_of_equals_the_first():
    text = sentence(40, 5)
    part, whole = " ".join(text.split()[:10]), f"so: {text}"
    assert overlap([text], [part, "nothing", whole, whole]).source.tolist() == [2]
    assert overlap([text], ["nothing", whole, whole]).source.tolist() == [1]


def test_equal_texts_are_found_alike():
    seen = overlap([sentence(9, 6)] * 3, [sentence(9, 6)])
    assert seen.coverage.tolist() == [1.0] * 3


def test_scripts_without_spaces_count_by_the_character_and_marks_belong_to_their_letters():
    chinese = "我们今天在北京的一个小公园里散步"
    assert overlap([chinese], [f"他说{chinese}。"]).found.all()
    assert overlap(["我们今天去吃饭"], ["我们今天"]).coverage.tolist() == [0.0]
    hindi = "यह एक हिंदी वाक्य है जो लंबा है"
    assert overlap([hindi], [hindi]).found.all()
    assert not overlap([hindi], [hindi.replace("हिंदी", "हदी")]).found.any(), "a changed vowel is a changed word"


def test_many_chunks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch):
    texts = [sentence(20, seed) for seed in range(30)]
    documents = [f"{sentence(15, 100 + seed)} {sentence(20, seed)}" for seed in range(0, 30, 2)]
    whole = overlap(texts, documents)
    monkeypatch.setattr("pipeline.overlap.CHUNK_CHARS", 200)
    told: list[int] = []
    pieces = overlap(texts, documents, on_progress=told.append)
    np.testing.assert_array_equal(whole.coverage, pieces.coverage)
    np.testing.assert_array_equal(whole.source, pieces.source)
    assert told[-1] == len(documents)
    assert len(told) > 3


def test_nothing_to_look_for_reads_nothing():
    def never() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    assert not overlap(["too short"], never()).checked.any()
    assert len(overlap([], never()).coverage) == 0


def test_memory_does_not_grow_with_the_documents():
    def peak(n: int) -> int:
        tracemalloc.start()
        overlap([sentence(20, 1)], (sentence(2000, seed) for seed in range(n)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(200)  # tables are made once
    assert peak(800) < 1.3 * peak(200)


def test_an_excerpt_shows_the_place_and_a_document_that_says_it_otherwise_its_beginning():
    text = sentence(12, 7)
    document = f"{sentence(200, 8)} {text.upper()} {sentence(200, 9)}"
    found, other = excerpts([(1, text), (0, text)], ["short", document])
    assert text.upper() in found
    assert found.startswith("…")
    assert other == "short"
