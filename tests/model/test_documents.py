from model import documents
from tests.model.toys import ids

ROWS = ids([-1, 4, 4, 4, 2, -1], [0, 0, 1, 0, 0, 0])


def test_a_document_is_a_run_of_equal_ids():
    assert documents.runs(ROWS).tolist() == [[1, 2, 2, 2, 3, 4], [1, 1, 2, 3, 3, 3]]


def test_positions_count_from_the_first_token_of_each_document():
    assert documents.positions(ROWS).tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 0, 0, 1, 2]]


def test_every_run_has_one_start_and_one_end():
    assert documents.starts(ROWS).int().tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0]]
    assert documents.ends(ROWS).int().tolist() == [[1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]]
