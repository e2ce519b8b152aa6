"""Every module in `model/decoding/` is tested by being there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model import variants
from model.decoding import chain, greedy, temperature, top_k, top_p

VALUES = {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "greedy": 1}
"""Of a rule that is not here, 1."""
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12).map(lambda row: torch.tensor([row]))


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("name", variants.names("model.decoding"))
@settings(max_examples=25)
@given(logits=LOGITS)
def test_a_rule_is_pure_keeps_the_shape_and_never_rules_out_the_likeliest(name: str, logits: torch.Tensor):
    before = logits.clone()
    (transform,) = chain({name: VALUES.get(name, 1)})
    after = transform(logits)
    assert torch.equal(logits, before)
    assert after.shape == logits.shape
    assert after.argmax() == logits.argmax()


@settings(max_examples=50)
@given(logits=LOGITS, k=st.integers(1, 15))
def test_top_k_keeps_the_k_largest_and_ties(logits: torch.Tensor, k: int):
    smallest = logits[0].sort(descending=True).values[min(k, logits.shape[1]) - 1]
    assert kept(top_k.transform(logits, k)) == set((logits[0] >= smallest).nonzero().flatten().tolist())
    assert torch.equal(top_k.transform(logits, k), TopKLogitsWarper(k)(None, logits))


@settings(max_examples=50)
@given(logits=LOGITS, p=st.floats(0.01, 1.0))
def test_top_p_keeps_a_smallest_set_that_reaches_p(logits: torch.Tensor, p: float):
    probability = logits[0].double().softmax(0)
    chosen = sorted(probability[i].item() for i in kept(top_p.transform(logits, p)))
    assert sum(chosen) >= p - 1e-5
    assert sum(chosen[1:]) < p + 1e-5


def test_top_p_and_temperature_agree_with_transformers():
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_p.transform(logits, 0.7), TopPLogitsWarper(0.7)(None, logits))
    assert torch.equal(temperature.transform(logits, 0.7), TemperatureLogitsWarper(0.7)(None, logits))


@settings(max_examples=25)
@given(logits=LOGITS, t=st.floats(0.1, 10))
def test_temperature_scales_log_odds(logits: torch.Tensor, t: float):
    odds = temperature.transform(logits, t).diff()
    torch.testing.assert_close(odds * t, logits.diff(), atol=1e-4, rtol=1e-4)


def test_greedy_keeps_one_token_even_among_ties():
    assert kept(greedy.transform(torch.tensor([[1.0, 3.0, 3.0]]))) == {1}
    assert kept(greedy.transform(torch.tensor([[1.0, 3.0, 3.0]]), False)) == {0, 1, 2}


def test_rules_apply_in_the_stated_order_whatever_the_order_given():
    names = ["top_p", "greedy", "temperature", "top_k"]
    transforms = chain({name: VALUES[name] for name in names})
    assert [transform.func for transform in transforms] == [
        module.transform for module in (temperature, top_k, top_p, greedy)
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "temperature=0.0 must be > 0"),
        ("top_k", 0, "top_k=0 must be a whole number >= 1"),
        ("top_p", 0.0, "top_p=0.0 must be > 0 and <= 1"),
        ("top_p", 1.1, "top_p=1.1 must be > 0 and <= 1"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: int | float, message: str):
    with pytest.raises(ValueError, match=message):
        chain({name: value})[0](torch.zeros(1, 4))


def test_an_unknown_rule_lists_the_choices():
    with pytest.raises(ValueError, match="choose one of greedy"):
        chain({"beam": 4})
