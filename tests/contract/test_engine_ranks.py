"""Two ranks train as one does."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from pipeline import checkpoint
from pipeline.engine import SILENCE
from tests.contract.engines import ALL, PLAIN, TARGETS, batch, engine_of, state_of, train


def _rank(folder: Path) -> None:
    """One of two ranks: of each variant three steps on half the rows, and a checkpoint."""
    torch.set_num_threads(1)
    # as under Ray, which connects the ranks before any of them has its inputs
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_SECONDS))
    be_late()
    for variant in SHARED:
        model = replace(ODD, activation_checkpointing=variant.offload != "none")
        with engine_of(variant, model=model) as e:
            if variant.stage > 0:
                e.restore(checkpoint.load(folder / str(SHARED[0]) / "step-00000003").state)
            for _ in range(3):
                e.accumulate(batch(slice(e.rank, None, e.world_size)), TARGETS)
                e.step(1.0)
            if variant == SHARED[0]:
                be_late()
                e.wait()
            part = e.shard()
            writer = checkpoint.Writer(rank=e.rank, world_size=e.world_size)
            checkpoint.save(folder / str(variant), part.optimizer_step, part, {}, writer)
            assert e.agree([e.rank, -e.rank]) == [e.world_size - 1, 0]
            assert e.sum(torch.tensor(float(e.rank + 1))) == 3


def be_late() -> None:
    """On one rank, by more than the other calls of an engine would bear."""
    time.sleep(LIMIT_SECONDS + 2 if os.environ["RANK"] == "1" else 0)


LIMIT_SECONDS = 8
SHARED = [v for v in ALL if v.name == "deepspeed"]
# Sizes that two ranks do not divide.
ODD = ModelConfig(vocab_size=1025, d_model=102, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=95, seq_len=16)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    root = Path(__file__).parents[2]
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(root)!r})\n"
        f"from tests.contract.test_engine_ranks import _rank; _rank(pathlib.Path({str(tmp_path)!r}))"
    )
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rendezvous |= {SILENCE: str(LIMIT_SECONDS / 2)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | rendezvous | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    with engine_of(PLAIN, model=ODD) as alone:
        train(alone, 3)
        first = state_of(alone)
        train(alone, 3)
        expected = state_of(alone)
    for path, whole in [(tmp_path / str(SHARED[0]) / "step-00000003", first)] + [
        (tmp_path / str(variant) / "step-00000006", expected) for variant in SHARED[1:]
    ]:
        state = checkpoint.load(path).state
        torch.testing.assert_close(dict(state.params), dict(whole.params), rtol=1e-4, atol=1e-6)
        assert state.optimizer_step == whole.optimizer_step
