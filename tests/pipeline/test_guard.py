"""Verdicts on steps. `guard_series.json` holds recorded runs of small language models, with the roughest of 49."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.guard import ENOUGH, Guard, describe

CPU = torch.device("cpu")
Steps = list[tuple[float, float]]
RECORDED: dict[str, Steps] = {
    name: list(zip(run["loss"], run["grad_norm"], strict=True))
    for name, run in json.loads(Path(__file__).with_name("guard_series.json").read_text()).items()
}
USUAL = RECORDED["muon, bf16, 1024 tokens a step"]


def generated(steps: int, seed: int) -> Steps:
    """A loss that falls, a norm that rises and falls with the warm-up; noise wider and heavier-tailed than recorded."""
    rng, at = np.random.default_rng(seed), np.arange(steps)
    loss = 3 + 6 * np.exp(-at / 120) + 0.5 * np.exp(-at / 2000)
    norm = 0.3 + np.minimum(at / 50, 1) * np.exp(-at / 1500)
    losses = loss * np.exp(0.035 * rng.standard_t(12, steps))
    return list(zip(losses.tolist(), (norm * np.exp(0.13 * rng.standard_t(6, steps))).tolist(), strict=True))


def held(guard: Guard, loss: float, norm: float) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def alarms(guard: Guard, steps: Iterable[tuple[float, float]]) -> list[int]:
    return [i for i, (loss, norm) in enumerate(steps) if held(guard, loss, norm)]


def resumed(guard: Guard, sigma: float = 6.0) -> Guard:
    again = Guard(CPU, sigma)
    again.restore(json.loads(json.dumps(guard.state(), allow_nan=False)))
    return again


def after(steps: int) -> Guard:
    guard = Guard(CPU)
    assert not alarms(guard, USUAL[:steps])
    return guard


@pytest.mark.parametrize("name", RECORDED)
def test_no_step_of_a_recorded_run_is_held(name: str):
    assert alarms(Guard(CPU), RECORDED[name]) == []


@pytest.mark.parametrize("seed", range(2))
def test_ten_thousand_clean_steps_with_restarts_give_no_false_alarm(seed: int):
    guard, steps = Guard(CPU), generated(10_000, seed)
    for first in range(0, len(steps), 700):
        guard = resumed(guard)
        assert alarms(guard, steps[first : first + 700]) == []


@pytest.mark.parametrize(("of_loss", "of_norm"), [(1.5, 1), (1, 100), (3, 30)])
def test_a_spike_is_held_at_its_step_and_the_next_step_is_not(of_loss: float, of_norm: float):
    guard = Guard(CPU)
    for i, (loss, norm) in enumerate(USUAL):
        if i >= ENOUGH and i % 5 == 0:
            assert held(resumed(guard), of_loss * loss, of_norm * norm), i
        assert not held(guard, loss, norm), i


def test_a_spike_that_stays_is_held_again_and_again():
    guard = after(200)
    assert alarms(guard, [(9.0, 1.0)] * 3) == [0, 1, 2]
    assert not held(guard, *USUAL[200])


@given(
    st.sampled_from([0, 1, ENOUGH, 150]),
    st.sampled_from([0.0, 6.0]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_what_is_not_finite_is_always_held_and_not_remembered(steps: int, sigma: float, bad: float, in_loss: bool):
    guard = Guard(CPU, sigma)
    alarms(guard, USUAL[:steps])
    before = guard.state()["window"]
    assert held(guard, *((bad, 1.0) if in_loss else (5.0, bad)))
    assert steps == 0 or guard.state()["window"] == before
    assert alarms(guard, USUAL[steps : steps + 200]) == []


def test_a_run_whose_first_step_is_not_finite_is_guarded_once_it_has_settled():
    guard = Guard(CPU)
    assert alarms(guard, [(float("nan"), float("nan")), *USUAL[:300]]) == [0]
    assert held(guard, 9.0, 100.0)


def test_with_sigma_zero_any_finite_step_is_taken():
    assert alarms(Guard(CPU, 0.0), [*USUAL[:200], (1e4, 1e6)]) == []


def test_spikes_are_not_looked_for_before_there_are_enough_steps():
    assert not held(after(ENOUGH - 1), 50.0, 1e4)
    assert held(after(ENOUGH), 50.0, 1e4)


def test_a_fall_is_never_held():
    assert not held(after(200), 0.0, 0.0)


@given(st.integers(0, 300), st.floats(1, 12))
@settings(deadline=None, max_examples=30)
def test_restored_it_goes_on_bit_for_bit(cut: int, sigma: float):
    whole = Guard(CPU, sigma)
    alarms(whole, USUAL[:cut])
    again = resumed(whole, sigma)
    steps = [*USUAL[cut : cut + 40], (9.0, 50.0), *USUAL[cut + 40 : cut + 50]]
    assert alarms(again, steps) == alarms(whole, steps)
    assert again.state() == whole.state()


def test_the_host_never_waits_for_a_verdict():
    """A fake tensor has no value: to ask it for one raises."""
    with FakeTensorMode():
        guard, loss, norm = Guard(CPU), torch.rand(()), torch.rand(())
        for _ in range(2 * ENOUGH):
            verdict = guard.judge(loss, norm)
        with pytest.raises(DataDependentOutputException):
            bool(verdict)
    assert (verdict.shape, verdict.dtype) == ((), torch.bool)


def test_a_verdict_takes_few_kernels():
    class Counting(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.kernels += not func.is_view
            return func(*args, **(kwargs or {}))

    guard, counting = after(200), Counting()
    loss, norm = torch.tensor(5.0), torch.tensor(1.0)
    with counting:
        guard.judge(loss, norm)
    assert counting.kernels <= 15


def test_the_warning_says_what_happened_and_where_to_look():
    assert describe(120, 9.3125, 412.0, np.arange(17, 81)) == (
        "step 120: loss 9.312, gradient norm 412: far above the steps before; weights left as they were; "
        "batch of samples 17, 18, 19, 20, 21, 22, 23, 24, ... (first 8 of 64)"
    )
    assert describe(3, float("nan"), 1.0, [5, 2]) == (
        "step 3: loss nan, gradient norm 1: not finite; weights left as they were; batch of samples 5, 2"
    )
