import pytest
import torch

from model.decoding import chain
from model.generate import generate
from tests.model.toys import language_model

PROMPTS = [[3], [5, 9, 1, 30, 2], [7, 7], [11, 4, 40]]
SAMPLED = chain({"temperature": 1.5, "top_k": 20, "top_p": 0.95})


def by_hand(model, prompt: list[int], n: int) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}])
def test_the_default_is_greedy_and_a_batch_equals_each_prompt_read_without_a_cache(changes: dict):
    model = language_model(**changes)
    assert generate(model, PROMPTS, max_new_tokens=6) == [by_hand(model, prompt, 6) for prompt in PROMPTS]


def test_a_sample_depends_on_its_own_seed_and_prompt_alone():
    model = language_model(scale=2.0)
    together = generate(model, PROMPTS, max_new_tokens=6, transforms=SAMPLED, seed=10)
    alone = [generate(model, [p], max_new_tokens=6, transforms=SAMPLED, seed=10 + i)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert together == generate(model, PROMPTS, max_new_tokens=6, transforms=SAMPLED, seed=[10, 11, 12, 13])
    assert together != generate(model, PROMPTS, max_new_tokens=6, transforms=SAMPLED, seed=99)


def test_samples_follow_the_distribution():
    model, n = language_model(scale=2.0), 4000
    drawn = torch.tensor(generate(model, [[5, 6]] * n, max_new_tokens=1, transforms=())).flatten()
    expected = model(torch.tensor([[5, 6]]))[0, -1].softmax(0).double() * n
    chi_squared = ((drawn.bincount(minlength=48) - expected) ** 2 / expected).sum()
    assert chi_squared < 47 + 5 * (2 * 47) ** 0.5


def test_an_answer_ends_before_eos_and_the_others_go_on():
    model = language_model()
    free = generate(model, PROMPTS, max_new_tokens=6)
    eos = free[1][2]
    stopped = generate(model, PROMPTS, max_new_tokens=6, eos_id=eos)
    assert stopped == [answer[: answer.index(eos)] if eos in answer else answer for answer in free]


def test_generation_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(language_model(), PROMPTS, max_new_tokens=3)
    assert [len(answer) for answer in answers] == [3] * 4


def test_nothing_asked_is_nothing_answered():
    assert generate(language_model(), [], max_new_tokens=3) == []
    assert generate(language_model(), PROMPTS, max_new_tokens=0) == [[]] * 4


def test_an_empty_prompt_and_missing_seeds_are_refused():
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        generate(language_model(), [[1], []], max_new_tokens=1)
    with pytest.raises(ValueError, match="seed has 1 entries for 2 prompts"):
        generate(language_model(), [[1], [2]], max_new_tokens=1, seed=[0])
