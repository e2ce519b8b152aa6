"""The short versions of what benchmarks/ measures at length."""

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
    command = [sys.executable, "-m", "benchmarks.gpu"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    toy = subprocess.run([*command, "--toy"], capture_output=True, text=True, check=False)
    if "there is no GPU here" in refused.stderr:
        assert refused.returncode == 2
    assert toy.returncode == 0, toy.stderr
    assert toy.stdout.count("| toy |") == 4
