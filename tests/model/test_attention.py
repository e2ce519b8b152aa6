"""Every module in `model/attention/` is tested by being there."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch

from model import attention, variants
from model.attention import auto
from model.masks import Pattern
from tests.model.toys import ids

NAMES = variants.names("model.attention")
ON_CPU = [name for name in NAMES if name != "flash"]
DOCUMENTS = ids([0, 0, 0, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0, 2])
PATTERNS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"sliding_window": 3},
    "two-sided window": {"sliding_window": 3, "causal": False},
    "documents": {"document_ids": DOCUMENTS},
    "documents and window": {"document_ids": DOCUMENTS, "sliding_window": 2},
    "full documents": {"document_ids": DOCUMENTS, "causal": False},
}
HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (4, 1)}


def kernel(name: str):
    try:
        return attention.kernel(name)
    except ModuleNotFoundError as absent:
        pytest.skip(str(absent))


def pattern(device: str = "cpu", **changes) -> Pattern:
    ask = {"batch": 2, "seq": 7, "device": torch.device(device)} | changes
    return Pattern(**{key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in ask.items()})


def qkv(heads: tuple[int, int], head_dim: int = 8, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, heads[0], head_dim), (2, 7, heads[1], head_dim), (2, 7, heads[1], head_dim)]
    return [torch.randn(shape, generator=generator).to(**options).requires_grad_() for shape in shapes]


def out_and_grads(name: str, inputs: list[torch.Tensor], p: Pattern) -> list[torch.Tensor]:
    out = kernel(name)(*inputs, p)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", ON_CPU)
def test_kernel_matches_the_reference_forward_and_backward(name: str, changes: dict, heads: tuple[int, int]):
    inputs = qkv(heads)
    got, want = (out_and_grads(n, inputs, pattern(**changes)) for n in (name, "reference"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_in_bfloat16_is_within_twice_the_error_of_a_plain_one(name: str, changes: dict, heads: tuple[int, int]):
    kernel(name)
    inputs = qkv(heads, head_dim=64, dtype=torch.bfloat16, device="cuda")
    got, plain = (out_and_grads(n, inputs, pattern("cuda", **changes)) for n in (name, "reference"))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = out_and_grads("reference", wide, pattern("cuda", **changes))
    for a, b, true in zip(got, plain, exact, strict=True):
        assert (a - true).abs().max() <= 2 * (b - true).abs().max() + 1e-2


@pytest.mark.parametrize("name", ON_CPU)
def test_the_jacobian_is_zero_outside_the_mask(name: str):
    p = pattern(document_ids=DOCUMENTS, sliding_window=3)
    q, k, v = (x.detach() for x in qkv((2, 1)))
    of_k, of_v = torch.autograd.functional.jacobian(lambda k, v: kernel(name)(q, k, v, p).sum((2, 3)), (k, v))
    seen = torch.zeros(2, 7, 2, 7, dtype=torch.bool)
    seen[[0, 1], :, [0, 1]] = p.allowed[:, 0]
    assert torch.equal((of_v != 0).any(-1).any(-1), seen)  # row, query, row, key
    assert of_k[~seen].abs().max() == 0


@pytest.mark.parametrize("name", ON_CPU)
def test_a_kernel_returns_the_dtype_it_was_given(name: str):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert kernel(name)(*qkv((4, 2), dtype=dtype), pattern(document_ids=DOCUMENTS)).dtype == dtype


def test_the_reference_is_exact_in_float64():
    inputs = qkv((2, 1), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: kernel("reference")(*x, pattern(sliding_window=3)), inputs, fast_mode=True
    )


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture):
    auto._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="model.attention.auto"):
        for _ in range(2):
            kernel("auto")(*qkv((4, 2)), pattern())
            kernel("auto")(*(x.bfloat16() for x in qkv((4, 2))), pattern())
    assert caplog.messages == [
        "attention=auto uses sdpa: tensors are on cpu",
        "attention=auto uses matmul: on a CPU, in half precision, rows are short",
    ]


def test_asking_for_flash_without_it_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "model.attention.flash", raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install gristmill\[flash\]"):
        attention.kernel("flash")


@pytest.mark.parametrize(
    ("imports", "capability", "chosen"),
    [("", 9, "flash_attn.cute"), ("", 8, "flash_attn"), ("import cutlass_that_is_not_here\n", 9, "flash_attn")],
)
def test_flash_4_is_chosen_only_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: str, capability: int, chosen: str
):
    for package, text in (("flash_attn", ""), ("flash_attn/cute", imports)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"{text}def flash_attn_varlen_func(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("flash_attn", "flash_attn.cute", "model.attention.flash"):
        monkeypatch.setitem(sys.modules, module, None)  # so that what is imported here is forgotten
        del sys.modules[module]
    flash = importlib.import_module("model.attention.flash")
    assert flash.varlen(capability).__module__ == chosen


def test_an_unknown_kernel_lists_the_choices():
    with pytest.raises(ValueError, match=r"choose one of .*reference"):
        attention.kernel("magic")


def test_shapes_are_checked_in_tests():
    q, k, v = qkv((4, 2))
    with pytest.raises(Exception, match=r"seq_k|Type-check error"):
        attention.kernel("reference")(q, k[:, :5], v, pattern())


@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
def test_scoring_a_few_queries_at_a_time_changes_nothing(changes: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.attention.matmul.BLOCK", 3)
    inputs = qkv((4, 2))
    got, want = (out_and_grads(n, inputs, pattern(**changes)) for n in ("matmul", "reference"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
