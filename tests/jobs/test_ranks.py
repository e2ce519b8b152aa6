"""Training on several ranks: the numbers of one, at any ZeRO stage, however often ranks are killed and change."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.batches import sample_ids
from pipeline.ledger import check
from pipeline.store import Store
from pipeline.tracking import read_journal

from .rank_script import ROWS, SEED, SEQ_LEN, STEPS, build_inputs, pretraining, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("rank_script.py")


def torchrun(home: Path, *jobs: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            SCRIPT,
            home,
            *jobs,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a training of one process."""
    home = tmp_path_factory.mktemp("home")
    build_inputs(home)
    threads = torch.get_num_threads()
    train(home, "one", 0)
    torch.set_num_threads(threads)
    return home


def losses(home: Path, name: str) -> list[float]:
    points = [p for p in read_journal(Store(home).journal("pretrain", name)) if "train/loss" in p.metrics]
    assert [p.step for p in points] == list(range(STEPS))
    return [p.metrics["train/loss"] for p in points]


def weights(home: Path, name: str) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(Store(home).work("pretrain", name))
    assert found is not None
    assert found.step == STEPS
    return dict(found.state.params)


def faults(home: Path, name: str) -> list[str]:
    shards = Store(home).path("shards", build_inputs(home)["shards"])
    rows = (pretraining(0).shards.load(shards).split("train").n_tokens - 1) // SEQ_LEN
    ledger = Store(home).journal("pretrain", name).with_suffix(".ledger")
    return check(ledger, lambda step: sample_ids(step, ROWS, rows, SEED), STEPS)


def test_two_workers_have_the_losses_of_one_process_at_every_zero_stage(home: Path):
    done = torchrun(home, *(f"two-{stage}:{stage}" for stage in range(4)))
    assert done.returncode == 0, done.stderr
    expected = weights(home, "one")
    for name in (f"two-{stage}" for stage in range(4)):
        assert losses(home, name) == pytest.approx(losses(home, "one"), abs=1e-5), name
        assert faults(home, name) == [], name
        for parameter, value in weights(home, name).items():
            torch.testing.assert_close(value, expected[parameter], atol=1e-4, rtol=1e-3)


def test_a_killed_rank_goes_on_bit_for_bit_where_nothing_changes(home: Path):
    killed = torchrun(home, "again:2", GRISTMILL_FAULT="checkpoint.saved:13")
    assert killed.returncode != 0
    assert f"Signal {int(signal.SIGKILL)}" in killed.stderr
    done = torchrun(home, "again:2", "whole:2")
    assert done.returncode == 0, done.stderr
    assert losses(home, "again") == losses(home, "whole")
    again, whole = weights(home, "again"), weights(home, "whole")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert faults(home, "again") == []


def test_workers_and_zero_stage_may_change_at_every_start(home: Path):
    """2 -> 1 -> 2 workers, ZeRO 1 -> 3 -> 2, killed in between."""
    for ranks, stage, fault in ((2, 1, "checkpoint.saved:11"), (1, 3, "checkpoint.saved:14"), (2, 2, "")):
        done = torchrun(home, f"elastic:{stage}", ranks=ranks, GRISTMILL_FAULT=fault)
        assert (done.returncode == 0) == (not fault), done.stderr
    assert losses(home, "elastic") == pytest.approx(losses(home, "one"), abs=1e-4)
    assert faults(home, "elastic") == []
