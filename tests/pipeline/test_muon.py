import pytest
import torch
from torch import nn

from pipeline.muon import Muon, orthogonalized


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (64, 128), (128, 64), (160, 160)]  # large ones go by the kernel
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_walks_as_torch_s_muon_does(weight_decay: float):
    ours, theirs = matrices(), matrices()
    options = {"lr": 0.02, "weight_decay": weight_decay}
    moved = train(Muon([{"params": ours, **options}], momentum=0.95), ours, 5)
    expected = train(torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options), theirs, 5)
    for mine, reference, start in zip(moved, expected, matrices(), strict=True):
        assert (mine - reference).norm() < 0.02 * (reference - start).norm()  # bfloat16 products, in another order


def test_singular_values_come_close_to_one():
    stack = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_bad_step_moves_neither_weights_nor_momentum():
    parameters = matrices()
    optimizer = Muon([{"params": parameters, "lr": 0.02, "weight_decay": 0.1}], momentum=0.95)
    train(optimizer, parameters, 2)
    before = [p.detach().clone() for p in parameters]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, old, momentum in zip(parameters, before, momenta, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
