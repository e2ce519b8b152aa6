"""What is made of the ways in which a gang of ranks can end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def endings() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gang_endings.py"))],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("killed", "WorkerLost", "rank 0: RuntimeError: .*gloo.*rank 1: ActorDiedError"),
        ("killed in mid-checkpoint", "WorkerLost", "rank 1: ActorDied"),
        ("no link", "WorkerLost", "rank 1: RuntimeError"),
        ("preempted", "Preempted", "stopped after step 3"),
        ("bug", "StageFailed", "rank 0: RuntimeError: mat1 and mat2"),
        ("plain bug", "StageFailed", "Traceback"),
    ],
)
def test_a_gang_that_fails_is_explained_by_its_cause(endings: dict[str, list[str]], case: str, kind: str, words: str):
    found, message = endings[case]
    assert found == kind
    assert re.search(f"(?s){words}", message)
