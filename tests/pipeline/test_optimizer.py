import math

import pytest
import torch
from torch import nn

from pipeline import optimizer
from pipeline.optimizer import OptimizerConfig, build


class Toy(nn.Module):
    """The parameter names of a decoder, at toy sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build_for(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    return build(model.named_parameters(), config, n_layers=2)


def settings(opt: torch.optim.Optimizer, key: str) -> dict[str, float]:
    return {name: group[key] for group in opt.param_groups for name in group["param_names"]}


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        tokens = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_of_blocks_decay(name: str) -> None:
    decay = settings(build_for(Toy(), OptimizerConfig(name=name, weight_decay=0.3)), "weight_decay")
    assert {n for n, value in decay.items() if value} == {"blocks.0.0.weight", "blocks.1.0.weight"}
    assert set(decay) == {n for n, _ in Toy().named_parameters()}


def test_muon_trains_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    model = Toy()
    opt = build_for(model, OptimizerConfig(name="muon"))
    train(model, opt, 1)
    kinds = {name: set(state) for name, state in optimizer.moments(opt).items()}
    assert {n for n, keys in kinds.items() if keys == {"momentum_buffer"}} == {"blocks.0.0.weight", "blocks.1.0.weight"}
    assert {n for n, keys in kinds.items() if keys == {"exp_avg", "exp_avg_sq"}} == set(kinds) - {
        "blocks.0.0.weight",
        "blocks.1.0.weight",
    }


def test_muon_may_have_a_rate_of_its_own() -> None:
    rates = settings(build_for(Toy(), OptimizerConfig(name="muon", lr=1e-3, muon_lr=1e-2)), "lr")
    assert (rates["blocks.0.0.weight"], rates["embed.weight"]) == (1e-2, 1e-3)


def test_a_head_may_have_a_rate_of_its_own_but_not_one_that_is_the_embedding() -> None:
    config = OptimizerConfig(lr=1e-3, head_lr=1e-2, layer_lr_decay=0.5)
    rates = settings(build_for(Toy(), config), "lr")
    assert (rates["head.weight"], rates["blocks.1.0.weight"]) == (1e-2, 5e-4)
    tied = Toy()
    tied.head.weight = tied.embed.weight
    assert settings(build_for(tied, config), "lr")["embed.weight"] == 1e-3 * 0.5**3


def test_lower_layers_learn_more_slowly_when_told_so() -> None:
    rates = settings(build_for(Toy(), OptimizerConfig(lr=1.0, layer_lr_decay=0.5)), "initial_lr")
    assert {n: rates[n] for n in ("head.weight", "blocks.1.0.weight", "blocks.0.1.bias", "embed.weight")} == {
        "head.weight": 1.0,
        "blocks.1.0.weight": 0.5,
        "blocks.0.1.bias": 0.25,
        "embed.weight": 0.125,
    }


def test_a_tied_weight_counts_once_and_a_frozen_one_not_at_all() -> None:
    model = Toy()
    model.head.weight = model.embed.weight
    model.blocks[0].requires_grad_(False)
    opt = build(model.named_parameters(remove_duplicate=False), OptimizerConfig(), n_layers=2)
    names = set(settings(opt, "lr"))
    assert "embed.weight" in names
    assert not any(n == "head.weight" or n.startswith("blocks.0") for n in names)


def test_the_rate_scales_from_its_peak_however_often() -> None:
    opt = build_for(Toy(), OptimizerConfig(lr=0.2, layer_lr_decay=0.5))
    for scale in (0.5, 0.1, 1.0):
        optimizer.scale_lr(opt, scale)
        assert settings(opt, "lr") == {n: lr * scale for n, lr in settings(opt, "initial_lr").items()}


def test_adamw_takes_the_step_of_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    opt = build([("blocks.0.weight", weight)], OptimizerConfig(lr=0.1, weight_decay=0.5), n_layers=1)
    weight.grad = torch.tensor([[3.0, -4.0]])
    opt.step()
    # the first step has bias-corrected moments of g and g^2, so it moves by lr * sign(g) after decaying
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_equal_runs_are_equal_bit_for_bit(name: str) -> None:
    models = Toy(), Toy()
    for model in models:
        train(model, build_for(model, OptimizerConfig(name=name)), 5)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_moments_go_on_bit_for_bit(name: str) -> None:
    first, second = Toy(), Toy()
    config = OptimizerConfig(name=name)
    opts = build_for(first, config), build_for(second, config)
    train(first, opts[0], 3)
    second.load_state_dict(first.state_dict())
    optimizer.restore(opts[1], optimizer.moments(opts[0]), optimizer.steps_taken(opts[0]))
    assert optimizer.steps_taken(opts[1]) == 3
    train(first, opts[0], 2)
    train(second, opts[1], 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_restored_moments_are_the_optimizers_own() -> None:
    model = Toy()
    opt = build_for(model, OptimizerConfig())
    train(model, opt, 1)
    saved = optimizer.moments(opt)
    before = saved["embed.weight"]["exp_avg"].clone()
    optimizer.restore(opt, saved, 1)
    train(model, opt, 1)
    assert torch.equal(saved["embed.weight"]["exp_avg"], before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_told_to_hold_still_it_moves_no_weight_and_then_goes_on(name: str) -> None:
    model = Toy()
    opt = build_for(model, OptimizerConfig(name=name))
    train(model, opt, 2)
    before = [p.clone() for p in model.parameters()]
    optimizer.hold_if(opt, torch.tensor(True))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.steps_taken(opt) == 2
    optimizer.hold_if(opt, torch.tensor(False))
    train(model, opt, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_layers_thaw_from_the_top_down_and_learn_nothing_before():
    model = Toy()
    opt = build_for(model, OptimizerConfig(lr=0.1, unfreeze=0.6))
    thaw = settings(opt, "thaw")
    assert thaw["head.weight"] == 0
    assert (thaw["blocks.1.0.weight"], thaw["blocks.0.0.weight"], thaw["embed.weight"]) == pytest.approx(
        (0.2, 0.4, 0.6)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.scale_lr(opt, 1.0, done=0.3)
    train(model, opt, 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith(("head", "blocks.1"))}
    optimizer.scale_lr(opt, 0.5, done=0.6)
    assert set(settings(opt, "lr").values()) == {0.05}


def test_nothing_is_frozen_unless_asked_for():
    assert set(settings(build_for(Toy(), OptimizerConfig()), "thaw").values()) == {0.0}


def weights_seen(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    """[steps, n]: all weights after each step."""
    seen = []
    for _ in range(steps):
        train(model, opt, 1)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(seen)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_running_mean_weighs_steps_by_polynomial_decay(name: str, share: float) -> None:
    model = Toy()
    opt = build_for(model, OptimizerConfig(name=name, average=share))
    seen = weights_seen(model, opt, 12)
    with optimizer.averaged(opt):
        mean = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    lag = round(1 / share) - 1
    counts = torch.tensor([math.prod(range(step, step + lag)) for step in range(1, 13)], dtype=torch.float32)
    torch.testing.assert_close(mean, counts @ seen / counts.sum(), atol=1e-6, rtol=0)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), seen[-1])


def test_a_step_that_is_held_leaves_the_running_mean_as_it_was() -> None:
    model = Toy()
    opt = build_for(model, OptimizerConfig(name="muon", average=0.5))
    train(model, opt, 3)
    before = {name: own["average"].clone() for name, own in optimizer.moments(opt).items()}
    optimizer.hold_if(opt, torch.tensor(True))
    train(model, opt, 1)
    assert all(torch.equal(own["average"], before[name]) for name, own in optimizer.moments(opt).items())
