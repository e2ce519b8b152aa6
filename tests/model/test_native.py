"""Kernels in C++ beside the PyTorch operators that they stand for."""

import logging
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, silu

from model import counter, mlp, native, rope
from model.attention import _native, reference
from model.batch import IGNORE
from model.config import ModelConfig
from model.decode import Decoding, freeze
from model.dropout import add_dropped, drop
from model.generate import unseen_by
from model.heads import LanguageModel
from model.init import initialize
from model.linear import matmul_dtype, product, sum_products
from model.losses import linear_cross_entropy
from model.masks import Pattern
from model.norm import RMSNorm
from tests.model.test_attention import HEADS, PATTERNS

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not native.has("rms_norm"), reason="no C++ compiler, or not Linux")
multiplies_bf16 = pytest.mark.skipif(not native.has("attention"), reason="this processor multiplies no bfloat16")
sizes = st.integers(1, 70)


RAN: set[str] = set()
"""The kernels that were called in this test, so that none of them passes by PyTorch alone."""


@pytest.fixture(autouse=True)
def _kernels_for_the_smallest(monkeypatch: pytest.MonkeyPatch):
    call = native.call
    RAN.clear()
    monkeypatch.setattr(native, "SMALL", 1)
    monkeypatch.setattr(native, "call", lambda kernel, *rest: (RAN.add(kernel), call(kernel, *rest)))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def with_grads(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = function(*inputs)
    weights = random(*out.shape, seed=7).detach().to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_nearer_than(got, plain, exact, atol: float = 1e-3) -> None:
    """A result in bfloat16 may be as far from the exact one as half again what PyTorch's operators make of it."""
    for a, b, true in zip(got, plain, exact, strict=True):
        assert (a - true).abs().max() <= 1.5 * (b - true).abs().max() + atol * true.abs().max()


@settings(max_examples=25, deadline=None)
@given(rows=sizes, d=sizes)
def test_norm_is_that_of_pytorch_forward_and_backward(rows: int, d: int):
    norm, x = RMSNorm(d, 1e-5), random(rows, d)
    norm.weight.data = random(d, seed=1).detach()
    got = with_grads(lambda x, w: norm(x), x, norm.weight)
    want = with_grads(lambda x, w: norm.weight * torch.nn.functional.rms_norm(x, (d,), eps=1e-5), x, norm.weight)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert {"rms_norm", "rms_norm_backward"} <= RAN


def test_norm_in_bfloat16_is_the_one_in_float32_rounded():
    norm, x = RMSNorm(64, 1e-5), random(9, 64)
    torch.testing.assert_close(norm(x, BF16), norm(x).to(BF16), rtol=0, atol=0)
    assert {"rms_norm"} <= RAN


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), seq=sizes, heads=st.integers(1, 3), half=st.integers(1, 20), shared=st.booleans())
def test_rotation_is_that_of_pytorch_and_its_gradient_turns_back(batch, seq, heads, half, shared):
    x = random(batch, seq, heads, 2 * half, dtype=BF16)
    positions = torch.arange(seq).expand(1 if shared else batch, seq) + torch.arange(1 if shared else batch)[:, None]
    by = rope.rotation(positions, 2 * half, 10_000.0)
    out, of_x = with_grads(lambda x: rope.rotate(x, by), x)
    wide = x.detach().float()
    torch.testing.assert_close(out, rope.rotate(wide, by).to(BF16), atol=0, rtol=1e-2)
    torch.testing.assert_close(rope.rotate(out, rope.Rotation(by.cos, -by.sin)).float(), wide, atol=0.05, rtol=0.02)
    given = random(*x.shape, seed=7).detach().to(BF16).float()
    back = rope.rotate(given, rope.Rotation(by.cos, -by.sin))
    torch.testing.assert_close(of_x, back.to(BF16), atol=1e-2, rtol=1e-2)
    assert {"rotate"} <= RAN


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 500))
def test_gate_is_nearer_to_the_exact_one_than_pytorch_in_two_roundings(n: int):
    gate, up = (random(n, seed=s, dtype=BF16) * 3 for s in (0, 1))
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    exact = with_grads(lambda g, u: silu(g) * u, *(x.detach().double().requires_grad_() for x in (gate, up)))
    plain = with_grads(lambda g, u: silu(g) * u, gate, up)
    assert_nearer_than(with_grads(mlp.gated, gate, up), plain, exact, atol=4e-3)
    assert {"swiglu", "swiglu_backward"} <= RAN


@settings(max_examples=25, deadline=None)
@given(seq=sizes, width=sizes, dtype=st.sampled_from([BF16, torch.float32]))
def test_dropout_draws_the_very_bits_of_the_counter(seq: int, width: int, dtype: torch.dtype):
    x, keys = random(3, seq, width, dtype=dtype), torch.tensor([5, -7, 2**62])
    out, of_x = with_grads(lambda x: drop(x, 0.3, keys, site=4), x)
    kept = counter.bits(keys, 4, seq, width) >= round(0.3 * 2**32) - 2**31
    torch.testing.assert_close(out, x.detach() * kept * (1 / 0.7), atol=0, rtol=0)
    assert torch.equal(of_x != 0, kept & (random(3, seq, width, seed=7).detach().to(dtype) != 0))
    assert {"drop"} <= RAN


