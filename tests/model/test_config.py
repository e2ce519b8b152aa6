import subprocess
import sys
from dataclasses import fields

import pytest

from model.config import ModelConfig
from tests.model.toys import config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 33, "n_heads": 2}, "d_model=33 must be a multiple of n_heads=2"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"d_model": 12}, "heads of 3 channels"),
        ({"n_layers": 0}, "n_layers=0 must be >= 1"),
        ({"sliding_window": 0}, "sliding_window=0 must be >= 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be < 1"),
        ({"dropout": -0.1}, "dropout=-0.1 must be >= 0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be > 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be > 0"),
        ({"attention": "magic"}, "attention='magic' must be one of auto, flash, matmul, reference, sdpa"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_name_and_value(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_window_may_be_absent():
    assert config(sliding_window=None).sliding_window is None


def test_how_a_model_computes_is_not_identity():
    knobs = [f.name for f in fields(ModelConfig) if not f.metadata.get("identity", True)]
    assert knobs == ["attention", "activation_checkpointing"]


def test_a_config_is_made_without_importing_torch():
    code = (
        "import sys; from model.config import ModelConfig as C; "
        "C(vocab_size=8, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8, seq_len=8); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
