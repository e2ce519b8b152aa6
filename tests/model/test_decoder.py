from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.batch import Batch
from model.heads import LanguageModel
from model.objectives import next_token
from tests.model.toys import ids, language_model, tokens

SHAPES = [{}, {"sliding_window": 3}, {"causal": False}, {"n_kv_heads": 1}]


@pytest.mark.parametrize("changes", SHAPES)
def test_a_document_does_not_notice_its_neighbours(changes: dict):
    model = language_model(**changes)
    mine, packing = tokens(1, 5, seed=1), ids([0] * 4 + [1] * 5 + [2] * 3 + [-1] * 2)

    def packed(neighbours: int) -> torch.Tensor:
        row = torch.cat([tokens(1, 4, seed=neighbours), mine, tokens(1, 5, seed=neighbours + 1)], dim=1)
        return model(row, packing)[:, 4:9]

    torch.testing.assert_close(packed(10), packed(20), atol=0, rtol=0)
    torch.testing.assert_close(packed(10), model(mine), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [(3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("changes", SHAPES)
def test_padding_changes_no_logits(pad: tuple[int, int], changes: dict):
    model, text = language_model(**changes), tokens(2, 6)
    padded = torch.nn.functional.pad(text, pad)
    where = torch.nn.functional.pad(torch.zeros(2, 6, dtype=torch.int32), pad, value=-1)
    logits = model(padded, where)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, pad[0] : pad[0] + 6], model(text), atol=1e-5, rtol=1e-5)


def test_a_causal_body_does_not_see_the_future_and_a_full_one_does():
    a, b = tokens(1, 6), tokens(1, 6)
    b[0, 5] = (a[0, 5] + 1) % 48
    for causal in (True, False):
        model = language_model(causal=causal)
        assert torch.equal(model(a)[:, :5], model(b)[:, :5]) == causal


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"n_layers": 1}])
def test_states_of_some_places_are_those_of_all_places(changes: dict):
    body, text, packing = language_model(**changes).body, tokens(2, 6), ids([0] * 6, [0, 0, 1, 1, 1, -1])
    read = partial(body, text, packing, dropout_keys=torch.tensor([1, 2]))
    places = torch.tensor([7, 0, 10])
    torch.testing.assert_close(read(only=places), read().flatten(0, 1)[places][None])


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_mask_and_the_angles_are_made_once_a_forward():
    model = language_model(n_layers=3)
    with Counted() as operators:
        model(tokens(1, 4), ids([0, 0, 1, 1]))
    angles, mask = (operators.of["cos"], operators.of["sin"]), (operators.of["eq"], operators.of["le"])
    assert (angles, mask) == ((1, 1), (1, 1))
    assert operators.of["silu"] == 3


def test_the_forward_pass_never_reads_values_back_from_the_device():
    """On the meta device there are no values, so any wait for one raises."""
    model = language_model(dropout=0.1).to("meta")
    row, keys = torch.zeros(2, 8, dtype=torch.int64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert model(row, row.int(), dropout_keys=keys).shape == (2, 8, 48)


@pytest.mark.parametrize("name", ["reference", "sdpa", "auto"])
def test_bfloat16_autocast_stays_near_float32(name: str):
    model, text = language_model(attention=name, scale=1.0), tokens(2, 8)
    packing = ids([0] * 3 + [1] * 5, [0] * 6 + [-1] * 2)
    exact = model(text, packing)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(text, packing)
    torch.testing.assert_close(rough.float(), exact, atol=2e-2, rtol=2e-2)
    assert rough.dtype == torch.bfloat16


def test_the_whole_model_runs_in_float64():
    assert language_model().double()(tokens(1, 4), ids([0, 0, 1, 1])).dtype == torch.float64


def loss_and_gradients(model: LanguageModel, precision: str) -> list[torch.Tensor]:
    row, where = tokens(2, 12), ids([0] * 5 + [1] * 7, [0] * 10 + [-1] * 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = next_token.loss(model, Batch(row, row.roll(-1, 1), where, torch.tensor([3, 4]))).sum
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_recomputing_activations_changes_no_bit(changes: dict, precision: str, attention: str):
    shape = {"dropout": 0.2, "attention": attention, **changes}
    kept = loss_and_gradients(language_model(**shape), precision)
    recomputed = loss_and_gradients(language_model(**shape, activation_checkpointing=True), precision)
    assert len(kept) > 10
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_recomputing_keeps_one_hidden_state_a_block():
    def kept_bytes(n_layers: int, **changes: Any) -> int:
        kept: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model = language_model(n_layers=n_layers, **changes)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = model.body(tokens(2, 16))
        del hidden
        return sum(size for where, size in kept.items() if where not in weights)

    hidden_bytes = 2 * 16 * 32 * 4
    per_block = kept_bytes(3) - kept_bytes(2)
    per_block_recomputed = kept_bytes(3, activation_checkpointing=True) - kept_bytes(2, activation_checkpointing=True)
    assert per_block > 8 * hidden_bytes
    assert per_block_recomputed == hidden_bytes


@pytest.mark.parametrize("changes", [{"activation_checkpointing": False}, {"activation_checkpointing": True}])
def test_blocks_run_again_for_gradients_only(changes: dict):
    model, runs = language_model(**changes), [0]
    for block in model.body.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))

    def runs_of(*, wanted: bool = True) -> int:
        runs[0] = 0
        with torch.set_grad_enabled(wanted):
            logits = model(tokens(1, 4))
        if wanted:
            logits.sum().backward()
        return runs[0]

    assert runs_of() == (4 if changes["activation_checkpointing"] else 2)
    assert runs_of(wanted=False) == 2
