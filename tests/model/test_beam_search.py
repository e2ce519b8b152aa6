import itertools

import pytest
import torch

from model.beam_search import beam_search
from model.generate import generate
from tests.model.toys import language_model

PROMPTS = [[3], [5, 9, 1, 30, 2], [7, 7], [11, 4, 40]]


def log_probability(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().detach())


def test_one_beam_is_greedy():
    model = language_model()
    assert beam_search(model, PROMPTS, beams=1, max_new_tokens=6) == generate(model, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 2}])
def test_enough_beams_find_the_best_of_all_answers(changes: dict):
    model, length, vocab = language_model(vocab_size=6, scale=3.0, **changes), 3, range(6)
    prompts = [[3], [5, 0, 1, 2], [1, 1]]
    found = beam_search(model, prompts, beams=36, max_new_tokens=length)
    for prompt, answer in zip(prompts, found, strict=True):
        best = max(itertools.product(vocab, repeat=length), key=lambda one: log_probability(model, prompt, list(one)))
        assert answer == list(best)


def test_a_prompt_finds_in_a_batch_what_it_finds_alone():
    model = language_model()
    together = beam_search(model, PROMPTS, beams=4, max_new_tokens=6, eos_id=5)
    assert together == [beam_search(model, [p], beams=4, max_new_tokens=6, eos_id=5)[0] for p in PROMPTS]


def test_nothing_asked_is_nothing_answered_and_what_cannot_be_is_refused():
    model = language_model()
    assert beam_search(model, [], beams=2, max_new_tokens=3) == []
    assert beam_search(model, PROMPTS, beams=2, max_new_tokens=0) == [[]] * 4
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        beam_search(model, [[1], []], beams=2, max_new_tokens=1)
    with pytest.raises(ValueError, match="beams=0"):
        beam_search(model, [[1]], beams=0, max_new_tokens=1)
