"""Every engine, at every ZeRO stage it has, trains like the plain one and can take a run over from any other."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from model import variants
from model.batch import Batch
from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import next_token
from pipeline import checkpoint, engine
from pipeline.engine import Engine, EngineSettings
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.optimizer import OptimizerConfig
from pipeline.state import TrainState, join

# An embedding of more than 1e5 elements: ZeRO-3 leaves smaller parameters whole.
MODEL = ModelConfig(vocab_size=1024, d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=96, seq_len=16)
ROWS, TARGETS = 4, 64


class Variant(NamedTuple):
    name: str
    stage: int = 0
    offload: str = "none"

    def __str__(self) -> str:
        return "-".join(map(str, self[: 2 + (self.offload != "none")]))


OFFLOADS = {0: ("none",), 1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "all")}
"""What each ZeRO stage can offload. On a CPU nothing moves, but all of DeepSpeed's paths for it are run."""
ALL = [
    Variant(name, stage, offload)
    for name in engine.names()
    for stage in variants.load("pipeline.engine", name).ZERO_STAGES
    for offload in OFFLOADS[stage]
]
VARIANTS = [pytest.param(v, id=str(v), marks=[pytest.mark.slow] if v.name != "plain" else []) for v in ALL]
WHOLE = [param for param, v in zip(VARIANTS, ALL, strict=True) if v.stage == 0]
CUT = [param for param, v in zip(VARIANTS, ALL, strict=True) if v.stage > 0]
PLAIN = Variant("plain")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def engine_of(
    variant: Variant,
    *,
    seed: int = 0,
    precision: str = "fp32",
    grad_clip: float = 1.0,
    optimizer: OptimizerConfig | None = None,
    model: ModelConfig = MODEL,
    deepspeed: Mapping[str, Any] | None = None,
) -> Iterator[Engine]:
    body = LanguageModel(model)
    initialize(body, seed)
    try:
        made = engine.create(
            variant.name,
            body,
            next_token.loss,
            # eps above the rounding of a gradient: AdamW would make a part of a step of it where that is all there is
            optimizer=optimizer or OptimizerConfig(lr=1e-3, eps=1e-6),
            precision=precision,
            grad_clip=grad_clip,
            settings=EngineSettings(
                device="cpu",
                zero_stage=variant.stage,
                offload=variant.offload,  # pyright: ignore[reportArgumentType]
                deepspeed=deepspeed or {},
            ),
            n_layers=model.n_layers,
        )
    except EnvironmentProblem as missing:
        pytest.skip(str(missing))
    yield made
    made.close()


def state_of(e: Engine) -> TrainState:
    return join([e.shard()])


