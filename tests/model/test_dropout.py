import pytest
import torch

from model.dropout import drop
from tests.model.toys import language_model, tokens

KEYS = torch.tensor([7, 2**62, -3, 0])


def test_no_keys_or_no_probability_is_the_identity():
    x = torch.randn(4, 3, 5)
    assert drop(x, 0.5, None, 0) is x
    assert drop(x, 0.0, KEYS, 0) is x


def test_the_mask_does_not_depend_on_how_rows_are_split():
    x = torch.ones(4, 16, 32)
    whole = drop(x, 0.3, KEYS, 5)
    split = torch.cat([drop(x[i : i + 1], 0.3, KEYS[i : i + 1], 5) for i in (3, 1, 0, 2)])
    assert torch.equal(whole[[3, 1, 0, 2]], split)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_dropped_is_p_and_the_mean_is_kept(p: float):
    y = drop(torch.ones(4, 256, 256), p, KEYS, 1)
    n = y.numel()
    assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y.max().item(), 1 / (1 - p))


def test_rows_sites_positions_and_channels_have_unrelated_masks():
    def mask(key: int, site: int) -> torch.Tensor:
        return (drop(torch.ones(1, 128, 128), 0.5, torch.tensor([key]), site)[0] > 0).double() - 0.5

    a = mask(1, 0)
    others = [mask(2, 0), mask(1, 1), a.roll(1, 0), a.roll(1, 1), a.T]
    for b in others:
        assert abs((a * b).mean().item() * 4) < 5 / 128


def test_a_training_forward_is_reproducible_and_differs_from_inference():
    model, text, keys = language_model(dropout=0.2), tokens(2, 6), KEYS[:2]
    once = model(text, dropout_keys=keys)
    assert torch.equal(once, model(text, dropout_keys=keys))
    assert not torch.allclose(once, model(text))
    torch.testing.assert_close(once[1:], model(text[1:], dropout_keys=keys[1:]), atol=1e-5, rtol=1e-5)
