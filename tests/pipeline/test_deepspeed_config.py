"""A DeepSpeed JSON of the user's own: what passes, what is filled in, and what is refused with which words."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.deepspeed_config import read
from pipeline.errors import UsageError
from pipeline.identity import fingerprint
from pipeline.stages.finetune import FinetuneConfig
from pipeline.stages.pretrain import PretrainConfig
from pipeline.training import TrainingConfig
from tests.pipeline.recipes import SIMPLE

CONFIG = PretrainConfig(steps=1, precision="bf16", zero_stage=2)


def passed(folder: Path, document: Any, config: TrainingConfig = CONFIG) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read(str(path), asdict(config))


def test_what_no_field_decides_passes(tmp_path: Path):
    own = {
        "zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": True, "stage3_max_live_parameters": 10},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "wall_clock_breakdown": False,
        "a.key": None,
    }
    assert passed(tmp_path, own) == own


AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": "auto",
    "zero_optimization": {
        "stage": "auto",
        "offload_optimizer": {"device": "none", "pin_memory": "auto"},
        "reduce_bucket_size": "auto",
        "overlap_comm": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, precision="fp32", zero_stage=1), FinetuneConfig(**SIMPLE)])
def test_auto_is_the_field_or_else_deepspeed_s_default(tmp_path: Path, config: TrainingConfig):
    assert passed(tmp_path, AUTO, config) == {"zero_optimization": {"overlap_comm": True}}


def test_what_agrees_with_the_fields_is_taken(tmp_path: Path):
    agreed = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}},
        "gradient_clipping": 0.5,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
    }
    own = {"lr": 2e-4, "beta2": 0.99, "weight_decay": 0.0, "grad_clip": 0.5, "batch_size": 64, "micro_batch_size": 8}
    config = FinetuneConfig(zero_stage=3, offload="all", precision="bf16", **(SIMPLE | own))
    rest = {name: agreed[name] for name in ("data_types", "curriculum_learning")}
    assert passed(tmp_path, agreed, config) == rest


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 contradicts zero_stage=2, which makes it 2"),
        ({"gradient_clipping": 5}, "gradient_clipping=5 contradicts grad_clip=1.0, which makes it 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping=true contradicts grad_clip=1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false contradicts precision=bf16, which makes it true"),
        ({"bf16": {"enabled": True, "check_overflow": True}}, "bf16.check_overflow=true contradicts precision=bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts precision=bf16, which makes it false"),
        ({"amp": {"enabled": True}}, "amp.enabled=true contradicts precision=bf16"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type="Lion" contradicts optimizer=adamw, which makes it "AdamW"'),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1 contradicts lr=0.001, which makes it 0.001"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type="WarmupLR" contradicts schedule=cosine'),
        ({"train_batch_size": 64}, "train_batch_size=64 contradicts global_batch_tokens=32768, which decides it"),
        ({"train_micro_batch_size_per_gpu": 4}, "contradicts micro_batch_size=16, which makes it 16"),
        ({"gradient_accumulation_steps": 4}, "contradicts micro_batch_size=16, which decides it"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
            'zero_optimization.offload_optimizer.device="nvme" contradicts offload=none, which makes it "none"',
        ),
        ({"managed_gradient_accumulation": True}, "contradicts engine=auto, which makes it false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_names_file_key_both_values_and_the_remedy(tmp_path: Path, document: Any, said: str):
    with pytest.raises(UsageError) as refusal:
        passed(tmp_path, document)
    assert str(refusal.value).startswith(f"{tmp_path / 'ds.json'}: ")
    assert said in str(refusal.value)
    assert 'write "auto" or remove it, and set ' in str(refusal.value)


@pytest.mark.parametrize(
    "document",
    [
        {"communication_data_type": "fp16"},
        {"compression_training": {"layer_reduction": {"enabled": True}}},
        {"curriculum_learning": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"zero_optimization": {"zero_quantized_gradients": True}},
        {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
        {"zero_optimization": {"cpu_offload": True}},
    ],
    ids=str,
)
def test_a_knob_cannot_change_what_is_trained_or_where_its_state_lies(tmp_path: Path, document: Any):
    with pytest.raises(UsageError, match=r"ds\.json: .*; remove it$"):
        passed(tmp_path, document)


def test_all_problems_are_told_at_once(tmp_path: Path):
    with pytest.raises(UsageError) as refusal:
        passed(tmp_path, {"gradient_clipping": 5, "zero_optimization": {"stage": 0}, "scheduler": {"type": "OneCycle"}})
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n  "b" 2}', r"ds\.json:2:7  not JSON: Expecting ':' delimiter"),
        ("", r"ds\.json:1:1  not JSON"),
        ("[]", r"ds\.json:1:1  a DeepSpeed config is a JSON object"),
        ('{"a": {"b": 1, "b": 2}}', r"ds\.json: cannot be read: 'b' stands in one section twice"),
        ("[" * 100_000, r"ds\.json: cannot be read"),
    ],
    ids=["not JSON", "empty", "a list", "twice", "deep"],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError, match=said):
        passed(tmp_path, text)


def test_a_missing_file_is_refused_before_anything_is_built(tmp_path: Path):
    with pytest.raises(UsageError, match=r"deepspeed_config=.*none\.json: no such file"):
        replace(CONFIG, deepspeed_config=str(tmp_path / "none.json")).resolve()


def test_knobs_for_memory_enter_no_key():
    changed = replace(CONFIG, offload="optimizer", deepspeed_config="ds.json", activation_checkpointing=True)
    assert fingerprint(changed) == fingerprint(CONFIG)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"offload": "optimizer"}, "offload=optimizer .* zero_stage=0 .*set zero_stage to 1, 2 or 3"),
        ({"offload": "all", "zero_stage": 2}, "offload=all .* zero_stage=2 .*set zero_stage to 3"),
        ({"deepspeed_config": "ds.json", "engine": "plain"}, r"deepspeed_config=ds\.json needs engine deepspeed"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_together_are_refused_with_the_remedy(settings: dict[str, Any], remedy: str):
    with pytest.raises(ValueError, match=remedy):
        TrainingConfig(**settings)


def test_who_brings_a_deepspeed_config_gets_the_deepspeed_engine():
    assert TrainingConfig(deepspeed_config="ds.json").engine_name == "deepspeed"
