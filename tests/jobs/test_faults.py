"""Processes of a run that die, stall or are told to stop, and what becomes of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from .commands import SMOKE, answer, gristmill, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# so many steps that seconds of training are still to come when its first checkpoint is seen
ALONE = ["labels=null", "pretrain.steps=100", "pretrain.checkpoint_seconds=0.001"]
TWO = [*ALONE, "cluster.workers=2", "pretrain.zero_stage=1", "pretrain.ledger=true"]


def sets(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


LONG = ["pretrain.steps=2000", "pretrain.checkpoint_seconds=0"]
INLINE = [sys.executable, "-m", "jobs.cli", "run", SMOKE, "--json", "--inline", *sets([*TWO, *LONG])]


def environment_of(home: Path) -> dict[str, str]:
    return os.environ | {"GRISTMILL_HOME": str(home), "PYTHONPATH": "."}


def digest(home: Path) -> str:
    [manifest] = (home / "store" / "pretrain").glob("*/manifest.json")
    return json.loads(manifest.read_text())["digest"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base that two workers make."""
    home = tmp_path_factory.mktemp("whole")
    run(home, *TWO)
    return digest(home)


def test_a_run_without_ray_gets_over_a_killed_rank_by_itself(tmp_path: Path, undisturbed: str):
    arguments = ["run", SMOKE, "--json", "--inline", *sets(TWO)]
    done = gristmill(tmp_path, *arguments, GRISTMILL_FAULT=f"checkpoint.saved:2:{tmp_path / 'killed'}")
    assert answer(done)["status"] == "succeeded"
    assert (tmp_path / "killed").exists()
    assert "Going on in 2 s (loss 1 of at most 3)" in done.stderr
    assert "going on from step" in done.stderr
    assert digest(tmp_path) == undisturbed


def test_the_ranks_of_a_run_without_ray_end_with_a_driver_that_is_killed(tmp_path: Path):
    with subprocess.Popen(INLINE, env=environment_of(tmp_path), stderr=subprocess.PIPE, text=True) as driver:
        wait_for_checkpoint(tmp_path)
        ranks = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_a_run_that_is_told_to_stop_while_a_rank_of_it_dies_is_not_begun_again(tmp_path: Path):
    with subprocess.Popen(INLINE, env=environment_of(tmp_path), stderr=subprocess.PIPE, text=True) as driver:
        wait_for_checkpoint(tmp_path)
        driver.send_signal(signal.SIGTERM)
        for rank in psutil.Process(driver.pid).children(recursive=True):
            rank.kill()
        _, err = driver.communicate(timeout=100)
    assert driver.returncode == 8, err
    assert "Going on" not in err


def test_a_worker_under_ray_that_stalls_is_named_and_replaced(tmp_path: Path, undisturbed: str):
    command = [sys.executable, "-m", "jobs.cli", "run", SMOKE, "--json", *sets([*TWO, "cluster.timeout_seconds=5"])]
    with subprocess.Popen(
        command, env=environment_of(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_checkpoint(tmp_path)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if is_worker(p)]
        workers[-1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert process.stderr is not None
        named = next(line for line in process.stderr if "hanging for" in line)
        assert time.monotonic() - stopped < 35, "5 s of silence, and not the 30 s that Ray Train waits for its end"
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["status"] == "succeeded"
    assert any(f"rank {rank}: WorkerHealthCheckTimeoutError" in named for rank in (0, 1))
    assert digest(tmp_path) == undisturbed


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::RayTrainWorker")
    except psutil.Error:
        return False


def wait_for_checkpoint(home: Path) -> None:
    limit = time.monotonic() + 100
    while not list((home / "work" / "pretrain").glob("*/step-*")):
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made_alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base that one process makes."""
    home = tmp_path_factory.mktemp("alone")
    run(home, *ALONE)
    return digest(home)


@pytest.mark.parametrize("how", ["SIGTERM", "cancel"])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_and_can_be_resumed(tmp_path: Path, made_alone: str, how: str):
    home = tmp_path / "stopped"
    slow = [*ALONE[:2], "pretrain.checkpoint_seconds=0", "pretrain.keep_every=1"]
    command = [sys.executable, "-m", "jobs.cli", "run", SMOKE, "--json", "--inline", *sets(slow)]
    with subprocess.Popen(
        command, env=environment_of(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_checkpoint(home)
        [record] = (home / "records").glob("*/record.json")
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            (record.parent / "cancel").touch()
        out, err = process.communicate(timeout=100)
    ended: dict[str, Any] = json.loads(out.splitlines()[-1])
    wanted, code = ("preempted", 8) if how == "SIGTERM" else ("cancelled", 6)
    assert (ended["status"], process.returncode) == (wanted, code), err
    assert "Traceback" not in err
    assert json.loads(record.read_text())["status"] == wanted

    resumed = answer(gristmill(home, "resume", record.parent.name, "--json", "--inline"))
    assert resumed["status"] == "succeeded"
    assert resumed["resumed_from_step"] > 0
    assert digest(home) == made_alone
