import pytest
import torch

from model.masks import Pattern
from tests.model.toys import ids

CPU = torch.device("cpu")


def pattern(n_queries=4, n_keys=4, batch=1, **rest):
    return Pattern(batch=batch, n_queries=n_queries, n_keys=n_keys, device=CPU, **rest)


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


def test_cached_keys_come_before_the_queries():
    assert rows(pattern(n_queries=2)) == ["1110", "1111"]


@pytest.mark.parametrize("ask", [{}, {"causal": False}, {"sliding_window": 4}, {"n_queries": 1}])
def test_a_pattern_that_kernels_know_draws_no_mask(ask: dict):
    assert pattern(**ask).dense is None


@pytest.mark.parametrize("ask", [{"sliding_window": 3}, {"document_ids": ids([0, 0, 1, 1])}, {"n_queries": 2}])
def test_any_other_pattern_draws_its_mask_and_is_not_called_causal(ask: dict):
    assert pattern(**ask).dense is not None
    assert not pattern(**ask).is_causal


def test_one_query_at_the_end_is_not_masked_as_a_triangle():
    assert not pattern(n_queries=1).is_causal


def test_cu_seqlens_bound_the_runs_of_all_rows():
    p = pattern(batch=2, document_ids=ids([0, 0, 1, 1], [-1, 3, 3, 3]))
    assert [x.tolist() for x in p.cu_seqlens] == [[0, 2, 4, 5, 8], [0, 2, 4, 5, 8]]
    assert p.max_seqlen == (3, 3)


def test_cu_seqlens_of_cached_keys_leave_finished_runs_without_queries():
    p = pattern(n_queries=1, batch=2, document_ids=ids([-1, 0, 0, 0], [0, 0, 1, 1]))
    queries, keys = p.cu_seqlens
    assert (queries.tolist(), keys.tolist()) == ([0, 0, 1, 1, 2], [0, 1, 4, 6, 8])
    assert p.max_seqlen == (1, 3)


def test_cu_seqlens_without_ids_are_the_rows():
    assert [x.tolist() for x in pattern(batch=3, n_queries=2).cu_seqlens] == [[0, 2, 4, 6], [0, 4, 8, 12]]
