"""How fast training is, and its mean loss."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.meter import Meter
from pipeline.tracking import Silent
from pipeline.train import StepReport


def test_the_meter_reports_the_mean_of_its_window():
    seen: list[tuple[int, float]] = []

    class Listening(Silent):
        def metrics(self, values: dict[str, float], *, step: int) -> None:
            seen.append((step, values["train/loss"]))

    ids = np.arange(2)
    held, norm = torch.tensor(False), torch.tensor(1.0)
    reports = [StepReport(i, torch.tensor(float(i)), 2, norm, 1.0, held, ids, ids) for i in range(5)]
    meter = Meter(Listening(), lr=1.0, every=2, total=5, tokens_per_step=2)
    assert list(meter.watch(iter(reports))) == reports
    assert seen == [(1, 0.25), (3, 1.25), (4, 2.0)]


def test_the_meter_times_a_window_over_several_epochs_and_knows_the_speed_of_what_a_restart_went_on_from():
    ids = np.arange(2)
    held, norm = torch.tensor(False), torch.tensor(1.0)

    def slow_steps(*steps: int) -> Iterator[StepReport]:
        for step in steps:
            time.sleep(0.02)
            yield StepReport(step, torch.tensor(1.0), 2, norm, 1.0, held, ids, ids)

    meter = Meter(Silent(), lr=1.0, every=5, total=5, tokens_per_step=2)
    for epoch in ((0, 1, 2, 3), (4,)):
        list(meter.watch(slow_steps(*epoch)))
        with meter.pause():
            time.sleep(0.5)
    assert 0.1 <= meter.training_seconds < 0.5
    again = Meter(Silent(), lr=1.0, every=5, total=5, tokens_per_step=2)
    again.restore(meter.state())
    assert again.tokens_per_second == meter.tokens_per_second == 10 / meter.training_seconds