@settings(max_examples=25, deadline=None)
@given(seq=sizes, width=sizes, dtype=st.sampled_from([BF16, torch.float32]), p=st.sampled_from([0.0, 0.3]))
def test_a_branch_is_added_as_it_would_be_after_dropout(seq: int, width: int, dtype: torch.dtype, p: float):
    x, branch, keys = random(2, seq, width), random(2, seq, width, seed=1, dtype=dtype), torch.tensor([3, 2**40])
    got = with_grads(lambda x, branch: add_dropped(x, branch, p, keys, site=2), x, branch)
    want = with_grads(lambda x, branch: x + drop(branch, p, keys, site=2), x, branch)
    tolerance = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    torch.testing.assert_close(got, want, **tolerance)
    assert torch.equal(got[2] == 0, want[2] == 0)
    assert {"add_dropped"} <= RAN


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 70), d=st.integers(1, 40), vocab=st.integers(2, 300), seed=st.integers(0, 9))
def test_cross_entropy_is_near_the_exact_one(rows: int, d: int, vocab: int, seed: int):
    RAN.clear()
    hidden, weight = random(rows, d, seed=seed), random(vocab, d, seed=seed + 1)
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[::5] = IGNORE
    with torch.autocast("cpu", BF16):
        assert matmul_dtype(hidden) == BF16
        loss = linear_cross_entropy(hidden, weight, targets)
    h, w = (x.detach().to(BF16) for x in (hidden, weight))
    logits = (h @ w.T).float().requires_grad_()
    exact = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, exact, atol=1e-6 * rows, rtol=1e-5)
    (of_logits,) = torch.autograd.grad(exact, logits)
    for got, rows_of, by in zip(
        torch.autograd.grad(loss, (hidden, weight)), (of_logits, of_logits.T), (w.float(), h.float()), strict=True
    ):
        want, added_up = rows_of @ by, rows_of.abs() @ by.abs()
        off = (got - want).abs()
        rounded = added_up + want.abs()  # each summand is, and their sum may be
        assert (off <= 1.01 * rounded * 2**-8 + 1e-6).all()
        most = added_up.max() / 2**9  # many errors cancel out
        assert off.max() <= torch.maximum(0.03 * want.abs().max() + 1e-3, most)
    assert "cross_entropy" in RAN
    assert ("weight_gradient" in RAN) == (d % 32 == 0 and native.has("weight_gradient"))


@pytest.mark.parametrize("target", [40, 10**9, -1])
def test_a_target_outside_the_vocabulary_is_refused_as_pytorch_does(target: int):
    hidden, weight, targets = random(3, 8), random(40, 8, seed=1), torch.tensor([1, IGNORE, target])
    with torch.autocast("cpu", BF16), pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


def test_a_nan_among_logits_is_a_nan_in_the_loss():
    hidden, weight = random(3, 8), random(40, 8, seed=1).detach()
    weight[17, 3] = float("nan")
    with torch.autocast("cpu", BF16):
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), torch.tensor([1, 2, 3]))
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    assert {"cross_entropy"} <= RAN


LONG = (torch.arange(150) // 37).int().expand(2, 150).contiguous()
CASES = [
    *(pytest.param(7, changes, id=name) for name, changes in PATTERNS.items()),
    pytest.param(150, {}, id="long"),
    pytest.param(150, {"causal": False, "document_ids": LONG}, id="long documents"),
    pytest.param(150, {"causal": False, "sliding_window": 50}, id="long window"),
    pytest.param(300, {}, id="more keys than are read at once"),
    pytest.param(400, {"causal": False, "sliding_window": 150}, id="so many, and not from the first"),
]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (BF16, 0.15), (torch.int8, 0.15)])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 3])
def test_a_token_at_a_time_gets_the_logits_that_pytorch_gives(heads, window, dtype, atol, monkeypatch):
    cfg = ModelConfig(
        vocab_size=50, d_model=64, n_layers=2, n_heads=heads[0], n_kv_heads=heads[1], d_ff=48, seq_len=16,
        sliding_window=window,
    )  # fmt: skip
    model = LanguageModel(cfg)
    initialize(model, 0)
    frozen = freeze(model, dtype)
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(4) < torch.tensor([[2], [0], [3]])

    def read() -> list[torch.Tensor]:
        decoding = Decoding(frozen, 3, 12)
        logits = [decoding.read(tokens[:, :4], forbidden=unseen_by(decoding, 4, padding))]
        for at in range(4, 12):
            unseen = unseen_by(decoding, 1, padding if at % 2 else None)
            logits.append(decoding.read(tokens[:, at : at + 1], forbidden=unseen))
        return logits

    got = read()
    assert {"read_few"} <= RAN
    monkeypatch.setattr(native, "ENABLED", False)
    torch.testing.assert_close(got, read(), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int8])
