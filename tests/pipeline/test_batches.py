from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import IGNORE
from model.objectives import Masking, masked, masked_next_token, next_token
from pipeline import batches
from pipeline.batches import LabelledSampling, LanguageSampling, fill_rows, pack, permute, sample_ids
from pipeline.errors import UsageError


class ToyStream:
    """Documents of given lengths, each token telling its document and place."""

    def __init__(self, lengths: list[int]) -> None:
        self.n_tokens = sum(lengths)
        self._documents = np.repeat(np.arange(len(lengths)), lengths)

    def rows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        index = starts[:, None] + np.arange(length)
        return index.astype(np.int64), self._documents[index]


def sampling(**changes: object) -> LanguageSampling:
    fields = {
        "stream": ToyStream([5, 9, 3, 12, 7, 30, 1, 14]),
        "seq_len": 8,
        "rows_per_step": 4,
        "micro_batch_size": 4,
        "seed": 1,
        "examples": partial(next_token.examples, masking=Masking(rate=0.5, mask_id=900, special=())),
    }
    return LanguageSampling(**(fields | changes))


@settings(max_examples=50)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int):
    assert sorted(permute(np.arange(size, dtype=np.int64), size, key)) == list(range(size))


def test_permute_mixes_and_depends_on_its_key():
    index = np.arange(1000, dtype=np.int64)
    first, second = permute(index, 1000, 1), permute(index, 1000, 2)
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(index, first)[0, 1]) < 0.1
    assert permute(index[500:510], 1000, 1).tolist() == first[500:510].tolist()


