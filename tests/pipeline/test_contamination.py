import numpy as np

from pipeline.contamination import MOST_EXAMPLES, Contamination, Place, Suspects
from pipeline.labelling import Labelling
from pipeline.slices import Slicing
from tests.pipeline.test_overlap import sentence

TEXTS = [sentence(15, seed) for seed in range(20)] + ["too short"]
TARGETS = np.arange(21) % 2


def examined(corpus: list[str] | None, training: list[str], predicted: np.ndarray = TARGETS) -> Contamination:
    slicing = Slicing(Labelling(TARGETS, predicted, 2), np.full(21, 0.9), resamples=100)
    suspects = Suspects(TEXTS, [str(target) for target in TARGETS], slicing)
    place = None if corpus is None else Place(lambda: iter(corpus), len(corpus))
    return suspects.examine(place, Place(lambda: training, len(training)), lambda done, total: None)


def test_each_place_is_reported_by_itself_with_and_without_what_it_holds():
    wrong_where_unseen = np.where(np.arange(21) < 6, TARGETS, 1 - TARGETS)
    found = examined([f"well, {text}" for text in TEXTS[:6]], [TEXTS[3]], wrong_where_unseen)
    assert found.corpus is not None
    assert (found.corpus.n, found.training.n, found.unchecked) == (6, 1, 1)
    assert found.corpus.share == round(6 / 21, 6)
    assert found.corpus.found is not None
    assert found.corpus.clean is not None
    assert (found.corpus.found.accuracy, found.corpus.clean.accuracy) == (1.0, 0.0)
    assert (found.corpus.found.n, found.corpus.clean.n) == (6, 15)
    assert found.training.found is not None
    assert found.training.found.n == 1


def test_a_text_of_few_words_is_found_as_a_whole_and_among_the_training_texts_alone():
    found = examined(["too short"], ["is that too short", "Too  Short", "too short"])
    assert found.corpus is not None
    assert (found.corpus.n, found.training.n, found.unchecked) == (0, 1, 1)
    assert found.training.examples[0].document == 2


def test_examples_say_what_stands_where():
    found = examined(["nothing", f"well, {TEXTS[4]}, yes"], TEXTS[:15])
    assert found.corpus is not None
    [example] = found.corpus.examples
    assert (example.text, example.label, example.coverage, example.document) == (TEXTS[4], "0", 1.0, 2)
    assert example.excerpt == f"well, {TEXTS[4]}, yes"
    assert len(found.training.examples) == MOST_EXAMPLES


def test_where_everything_was_seen_or_nothing_one_side_has_no_scores():
    found = examined(None, TEXTS[:20])
    assert found.corpus is None
    assert found.training.n == 20
    assert found.training.clean is not None
    assert found.training.clean.n == 1, "what is too short to be checked counts as clean"
    clean = examined([], ["nothing"])
    assert clean.training.found is None
    assert clean.training.examples == []