def test_what_a_token_gets_does_not_depend_on_those_read_with_it(dtype):
    cfg = ModelConfig(vocab_size=53, d_model=80, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=72, seq_len=16)
    model = LanguageModel(cfg)
    initialize(model, 0)
    frozen = freeze(model, dtype)
    tokens = torch.randint(0, 53, (5, 9), generator=torch.Generator().manual_seed(0))

    def read(rows: slice, *widths: int) -> torch.Tensor:
        decoding = Decoding(frozen, len(tokens[rows]), 9)
        parts = tokens[rows].split(widths, dim=1)
        return torch.cat([decoding.read(part, last=part.shape[1]) for part in parts], dim=1)

    together = read(slice(None), 4, 1, 4)
    assert {"read_few"} == RAN
    for row in range(5):
        assert torch.equal(read(slice(row, row + 1), 4, 1, 4), together[row : row + 1])
    for widths in ([1] * 9, [5, 1, 3], [3, 6]):
        assert torch.equal(read(slice(None), *widths), together)


@multiplies_bf16
@pytest.mark.parametrize("instructions", ["the fastest", "no tiles"])
@pytest.mark.parametrize("d", [32, 96])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("seq", "changes"), CASES)
def test_attention_is_as_near_to_the_exact_one_as_matrix_products(seq, changes, heads, d, instructions, monkeypatch):
    if instructions == "no tiles":
        without_tiles(monkeypatch)
    p = Pattern(**{"batch": 2, "seq": seq, "device": torch.device("cpu")} | changes)
    inputs = [random(2, seq, h, d, seed=s, dtype=BF16) for s, h in enumerate((heads[0], heads[1], heads[1]))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_grads(lambda *x: reference.attend(*x, p), *wide)
    plain = with_grads(lambda *x: reference.attend(*x, p), *inputs)
    assert _native.takes(inputs[0])
    assert_nearer_than(with_grads(lambda *x: _native.attend(*x, p), *inputs), plain, exact, atol=4e-3)
    assert {"attention", "attention_backward"} <= RAN


def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as a processor without AMX has them."""
    compiler = shutil.which("g++")
    assert compiler is not None
    library = native.ctypes.CDLL(str(native.compiled(compiler, (*native.FLAGS, "-mno-amx-bf16"))))
    monkeypatch.setattr(native, "_library", lambda: library)


@multiplies_bf16
def test_nothing_depends_on_the_number_of_threads():
    def everything() -> list[torch.Tensor]:
        q, k, v = (random(3, 65, 2, 32, seed=s, dtype=BF16) for s in range(3))
        p = Pattern(batch=3, seq=65, device=torch.device("cpu"))
        norm = RMSNorm(48, 1e-5)
        hidden, weight = random(50, 48), random(90, 48, seed=1)
        with torch.autocast("cpu", BF16):
            loss = linear_cross_entropy(hidden, weight, torch.arange(50))
        total = torch.empty(224, 96)
        sum_products(random(2100, 224, dtype=BF16).detach(), random(2100, 96, dtype=BF16).detach(), total)
        return [
            total,
            product(random(2100, 704, dtype=BF16).detach(), random(704, 96, seed=1, dtype=BF16).detach()),
            *with_grads(lambda *x: _native.attend(*x, p), q, k, v),
            *with_grads(lambda x, w: norm(x, BF16), random(101, 48), norm.weight),
            *torch.autograd.grad(loss, (hidden, weight)),
        ]

    threads = torch.get_num_threads()
    try:
        tables = []
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            tables.append(everything())
    finally:
        torch.set_num_threads(threads)
    for table in tables[1:]:
        assert all(torch.equal(a, b) for a, b in zip(table, tables[0], strict=True))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "no-such-compiler", "there is no C++ compiler; install g++, or name one in $CXX"),
        ("CXX", "false", "does not compile its kernels"),
    ],
)
def test_without_kernels_pytorch_computes_the_same_and_the_log_says_why(variable, value, said, monkeypatch, caplog):
    norm, x = RMSNorm(32, 1e-5), random(5, 32)
    want = with_grads(lambda x, w: norm(x), x, norm.weight)
    monkeypatch.setenv(variable, value)
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native.usable(x)
            assert not native.has("rms_norm")
            RAN.clear()
        torch.testing.assert_close(with_grads(lambda x, w: norm(x), x, norm.weight), want)
    finally:
        native._library.cache_clear()
    assert not RAN
    assert said in caplog.text
    assert len(caplog.records) == 1


def test_what_traces_pytorch_operators_meets_no_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not any(native.usable(random(9, 9, dtype=dtype)) for dtype in (BF16, torch.float32))
