"""N-grams beside the network: counted by hand, whatever a document is packed or padded with."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.decoder import Decoder
from model.heads import Classifier
from model.init import initialize
from model.ngrams import FACTOR, NONE, PRIME, Bag, NGrams

TOKENS = st.integers(0, 30) | st.integers(0, 2)
DOCUMENTS = st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=5)


SPELLING = torch.full((31, 3), NONE, dtype=torch.int16)
for token in range(31):  # of none to three bytes
    SPELLING[token, : token % 4] = torch.tensor([65 + token % 5, 32, 66][: token % 4], dtype=torch.int16)


def some(order: int, n_bytes: int = 0) -> NGrams:
    ngrams = NGrams(3, order, 97, SPELLING if n_bytes else None, n_bytes)
    for bag in ngrams.bags:
        torch.nn.init.normal_(bag.table, generator=torch.Generator().manual_seed(len(bag.lengths)))
    return ngrams


def by_hand(bag: Bag, symbols: Sequence[int]) -> torch.Tensor:
    rows: Counter[tuple[int, int]] = Counter()
    for n in bag.lengths:
        for start in range(len(symbols) - n + 1):
            code = n
            for symbol in symbols[start : start + n]:
                code = (code * FACTOR + symbol + 1) % PRIME
            rows[n, code % len(bag.table)] += 1
    if not rows:
        return torch.zeros(3)
    weights = {row: 1 + math.log(count) for row, count in rows.items()}
    summed = torch.stack([weight * bag.table[row] for (_, row), weight in weights.items()]).sum(dim=0)
    return summed / math.sqrt(sum(weights.values()))


@given(DOCUMENTS, st.integers(1, 4), st.sampled_from([0, 2, 5]))
def test_each_document_has_its_own_ngrams_packed_padded_and_alone(documents: list[list[int]], order: int, n_bytes: int):
    ngrams = some(order, n_bytes)
    want = torch.stack([by_hand(ngrams.tokens, document) for document in documents])
    if ngrams.bytes is not None:
        spelt = [SPELLING[document].flatten().tolist() for document in documents]
        read = [[byte for byte in each if byte != NONE] for each in spelt]
        want = want + torch.stack([by_hand(ngrams.bytes, symbols) for symbols in read])
    flat = torch.tensor([[*(token for document in documents for token in document), 7, 7]])
    ids = torch.tensor([[*(i for i, document in enumerate(documents) for _ in document), -1, -1]], dtype=torch.int32)
    longest = max(map(len, documents))
    rows = torch.tensor([document + [9] * (longest - len(document)) for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents])
    row_ids = torch.where(mask != 0, torch.arange(len(documents))[:, None], -1).int()
    alone = torch.cat([ngrams(torch.tensor([document])) for document in documents])
    for got in (ngrams(flat, ids), ngrams(rows, row_ids), ngrams.of_rows(rows, mask), alone):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_blends_the_logits_of_both_parts(multi_label: bool):
    cfg = ModelConfig(vocab_size=31, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=24, seq_len=8)
    plain = Classifier(Decoder(cfg), 3, "mean", multi_label=multi_label)
    initialize(plain, 0)
    torch.nn.init.normal_(plain.head.score.weight)
    both = Classifier(plain.body, 3, "mean", multi_label=multi_label, ngrams=some(2))
    both.head = plain.head
    tokens = torch.randint(0, 31, (2, 8), generator=torch.Generator().manual_seed(1))
    assert both.ngrams is not None
    deep, wide, blend = plain(tokens), both.ngrams(tokens), both.ngrams.blend
    torch.testing.assert_close(both.probabilities(both(tokens)), plain.probabilities(deep + wide))
    with torch.no_grad():
        blend.by.copy_(torch.tensor([[0.7, 0.2], [0.1, 1.5]]))
        blend.share.fill_(1.0)
    share = blend.share.sigmoid()
    parts = [plain.probabilities(by[0] * deep + by[1] * wide) for by in blend.by]
    mixed = both(tokens)
    torch.testing.assert_close(both.probabilities(mixed), share * parts[0] + (1 - share) * parts[1], check_dtype=False)
    with torch.no_grad():
        both.logit_weight.mul_(2)
    torch.testing.assert_close(both(tokens), 2 * mixed)


@pytest.mark.parametrize(("order", "buckets", "n_bytes"), [(0, 5, 0), (2, 0, 0), (2, 5, 1)])
def test_a_table_of_nothing_is_refused(order: int, buckets: int, n_bytes: int):
    with pytest.raises(ValueError, match="there must be n-grams to look up, and rows for them"):
        NGrams(3, order, buckets, SPELLING if n_bytes else None, n_bytes)