@settings(max_examples=50)
@given(size=st.integers(1, 60), per_step=st.integers(1, 17), seed=st.integers(0, 2**32))
def test_every_sample_comes_once_an_epoch(size: int, per_step: int, seed: int):
    steps = -(-3 * size // per_step)
    ids = np.concatenate([sample_ids(step, per_step, size, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=30)
@given(step=st.integers(0, 50), micro=st.integers(1, 6), world=st.integers(1, 4))
def test_workers_and_micro_batches_only_cut_the_same_rows(step: int, micro: int, world: int):
    whole = sampling(dropout=True).step(step)
    cut = [sampling(dropout=True, micro_batch_size=micro).step(step, rank=r, world_size=world) for r in range(world)]
    assert {part.targets for part in cut} == {whole.targets}
    assert len({len(part.micro_batches) for part in cut}) == 1  # no rank may wait for another in vain
    assert sorted(i for part in cut for i in part.own_ids) == sorted(whole.sample_ids)
    for part in cut:
        assert part.sample_ids.tolist() == whole.sample_ids.tolist()
        assert all(len(batch.tokens) <= micro for batch in part.micro_batches)

    def rows(parts: list) -> set:
        return {
            (tuple(t.tolist()), tuple(y.tolist()), tuple(d.tolist()), int(k))
            for part in parts
            for b in part.micro_batches
            for t, y, d, k in zip(b.tokens, b.targets, b.document_ids, b.dropout_keys, strict=True)
            if (y != IGNORE).any()  # what keeps a rank without rows busy counts for nothing
        }

    assert rows(cut) == rows([whole])


def test_a_step_depends_on_nothing_that_came_before():
    again = sampling()
    later = again.step(7)
    assert torch.equal(later.micro_batches[0].tokens, sampling().step(7).micro_batches[0].tokens)
    assert not np.array_equal(sampling(seed=2).step(7).sample_ids, later.sample_ids)


def test_no_target_crosses_a_document():
    for step in range(10):
        for batch in sampling().step(step).micro_batches:
            counted = batch.targets != IGNORE
            assert torch.equal(batch.targets[counted], batch.tokens[counted] + 1)  # toy tokens count upwards
            ends = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
            assert (batch.targets[:, :-1][ends] == IGNORE).all()


def test_targets_are_counted_over_the_whole_step():
    step = sampling(micro_batch_size=1).step(3)
    assert step.targets == sum(int((b.targets != IGNORE).sum()) for b in step.micro_batches)


def test_too_short_a_text_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match="shorter row"):
        sampling(stream=ToyStream([5]))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_keeps_every_item_once_and_never_overflows(lengths: list[int]):
    rows = pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    half_empty = [row for row in rows if sum(lengths[i] for i in row) <= 10]
    assert len(half_empty) <= 1  # first fit never leaves two rows half empty


def test_rows_are_filled_in_order_and_padded_with_minus_one():
    tokens, documents = fill_rows([[np.array([5, 6]), np.array([7])], [np.array([8])]], pad_id=2)
    assert tokens.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert documents.tolist() == [[0, 0, 1], [0, -1, -1]]


def labelled(n: int, **changes: object) -> LabelledSampling:
    rng = np.random.default_rng(0)
    documents = [np.full(rng.integers(1, 9), i, dtype=np.int32) for i in range(n)]
    fields = {
        "documents": documents,
        "targets": np.arange(n, dtype=np.int64),
        "seq_len": 12,
        "documents_per_step": 5,
        "micro_batch_size": 2,
        "seed": 3,
    }
    return LabelledSampling(**(fields | changes))


@settings(max_examples=30)
@given(n=st.integers(1, 40), micro=st.integers(1, 5), world=st.integers(1, 3))
def test_labels_stay_with_their_documents(n: int, micro: int, world: int):
    source = labelled(n, micro_batch_size=micro)
    seen = []
    for step in range(source.steps_per_epoch):
        for rank in range(world):
            for batch in source.step(step, rank=rank, world_size=world).micro_batches:
                changes = torch.ones_like(batch.document_ids, dtype=torch.bool)
                changes[:, 1:] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
                firsts = batch.tokens[changes & (batch.document_ids >= 0)]
                if batch.targets.tolist() == [IGNORE]:  # a rank without rows keeps the others company
                    continue
                assert firsts.tolist() == batch.targets.tolist()  # toy documents repeat their own label
                seen += batch.targets.tolist()
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize(("longest", "room"), [(20, 128), (300, 300), (400, 400)])
def test_rows_have_room_for_the_longest_document_of_their_step_and_for_many_short_ones(longest: int, room: int):
    documents = [np.zeros(length, dtype=np.int64) for length in [longest, *[10] * 199]]
    sampling = labelled(200, documents=documents, seq_len=400, documents_per_step=200, micro_batch_size=200)
    (batch,) = sampling.step(0).micro_batches
    assert room - 10 < batch.tokens.shape[1] <= room


@settings(max_examples=30)
@given(n=st.integers(1, 40), micro=st.integers(1, 5), world=st.integers(1, 3))
def test_weights_stay_with_their_documents(n: int, micro: int, world: int):
    source = labelled(n, micro_batch_size=micro, weights=np.arange(n, dtype=np.float32) / 4)
    for step in range(source.steps_per_epoch):
        parts = [source.step(step, rank=rank, world_size=world) for rank in range(world)]
        for batch in (batch for part in parts for batch in part.micro_batches):
            if batch.targets.tolist() != [IGNORE]:
                assert batch.weights is not None
                assert batch.weights.tolist() == (batch.targets / 4).tolist()  # a toy document's target is its number


@settings(max_examples=20)
@given(n=st.integers(1, 12), world=st.integers(1, 4))
def test_several_labels_a_document_stay_with_it_and_a_spare_rank_asks_for_none(n: int, world: int):
    targets = (np.arange(n)[:, None] >> np.arange(4)) & 1  # the number of the document, in bits
    source, seen = labelled(n, targets=targets), []
    for step in range(source.steps_per_epoch):
        for rank in range(world):
            for batch in source.step(step, rank=rank, world_size=world).micro_batches:
                assert batch.targets.shape[1:] == (4,)
                if (batch.targets != IGNORE).all():
                    seen += (batch.targets.numpy() @ (1 << np.arange(4))).tolist()
                else:
                    assert (batch.targets == IGNORE).all()
    assert sorted(seen) == list(range(n))


def test_dropout_keys_differ_by_row_and_step():
    keys = np.concatenate([batches.row_keys(0, step, 8) for step in range(8)])
    assert len(set(keys.tolist())) == 64


@pytest.mark.parametrize("objective", [masked, masked_next_token])
def test_what_a_step_hides_is_new_every_step_and_the_same_on_any_number_of_ranks(objective: object):
    masking = Masking(rate=0.3, mask_id=900, special=())
    source = sampling(examples=partial(objective.examples, masking=masking), rows_per_step=9)
    whole = source.step(2)
    parts = [source.step(2, rank=rank, world_size=3) for rank in range(3)]
    asked = sum(int((batch.targets != IGNORE).sum()) for batch in whole.micro_batches)
    assert {part.targets for part in parts} == {whole.targets} == {asked}
    rows = [tuple(row.tolist()) for part in parts for b in part.micro_batches for row in b.tokens]
    assert sorted(rows) == sorted(tuple(row.tolist()) for b in whole.micro_batches for row in b.tokens)
    again = source.step(2 + source.n_rows)  # the same samples, an epoch or so later
    assert [b.tokens.tolist() for b in again.micro_batches] != [b.tokens.tolist() for b in whole.micro_batches]
