import pytest
import torch

from model import decoder as decoder_module
from model import rope
from model.masks import Pattern
from tests.model.toys import ids, language_model, tokens

SHAPES = [{}, {"sliding_window": 3}, {"causal": False}, {"n_kv_heads": 1}]


@pytest.mark.parametrize("changes", SHAPES)
def test_a_document_does_not_notice_its_neighbours(changes: dict):
    model = language_model(**changes)
    mine, packing = tokens(1, 5, seed=1), ids([0] * 4 + [1] * 5 + [2] * 3 + [-1] * 2)

    def packed(neighbours: int) -> torch.Tensor:
        row = torch.cat([tokens(1, 4, seed=neighbours), mine, tokens(1, 5, seed=neighbours + 1)], dim=1)
        return model(row, packing)[:, 4:9]

    torch.testing.assert_close(packed(10), packed(20), atol=0, rtol=0)
    torch.testing.assert_close(packed(10), model(mine), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [(3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("changes", SHAPES)
def test_padding_changes_no_logits(pad: tuple[int, int], changes: dict):
    model, text = language_model(**changes), tokens(2, 6)
    padded = torch.nn.functional.pad(text, pad)
    where = torch.nn.functional.pad(torch.zeros(2, 6, dtype=torch.int32), pad, value=-1)
    logits = model(padded, where)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, pad[0] : pad[0] + 6], model(text), atol=1e-5, rtol=1e-5)


def test_a_causal_body_does_not_see_the_future_and_a_full_one_does():
    a, b = tokens(1, 6), tokens(1, 6)
    b[0, 5] = (a[0, 5] + 1) % 48
    for causal in (True, False):
        model = language_model(causal=causal)
        assert torch.equal(model(a)[:, :5], model(b)[:, :5]) == causal


def test_the_mask_and_the_angles_are_made_once_a_forward(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    draw, turn = Pattern.allowed.func, rope.rotation
    monkeypatch.setattr(Pattern.allowed, "func", lambda self: made.append("mask") or draw(self))
    monkeypatch.setattr(decoder_module.rope, "rotation", lambda *args: made.append("angles") or turn(*args))
    language_model(n_layers=3)(tokens(1, 4), ids([0, 0, 1, 1]))
    assert sorted(made) == ["angles", "mask"]


def test_the_forward_pass_never_reads_values_back_from_the_device():
    """On the meta device there are no values, so any wait for one raises."""
    model = language_model(dropout=0.1).to("meta")
    row, keys = torch.zeros(2, 8, dtype=torch.int64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert model(row, row.int(), dropout_keys=keys).shape == (2, 8, 48)


@pytest.mark.parametrize("name", ["reference", "sdpa", "auto"])
def test_bfloat16_autocast_stays_near_float32(name: str):
    model, text = language_model(attention=name, scale=1.0), tokens(2, 8)
    packing = ids([0] * 3 + [1] * 5, [0] * 6 + [-1] * 2)
    exact = model(text, packing)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(text, packing)
    torch.testing.assert_close(rough.float(), exact, atol=2e-2, rtol=2e-2)
    assert rough.dtype == torch.bfloat16


def test_the_whole_model_runs_in_float64():
    assert language_model().double()(tokens(1, 4), ids([0, 0, 1, 1])).dtype == torch.float64
