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
