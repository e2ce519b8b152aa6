import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.errors import TrainingDiverged
from pipeline.health import MOST_HELD, WINDOW, Health
from pipeline.train import StepReport


def reports(held: set[int], start: int, stop: int) -> Iterator[StepReport]:
    for step in range(start, stop):
        yield StepReport(
            step=step,
            loss_sum=torch.tensor(float("nan") if step in held else 2.0),
            targets=1,
            grad_norm=torch.tensor(1.0),
            lr_scale=1.0,
            held=torch.tensor(step in held),
            sample_ids=np.array([7, 8]),
            own_ids=np.array([7]),
        )


def last_step(held: set[int], health: Health | None = None, start: int = 0) -> int:
    seen: list[int] = []
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        seen.extend(report.step for report in (health or Health(0)).watch(reports(held, start, 1000)))
    return seen[-1]


def test_a_held_step_is_told_with_its_samples_and_the_run_goes_on(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "gristmill"):
        steps = [report.step for report in Health(0).watch(reports({4}, 0, 8))]
    assert steps == list(range(8))
    assert "step 4: loss nan" in caplog.text
    assert "samples 7, 8" in caplog.text


def test_too_many_in_a_window_end_the_run():
    assert MOST_HELD == 3
    assert last_step({3, 60, 120}) == 120


def test_those_far_apart_do_not():
    held = {0, WINDOW, 2 * WINDOW}
    assert len(list(Health(0).watch(reports(held, 0, 1000)))) == 1000


def test_what_was_held_before_a_restart_counts():
    before = Health(0)
    list(before.watch(reports({3, 7}, 0, 10)))
    after = Health(1)
    after.restore(before.state())
    assert last_step({12}, after, start=10) == 12


def test_only_rank_0_speaks(caplog: pytest.LogCaptureFixture):
    list(Health(1).watch(reports({1}, 0, 4)))
    assert caplog.text == ""
