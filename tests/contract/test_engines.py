"""Every engine, at every ZeRO stage it has, trains like the plain one and can take a run over from any other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.heads import LanguageModel
from model.objectives import next_token
from pipeline.errors import UsageError
from pipeline.optimizer import OptimizerConfig
from pipeline.state import join
from tests.contract.engines import (
    CUT,
    MODEL,
    PLAIN,
    TARGETS,
    VARIANTS,
    WHOLE,
    Variant,
    assert_equal,
    batch,
    engine_of,
    plain_course,
    state_of,
    train,
)


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
