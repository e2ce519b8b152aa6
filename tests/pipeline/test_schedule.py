from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedule import ScheduleConfig, lr_scale

NAMES = ["cosine", "wsd", "linear", "constant"]
FALLING = [name for name in NAMES if name != "constant"]
fractions = st.floats(0, 1, allow_nan=False)
configs = st.builds(
    ScheduleConfig,
    name=st.sampled_from(NAMES),
    warmup=st.floats(0, 1, exclude_max=True),
    decay=st.just(0.0) | st.floats(1e-3, 1),
    floor=fractions,
)


def course(steps: int, config: ScheduleConfig) -> list[float]:
    return [lr_scale(step, steps, config) for step in range(steps)]


@given(configs, st.integers(1, 300))
def test_every_factor_lies_between_zero_and_one(config: ScheduleConfig, steps: int) -> None:
    assert all(0 <= scale <= 1 for scale in course(steps, config))


@given(configs, st.integers(2, 300))
def test_only_the_last_step_may_stand_still(config: ScheduleConfig, steps: int) -> None:
    assert all(scale > 0 for scale in course(steps, config)[:-1])


@given(configs, st.integers(1, 300))
def test_a_falling_schedule_ends_at_its_floor(config: ScheduleConfig, steps: int) -> None:
    falls = config.name != "constant" and not (config.name == "wsd" and config.decay == 0)
    assert lr_scale(steps - 1, steps, config) == pytest.approx(config.floor if falls else 1.0)


@given(configs, st.integers(1, 300))
def test_it_rises_and_then_never_rises_again(config: ScheduleConfig, steps: int) -> None:
    scales = course(steps, config)
    top = scales.index(max(scales))
    assert scales[: top + 1] == sorted(scales[: top + 1])
    assert all(a >= b - 1e-12 for a, b in pairwise(scales[top:]))


@pytest.mark.parametrize("name", NAMES)
def test_finer_steps_make_smaller_jumps(name: str) -> None:
    config = ScheduleConfig(name=name, warmup=0.1, decay=0.4, floor=0.05)
    scales = course(100_000, config)
    assert max(abs(a - b) for a, b in pairwise(scales)) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_reached_when_the_warm_up_ends(name: str) -> None:
    config = ScheduleConfig(name=name, warmup=0.1)
    assert course(100, config)[:10] == pytest.approx([i / 10 for i in range(1, 11)])


@pytest.mark.parametrize("name", FALLING)
def test_a_schedule_has_the_value_of_its_formula_halfway_down(name: str) -> None:
    config = ScheduleConfig(name=name, warmup=0, decay=1, floor=0)
    assert lr_scale(49, 100, config) == pytest.approx({"cosine": 0.5, "linear": 0.5, "wsd": 1 - 0.5**0.5}[name])


def test_wsd_is_flat_until_it_decays() -> None:
    scales = course(100, ScheduleConfig(name="wsd", warmup=0.1, decay=0.2, floor=0))
    assert scales[9:80] == [1.0] * 71
    assert scales[80] < 1


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step={step} must be >= 0 and < steps=10"):
        lr_scale(step, 10, ScheduleConfig())
