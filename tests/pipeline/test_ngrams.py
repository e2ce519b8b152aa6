"""N-grams learn what only the texts of a class have."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ngrams import NGrams
from pipeline import ngrams as learning
from pipeline.ngrams import features, fill, learned_table
from pipeline.stages.ngrams import NGramsConfig, Read

SPELLING = torch.arange(51 * 3, dtype=torch.int16).reshape(51, 3) % 7


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 8))
def test_what_is_learned_from_is_what_is_read_in_use(documents: list[list[int]], at_once: int):
    ngrams = NGrams(2, order=3, buckets=64, spelling=SPELLING, n_bytes=4)
    learned = np.random.default_rng(0).normal(size=(128, 2)).astype(np.float32)
    fill(ngrams, learned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "TOKENS_AT_ONCE", at_once)  # in pieces, too
        rows = features(ngrams, [np.array(document) for document in documents])
    used = torch.cat([ngrams(torch.tensor([document])) for document in documents]).detach()
    np.testing.assert_allclose(rows @ learned, used, atol=1e-5)


def test_a_class_is_learned_by_what_only_its_texts_have_and_an_absent_one_adds_nothing():
    ngrams = NGrams(3, order=2, buckets=997)
    documents = [np.array([1, 2, 3 + label, 5]) for label in (0, 1) for _ in range(9)]
    targets = np.repeat([0, 2], 9)
    table = learned_table(features(ngrams, documents), targets, 3, strength=1.0)
    said = features(ngrams, documents) @ table
    assert (said.argmax(axis=1) == targets).all()
    assert not table[:, 1].any()
    assert np.array_equal(table, learned_table(features(ngrams, documents), targets, 3, strength=1.0))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(40, 200))
def test_of_too_many_texts_some_are_left_out_evenly(lengths: list[int], most: int):
    read = Read([[np.zeros(length)] for length in lengths], np.arange(len(lengths)))
    fewer = read.thinned(most)
    gaps = np.diff(fewer.targets)
    assert not gaps.size or gaps.max() - gaps.min() <= 1
    assert [len(text[0]) for text in fewer.texts] == [lengths[i] for i in fewer.targets]
    share = min(1, most / sum(lengths))
    assert share * len(lengths) - 1 < len(fewer.texts) <= max(1, share * len(lengths))


def test_ngrams_of_one_byte_are_refused():
    with pytest.raises(ValueError, match="bytes=1 must be 0, or 2 or more"):
        NGramsConfig(bytes=1)
