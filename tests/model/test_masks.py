import pytest
import torch

from model.masks import Pattern
from tests.model.toys import ids

CPU = torch.device("cpu")


def pattern(seq=4, batch=1, **rest):
    return Pattern(batch=batch, seq=seq, device=CPU, **rest)


def rows(p: Pattern) -> list[str]:
    return ["".join(map(str, row)) for row in p.allowed.int()[:, 0].flatten(0, 1).tolist()]


def test_causal_is_a_triangle():
    assert rows(pattern()) == ["1000", "1100", "1110", "1111"]


def test_a_window_counts_the_token_itself():
    assert rows(pattern(sliding_window=2)) == ["1000", "1100", "0110", "0011"]
    assert rows(pattern(sliding_window=2, causal=False)) == ["1100", "1110", "0111", "0011"]


def test_documents_and_stretches_of_padding_are_blocks():
    p = pattern(batch=2, document_ids=ids([0, 0, 1, -1], [-1, 3, 3, -1]))
    assert rows(p) == ["1000", "1100", "0010", "0001", "1000", "0100", "0110", "0001"]


@pytest.mark.parametrize("ask", [{}, {"causal": False}, {"sliding_window": 4}])
def test_a_pattern_that_kernels_know_draws_no_mask(ask: dict):
    assert pattern(**ask).dense is None


@pytest.mark.parametrize("ask", [{"sliding_window": 3}, {"document_ids": ids([0, 0, 1, 1])}])
def test_any_other_pattern_draws_its_mask_and_is_not_called_causal(ask: dict):
    assert pattern(**ask).dense is not None
    assert not pattern(**ask).is_causal


def test_cu_seqlens_bound_the_runs_of_all_rows():
    p = pattern(batch=2, document_ids=ids([0, 0, 1, 1], [-1, 3, 3, 3]))
    assert p.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert p.max_seqlen == 3


def test_cu_seqlens_without_ids_are_the_rows():
    assert pattern(batch=3).cu_seqlens.tolist() == [0, 4, 8, 12]
