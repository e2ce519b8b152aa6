"""The command line as tests use it: run it, read its answer, compare what it made."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SMOKE = "configs/smoke.yaml"


def gristmill(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        env=os.environ | {"GRISTMILL_HOME": str(home), "PYTHONPATH": "."} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(home: Path, *overrides: str, inline: bool = True, **environment: str) -> dict[str, Any]:
    sets = [part for override in overrides for part in ("--set", override)]
    return answer(gristmill(home, "run", SMOKE, "--json", *sets, *(["--inline"] if inline else []), **environment))


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in result["stages"]}


def keys(result: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["key"] for stage in result["stages"]}


def digests(home: Path, result: dict[str, Any]) -> dict[str, str]:
    manifests = {
        name: home / "store" / name.split("-")[0] / key / "manifest.json" for name, key in keys(result).items()
    }
    return {name: json.loads(path.read_text())["digest"] for name, path in manifests.items()}
