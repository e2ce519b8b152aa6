"""The multi-label objective: each label's binary cross-entropy, and what smoothing, weights and R-Drop make of it."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from model.batch import IGNORE, Batch
from model.heads import Classifier, swap_head
from model.objectives import multi_label
from tests.model.toys import ids, language_model, tokens

PACKING = ids([0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 1, 1, 2, 2])
TARGETS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [IGNORE] * 3, [1, 1, 1]])
COUNTED = [0, 1, 2, 4]


def batch(targets: torch.Tensor = TARGETS, keys: torch.Tensor | None = None) -> Batch:
    return Batch(tokens(2, 8), targets, PACKING, keys)


def classifier(**changes) -> Classifier:
    return swap_head(language_model(**changes), 3, "last", seed=0, multi_label=True)


def logits_of(model: Classifier) -> torch.Tensor:
    return model(batch().tokens, PACKING)[COUNTED]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_over_labels_of_binary_cross_entropies_smoothed_towards_one_half(smoothing: float):
    model, wanted = classifier(), TARGETS[COUNTED] * (1 - smoothing) + smoothing / 2
    want = binary_cross_entropy_with_logits(logits_of(model), wanted, reduction="sum") / 3
    found = multi_label.loss(model, batch(), label_smoothing=smoothing)
    torch.testing.assert_close(found.sum, want)
    assert found.count == 4


def test_weights_multiply_the_loss_of_labels_that_are_there():
    model, weights = classifier(), torch.tensor([1.0, 4.0, 9.0])
    each = binary_cross_entropy_with_logits(logits_of(model), TARGETS[COUNTED].float(), reduction="none")
    want = (each * torch.where(TARGETS[COUNTED] == 1, weights, 1.0)).sum() / 3
    torch.testing.assert_close(multi_label.loss(model, batch(), class_weights=weights).sum, want)


def test_a_batch_that_asks_nothing_has_no_loss_and_no_gradient():
    model = classifier()
    nothing = multi_label.loss(model, batch(torch.full((5, 3), IGNORE)))
    nothing.sum.backward()
    assert (float(nothing.sum.detach()), int(nothing.count)) == (0.0, 0)
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_r_drop_adds_how_far_two_readings_are_apart():
    still, noisy, keys = classifier(), classifier(dropout=0.3), torch.tensor([1, 2])
    plain = multi_label.loss(still, batch()).sum
    torch.testing.assert_close(multi_label.loss(still, batch(keys=keys), r_drop=5.0).sum, plain)  # nothing differs
    twice = multi_label.loss(noisy, batch(keys=keys), r_drop=1e-9).sum
    assert multi_label.loss(noisy, batch(keys=keys), r_drop=1.0).sum > twice


def test_the_divergence_is_that_of_kullback_and_leibler_both_ways_of_each_label():
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.5]])
    p, q = ((x.sigmoid(), 1 - x.sigmoid()) for x in (one, other))
    want = sum(((a - b) * (a / b).log()).sum() for a, b in zip(p, q, strict=True)) / 2
    torch.testing.assert_close(multi_label.divergence(one, other), want)
    assert multi_label.divergence(one, one) == 0


def test_targets_of_other_documents_or_labels_are_refused():
    for shape in ((4, 3), (5, 2)):
        with pytest.raises(ValueError, match="but the rows hold 5 documents"):
            multi_label.loss(classifier(), batch(torch.zeros(shape, dtype=torch.int64)))


def test_probabilities_are_sigmoids_that_keep_their_logit_near_one():
    logits = torch.tensor([[0.0, 25.0, -25.0]])
    found = classifier().probabilities(logits)
    torch.testing.assert_close(torch.logit(found).float(), logits, atol=1e-3, rtol=0)
    alike = swap_head(language_model(), 3, "last", seed=0).probabilities(logits)
    torch.testing.assert_close(alike, logits.softmax(-1))