def batch(rows: slice = slice(None)) -> Batch:
    tokens = torch.randint(0, MODEL.vocab_size, (ROWS, MODEL.seq_len + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(ROWS, MODEL.seq_len, dtype=torch.int32)
    return Batch(tokens[rows, :-1], tokens[rows, 1:], ids[rows], torch.arange(ROWS)[rows])


def train(e: Engine, steps: int, parts: int = 1) -> Tensor:
    """[steps, 2]: mean loss before each step, and gradient norm."""
    size = ROWS // parts
    seen = []
    for _ in range(steps):
        sums = [e.accumulate(batch(slice(i * size, (i + 1) * size)), TARGETS) for i in range(parts)]
        seen.append(torch.stack([sum(sums) / TARGETS, e.step(1.0)]))
    return torch.stack(seen)


@cache
def plain_course() -> Tensor:
    with engine_of(PLAIN) as plain:
        return train(plain, 50)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert a.optimizer_step == b.optimizer_step
    torch.testing.assert_close(a.params, b.params, rtol=0, atol=0)
    torch.testing.assert_close(a.optimizer, b.optimizer, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_a_batch_by_heart(variant: Variant, precision: str) -> None:
    with engine_of(variant, precision=precision, optimizer=OptimizerConfig(lr=1e-2)) as e:
        losses = train(e, 15)[:, 0]
    assert losses[0] > 6
    assert losses[-1] < 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_one_batch(variant: Variant) -> None:
    with engine_of(variant) as whole, engine_of(variant) as parts:
        torch.testing.assert_close(train(whole, 5), train(parts, 5, parts=4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_restored_run_goes_on_bit_for_bit(variant: Variant, precision: str) -> None:
    with engine_of(variant, precision=precision) as first, engine_of(variant, precision=precision, seed=1) as second:
        train(first, 3)
        train(second, 2)
        second.restore(state_of(first))
        assert_equal(state_of(first), state_of(second))
        assert torch.equal(train(first, 4), train(second, 4))
        assert_equal(state_of(first), state_of(second))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_before_the_first_step_can_be_restored(variant: Variant) -> None:
    with engine_of(variant) as first, engine_of(variant, seed=1) as second:
        train(second, 2)
        start = state_of(first)
        assert start.optimizer == {}
        assert start.optimizer_step == 0
        second.restore(start)
        torch.testing.assert_close(train(first, 3), train(second, 3), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_norms_are_those_of_the_plain_engine(variant: Variant) -> None:
    with engine_of(variant) as other:
        torch.testing.assert_close(train(other, 50), plain_course(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_may_change_engine_and_come_back(variant: Variant) -> None:
    with engine_of(PLAIN) as start, engine_of(variant, seed=1) as other:
        seen = [train(start, 7)[:, 0]]
        other.restore(state_of(start))
        seen.append(train(other, 7)[:, 0])
        start.restore(state_of(other))
        seen.append(train(start, 6)[:, 0])
    torch.testing.assert_close(torch.cat(seen), plain_course()[:20, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_clipped_and_the_norm_before_is_told(variant: Variant) -> None:
    with engine_of(variant, grad_clip=0.0) as free, engine_of(variant, grad_clip=0.01) as clipped:
        norm, same_norm = train(free, 1)[0, 1], train(clipped, 1)[0, 1]
        assert norm > 0.1
        torch.testing.assert_close(norm, same_norm)
        for e, expected in ((free, norm.item()), (clipped, 0.01)):
            first_moments = torch.cat([m["exp_avg"].flatten() for m in state_of(e).optimizer.values()])
            assert first_moments.norm().item() / (1 - 0.9) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_learning_rate_follows_its_scale(variant: Variant) -> None:
    with engine_of(variant) as e:
        before = state_of(e)
        e.accumulate(batch(), TARGETS)
        e.step(0.0)
        torch.testing.assert_close(before.params, state_of(e).params, rtol=0, atol=0)
        train(e, 1)
        assert not torch.equal(before.params["body.embed.weight"], state_of(e).params["body.embed.weight"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_is_not_finite_changes_nothing(variant: Variant) -> None:
    with engine_of(variant) as e, engine_of(variant) as undisturbed:
        train(e, 2)
        train(undisturbed, 2)
        e.accumulate(batch(), float("nan"))
        assert not e.step(1.0).isfinite()
        assert_equal(state_of(e), state_of(undisturbed))
        assert torch.equal(train(e, 2), train(undisturbed, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_uses_the_precision_and_keeps_no_gradient(variant: Variant) -> None:
    def logits(model: nn.Module) -> Tensor:
        return model(batch().tokens, batch().document_ids)

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with engine_of(variant, precision=precision) as e:
            before = e.forward(logits)
            assert before.dtype == dtype
            assert not before.requires_grad
            assert e.forward(lambda model: next_token.loss(model, batch())).count == TARGETS
            train(e, 1)
            assert not torch.equal(before, e.forward(logits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_is_whole_and_keeps_still(variant: Variant) -> None:
    with engine_of(variant) as e:
        train(e, 1)
        state = state_of(e)
        shapes = {name: p.shape for name, p in LanguageModel(MODEL).named_parameters()}
        assert {name: t.shape for name, t in state.params.items()} == shapes  # the tied head once
        for name, moments in state.optimizer.items():
            assert {t.shape for t in moments.values()} == {shapes[name]}
        tensors = [*state.params.values(), *(t for m in state.optimizer.values() for t in m.values())]
        assert all(t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        copies = [t.clone() for t in tensors]
        train(e, 1)
        assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_of_another_model_is_refused(variant: Variant) -> None:
    larger = ModelConfig(vocab_size=1024, d_model=128, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=96, seq_len=16)
    with engine_of(variant) as e, engine_of(PLAIN, model=larger) as other:
        with pytest.raises(UsageError, match=r"body\.blocks\.2\.attention\.k_proj.*absent in the model"):
            e.restore(state_of(other))
        train(e, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_activations_changes_no_bit(variant: Variant, precision: str) -> None:
    kept = replace(MODEL, dropout=0.1)
    recomputed = replace(kept, activation_checkpointing=True)
    with (
        engine_of(variant, model=kept, precision=precision) as first,
        engine_of(variant, model=recomputed, precision=precision) as second,
    ):
        assert torch.equal(train(first, 4, parts=2), train(second, 4, parts=2))
        assert_equal(state_of(first), state_of(second))


@pytest.mark.parametrize("variant", CUT)
def test_buckets_and_thresholds_of_the_user_s_own_change_nothing(variant: Variant) -> None:
    sizes = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "sub_group_size": 10_000}
    sizes |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "overlap_comm": False}
    given = {"zero_optimization": sizes}
    with engine_of(variant) as first, engine_of(variant, seed=1, deepspeed=given) as second:
        train(second, 1)
        train(first, 3)
        second.restore(state_of(first))
        assert_equal(state_of(first), state_of(second))
        torch.testing.assert_close(train(first, 3), train(second, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_what_deepspeed_cannot_take_is_refused_by_name() -> None:
    refused = pytest.raises(UsageError, match=r"deepspeed_config: .*\n.*reduce_bucket_size=-1: .*greater than 0")
    with refused, engine_of(Variant("deepspeed", 1), deepspeed={"zero_optimization": {"reduce_bucket_size": -1}}):
        pass


@pytest.mark.parametrize("variant", WHOLE)
def test_muon_trains_and_resumes_wherever_matrices_are_whole(variant: Variant) -> None:
    muon = OptimizerConfig(name="muon", lr=3e-3)
    with engine_of(variant, optimizer=muon) as first, engine_of(variant, optimizer=muon, seed=1) as second:
        losses = train(first, 10)[:, 0]
        assert losses[-1] < 0.5 * losses[0]
        second.restore(state_of(first))
        assert torch.equal(train(first, 3), train(second, 3))
        first.accumulate(batch(), float("nan"))
        before = state_of(first)
        first.step(1.0)
        torch.testing.assert_close(before.params, state_of(first).params, rtol=0, atol=0)


@pytest.mark.parametrize("variant", WHOLE)
def test_a_running_mean_of_the_weights_is_what_is_used_and_kept(variant: Variant) -> None:
    settings = OptimizerConfig(name="muon", lr=1e-2, average=0.5)
    with engine_of(variant, optimizer=settings) as first, engine_of(variant, optimizer=settings, seed=1) as second:
        train(first, 2)
        second.restore(state_of(first))
        weights = []
        for _ in range(3):
            train(first, 1)
            weights.append(state_of(first).params)
        train(second, 3)
        assert_equal(state_of(first), state_of(second))
        kept = join([first.shard().weights_only()]).params
        assert kept.keys() == weights[-1].keys()
        used = first.forward(lambda model: {name: p.detach().clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(used, dict(kept), rtol=0, atol=0)
        assert all(not torch.equal(kept[name], own) for name, own in weights[-1].items())


@pytest.mark.parametrize("variant", CUT)
def test_a_running_mean_of_cut_weights_is_refused(variant: Variant) -> None:
    with (
        pytest.raises(UsageError, match=r"average=0.5.*zero_stage=\d"),
        engine_of(variant, optimizer=OptimizerConfig(average=0.5)),
    ):
        pass


@pytest.mark.parametrize("variant", CUT)
def test_muon_on_cut_matrices_is_refused(variant: Variant) -> None:
    with (
        pytest.raises(UsageError, match=r"optimizer=muon.*zero_stage=\d"),
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


def _rank(folder: Path) -> None:
    """One of two ranks: of each variant three steps on half the rows, and a checkpoint."""
    torch.set_num_threads(1)
    for variant in SHARED:
        model = replace(ODD, activation_checkpointing=variant.offload != "none")
        with engine_of(variant, model=model) as e:
            if variant.stage > 0:
                e.restore(checkpoint.load(folder / str(SHARED[0]) / "step-00000003").state)
            for _ in range(3):
                e.accumulate(batch(slice(e.rank, None, e.world_size)), TARGETS)
                e.step(1.0)
            part = e.shard()
            writer = checkpoint.Writer(rank=e.rank, world_size=e.world_size)
            checkpoint.save(folder / str(variant), part.optimizer_step, part, {}, writer)
            assert e.agree([e.rank, -e.rank]) == [e.world_size - 1, 0]
            assert e.sum(torch.tensor(float(e.rank + 1))) == 3


SHARED = [v for v in ALL if v.name == "deepspeed"]
# Sizes that two ranks do not divide.
ODD = ModelConfig(vocab_size=1025, d_model=102, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=95, seq_len=16)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(Path(__file__).parent)!r}]\n"
        f"import pathlib, test_engines; test_engines._rank(pathlib.Path({str(tmp_path)!r}))"
    )
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
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
