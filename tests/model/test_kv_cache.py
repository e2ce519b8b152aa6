import pytest
import torch

from model.kv_cache import KVCache
from tests.model.toys import ids, language_model, tokens


@pytest.mark.parametrize("splits", [[7], [4, 3], [1] * 7, [3, 1, 2, 1]])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}])
@pytest.mark.parametrize("packing", [None, ids([0] * 7, [-1] * 2 + [0] * 5), ids([0, 0, 0, 1, 1, 1, 1], [0] * 7)])
def test_reading_in_parts_with_a_cache_equals_reading_at_once(splits: list[int], changes: dict, packing):
    model, text, cache = language_model(**changes), tokens(2, 7), KVCache(2, 8)
    packs = [None] * len(splits) if packing is None else packing.split(splits, dim=1)
    parts = [model(part, pack, cache=cache) for part, pack in zip(text.split(splits, dim=1), packs, strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text, packing), atol=1e-5, rtol=1e-5)
    assert cache.length == 7


def test_a_full_cache_names_its_size():
    model, cache = language_model(), KVCache(2, 4)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="max_len=4 is too small for 3 cached and 2 new"):
        model(tokens(1, 2), cache=cache)


def test_document_ids_come_always_or_never():
    model, cache = language_model(), KVCache(2, 4)
    model(tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="on every call"):
        model(tokens(1, 1), ids([0]), cache=cache)


def test_a_bidirectional_body_refuses_a_cache():
    with pytest.raises(ValueError, match="causal=False cannot use a cache"):
        language_model(causal=False)(tokens(1, 2), cache=KVCache(2, 4))
