import subprocess
import sys

import pytest
import torch

from model.heads import LanguageModel
from model.init import initialize
from tests.model.toys import config


def fresh(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    model = LanguageModel(config(**changes))
    initialize(model, seed)
    return dict(model.named_parameters())


def test_the_same_seed_gives_the_same_weights_in_another_process():
    code = "from tests.model.test_init import fresh; print(fresh()['body.embed.weight'].double().sum().item())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == fresh()["body.embed.weight"].double().sum().item()


def test_another_seed_or_another_name_gives_other_weights():
    a, b = fresh(0), fresh(1)
    assert not torch.equal(a["body.embed.weight"], b["body.embed.weight"])
    assert not torch.equal(a["body.blocks.0.attention.q_proj.weight"], a["body.blocks.1.attention.q_proj.weight"])


def test_changing_one_part_leaves_the_others_alone():
    a, b = fresh(), fresh(tie_embeddings=False, n_kv_heads=4, n_layers=3)
    same = ["body.embed.weight", "body.blocks.0.attention.q_proj.weight", "body.blocks.1.mlp.gate_proj.weight"]
    assert all(torch.equal(a[name], b[name]) for name in same)


@pytest.mark.parametrize(("name", "std"), [("up_proj", 0.02), ("down_proj", 0.01)])
def test_outputs_to_the_residual_stream_shrink_with_depth(name: str, std: float):
    weights = fresh(d_model=128, d_ff=256)[f"body.blocks.0.mlp.{name}.weight"]
    torch.testing.assert_close(weights.std().item(), std, rtol=0.02, atol=0)


def test_norms_start_at_one():
    assert (fresh()["body.norm.weight"] == 1).all()
