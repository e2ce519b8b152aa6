"""What the machine does is sampled beside a training, in a thread and a journal of their own."""

import logging
import time
from pathlib import Path

import pytest
import torch

from pipeline.system_metrics import Machine
from pipeline.tracking import Recorder, read_journal, system_path


def test_a_sample_reads_cpu_memory_disk_and_network(tmp_path: Path):
    machine = Machine(tmp_path)
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    sample = machine.sample()
    assert all(name.startswith("system/") for name in sample)
    for name in ("cpu_utilization", "system_memory_usage", "disk_usage"):
        assert 0 < sample[f"system/{name}_percentage"] <= 100
    assert 10 < sample["system/process_memory_megabytes"] < sample["system/system_memory_usage_megabytes"] * 10
    assert sample["system/disk_available_megabytes"] > 0
    assert sample["system/network_receive_megabytes"] >= 0
    assert sample["system/ranks"] == 1
    assert not any("gpu" in name for name in sample)


def test_samples_are_taken_from_the_first_metrics_on_and_once_more_at_the_end(tmp_path: Path):
    path = tmp_path / "key.jsonl"
    recorder = Recorder(path, sample_seconds=0.05)
    recorder.progress(1, 2)
    time.sleep(0.2)
    assert not system_path(path).exists(), "a stage that records no metrics is not watched"
    recorder.metrics({"train/loss": 1.0}, step=0)
    until = time.monotonic() + 20
    while len(list(read_journal(system_path(path)))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    recorder.close()
    samples = list(read_journal(system_path(path)))
    assert [point.step for point in samples] == list(range(len(samples)))
    assert len(samples) >= 4, "three while it ran, and one at the end"
    assert [point.metrics for point in read_journal(path)] == [{"train/loss": 1.0}], "the training's own is as it was"


def test_a_short_training_has_one_sample_and_a_restart_counts_on(tmp_path: Path):
    path = tmp_path / "key.jsonl"
    for step in range(3):
        recorder = Recorder(path)
        recorder.metrics({"train/loss": 1.0}, step=step)
        recorder.close()
    assert [point.step for point in read_journal(system_path(path))] == [0, 1, 2]


def test_a_torn_sample_of_a_killed_process_is_dropped(tmp_path: Path):
    path = tmp_path / "key.jsonl"
    system_path(path).write_text('{"step": 0, "timestamp_ms": 1, "metrics": {"system/ranks": 1}}\n{"step": 1, "ti')
    recorder = Recorder(path)
    recorder.metrics({"train/loss": 1.0}, step=0)
    recorder.close()
    assert [point.step for point in read_journal(system_path(path))] == [0, 1]


def test_what_cannot_be_sampled_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "key.jsonl"
    system_path(path).mkdir()
    recorder = Recorder(path)
    with caplog.at_level(logging.WARNING, "gristmill"):
        recorder.metrics({"train/loss": 1.0}, step=0)
        recorder.close()
    assert len(list(read_journal(path))) == 1
    assert "no system metrics any more" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_that_is_computed_on_is_read_too(tmp_path: Path):
    held = torch.zeros(1 << 26, device="cuda")
    sample = Machine(tmp_path).sample()
    assert sample["system/gpu_0_memory_usage_megabytes"] * 1e6 > held.nbytes
