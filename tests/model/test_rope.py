import pytest
import torch

from model.rope import rotate, rotation
from tests.model.toys import ids, language_model, tokens


def heads(seed: int, seq: int = 6) -> torch.Tensor:
    return torch.randn(1, seq, 2, 8, generator=torch.Generator().manual_seed(seed))


def test_rotation_keeps_the_norm():
    x = heads(0)
    torch.testing.assert_close(rotate(x, rotation(torch.arange(6)[None], 8, 1e4)).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shift", [1, 100, 5000])
def test_scores_depend_on_the_distance_alone(shift: int):
    def scores(start: int) -> torch.Tensor:
        by = rotation(torch.arange(start, start + 6)[None], 8, 1e4)
        return torch.einsum("bqhd,bkhd->bhqk", rotate(heads(0), by), rotate(heads(1), by))

    torch.testing.assert_close(scores(shift), scores(0), atol=5e-3, rtol=1e-3)


def test_position_zero_is_not_turned():
    assert torch.equal(rotate(heads(0, 1), rotation(torch.zeros(1, 1, dtype=torch.int64), 8, 1e4)), heads(0, 1))


def test_angles_are_float32_even_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        by = rotation(torch.tensor([[257, 258]]), 8, 1e4)
        assert rotate(heads(0, 2).bfloat16(), by).dtype == torch.bfloat16
    assert by.cos.dtype == torch.float32
    assert by.cos[0, 0, 0, 0] != by.cos[0, 1, 0, 0]


def test_positions_restart_with_every_document():
    model, text = language_model(), tokens(1, 5)
    twice = model(torch.cat([text, text], dim=1), ids([0] * 5 + [1] * 5))
    torch.testing.assert_close(twice[:, :5], twice[:, 5:])
