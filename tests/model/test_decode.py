import pytest
import torch

from model.decode import Decoding, freeze
from tests.model.toys import language_model, tokens


@pytest.mark.parametrize("splits", [[9], [4, 5], [1] * 9, [3, 1, 2, 1, 2]])
@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 3}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"tie_embeddings": False}]
)
def test_reading_in_parts_gives_the_logits_of_reading_at_once(splits: list[int], changes: dict):
    model, text = language_model(**changes).double(), tokens(2, 9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that scale by other than 1
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(parameter)))
    decoding = Decoding(freeze(model), rows=2, room=9)
    parts = [decoding.read(part, last=part.shape[1]) for part in text.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), atol=1e-12, rtol=1e-12)


def test_branches_of_a_tree_are_read_as_if_each_were_alone():
    model, text, branches = language_model().double(), tokens(1, 4), torch.tensor([[7, 9, 30]])
    decoding = Decoding(freeze(model), rows=1, room=7)
    decoding.read(text)
    unseen = torch.cat([torch.zeros(3, 4, dtype=torch.bool), ~torch.eye(3, dtype=torch.bool)], dim=1)
    together = decoding.read(branches, slice(4, 5), unseen[None, None, None], last=3)[0]
    for branch, logits in zip(branches[0], together, strict=True):
        alone = model(torch.cat([text, branch.view(1, 1)], dim=1))[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-12, rtol=1e-12)


def test_other_dtypes_come_close():
    model, text = language_model(scale=1.0), tokens(2, 5)
    half = Decoding(freeze(model, torch.bfloat16), rows=2, room=5).read(text)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[:, 0].float(), model(text)[:, -1], atol=0.02, rtol=0.05)


def test_what_does_not_fit_or_reads_both_ways_is_refused():
    decoding = Decoding(freeze(language_model()), rows=1, room=4)
    decoding.read(tokens(1, 3))
    with pytest.raises(ValueError, match="room=4 is too small for 3 tokens that are kept and 2 more"):
        decoding.read(tokens(1, 2))
    with pytest.raises(ValueError, match="causal=False"):
        freeze(language_model(causal=False))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.int8, 0.05)])
def test_rounded_weights_give_nearly_the_same_logits(dtype: torch.dtype, error: float):
    model, text = language_model(d_model=64, d_ff=96, n_heads=4, n_kv_heads=2, vocab_size=96), tokens(3, 9)
    exact, near = (Decoding(freeze(model, of), rows=3, room=9).read(text, last=9).float() for of in (None, dtype))
    assert (near - exact).norm() < error * exact.norm()


def test_int8_holds_a_quarter_of_the_matrices():
    matrix = freeze(language_model(d_model=64), torch.int8).layers[0].down
    assert matrix.weight.dtype == torch.int8
