import pytest
import torch

from pipeline.errors import UsageError
from pipeline.precision import PRECISIONS, autocast, measured_matmul_flops, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_named_precision_is_kept(precision: str) -> None:
    assert resolve(precision, CPU) == precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({}, "fp32")],
)
def test_auto_takes_bf16_where_a_cpu_multiplies_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve("auto", CPU) == expected


def test_auto_takes_fp32_on_a_device_it_does_not_know() -> None:
    assert resolve("auto", torch.device("meta")) == "fp32"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision='fp8' must be one of auto, bf16, fp32"):
        resolve("fp8", CPU)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_decides_the_dtype_of_products(precision: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(resolve(precision, CPU), CPU):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_measured_rate_is_one_a_machine_can_have(precision: str) -> None:
    assert 1e8 < measured_matmul_flops(precision, CPU, seconds=0.02) < 1e16
