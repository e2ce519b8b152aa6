"""What an engine cannot do is refused by name, with a remedy."""

import sys
from typing import Any

import pytest

from model.heads import LanguageModel
from model.objectives import next_token
from pipeline import engine
from pipeline.engine import EngineSettings
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.optimizer import OptimizerConfig
from tests.contract.engines import CUT, MODEL, Variant, engine_of


@pytest.mark.parametrize("variant", CUT)
def test_a_running_mean_of_cut_weights_is_refused(variant: Variant) -> None:
    with (
        pytest.raises(ValueError, match=r"average=0.5.*zero_stage=\d"),
        engine_of(variant, optimizer=OptimizerConfig(average=0.5)),
    ):
        pass


@pytest.mark.parametrize("variant", CUT)
def test_muon_on_cut_matrices_is_refused(variant: Variant) -> None:
    with (
        pytest.raises(ValueError, match=r"optimizer=muon.*zero_stage=\d"),
        engine_of(variant, optimizer=OptimizerConfig(name="muon")),
    ):
        pass


def test_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"choose one of .*plain"), engine_of(Variant("steam")):
        pass
    with (
        pytest.raises(UsageError, match="zero_stage=2 must be one of 0 with engine=plain"),
        engine_of(Variant("plain", 2)),
    ):
        pass


@pytest.mark.parametrize(
    ("stage", "offload", "remedy"), [(0, "optimizer", "zero_stage to 1, 2 or 3"), (2, "all", "zero_stage to 3")]
)
def test_what_a_stage_cannot_offload_is_refused(stage: int, offload: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"offload={offload} .*zero_stage={stage} .*{remedy}"):
        EngineSettings(zero_stage=stage, offload=offload)


def test_without_its_package_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'gristmill\[deepspeed\]'"):
        engine.create(
            "deepspeed",
            LanguageModel(MODEL),
            next_token.loss,
            optimizer=OptimizerConfig(),
            precision="fp32",
            grad_clip=1.0,
            settings=EngineSettings(device="cpu"),
            n_layers=MODEL.n_layers,
        )


@pytest.mark.slow
def test_what_deepspeed_cannot_take_is_refused_by_name() -> None:
    refused = pytest.raises(UsageError, match=r"deepspeed_config: .*\n.*reduce_bucket_size=-1: .*greater than 0")
    with refused, engine_of(Variant("deepspeed", 1), deepspeed={"zero_optimization": {"reduce_bucket_size": -1}}):
        pass
