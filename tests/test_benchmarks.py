"""The short versions of what benchmarks/ measures at length."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_pipeline_that_is_killed_at_drawn_moments_leaves_what_an_undisturbed_one_does():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", "--trials", "5", "--seed", "11", "--ray", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| plain | 5 |" in done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_up_to_the_kernels_without_a_gpu():
    def benchmark(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        none = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=none)

    refused, toy = benchmark(), benchmark("--toy")
    assert refused.returncode == 2
    assert "there is no GPU here" in refused.stderr
    assert toy.returncode == 0, toy.stderr
    assert toy.stdout.count("| toy |") == 4
