"""First weights: each parameter draws from its own generator, so that adding one changes no other's numbers."""

import hashlib

import torch
from torch import Tensor, nn

STD = 0.02
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter in place: norms with one, matrices from normal(0, 0.02).

    The matrices that write to the residual stream, of which there are 2 n_layers, are divided by sqrt(2 n_layers), so
    that the stream's variance does not grow with depth (GPT-2). The numbers depend on the seed and on the parameter's
    name, `prefix` included, and on nothing else: not on device, process or order.
    """
    outputs = sum(name.endswith(RESIDUAL_OUTPUTS) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        std = STD * outputs**-0.5 if name.endswith(RESIDUAL_OUTPUTS) else STD
        parameter.copy_(_draw(parameter, std, f"{seed}/{prefix}{name}"))


def _draw(parameter: Tensor, std: float, key: str) -> Tensor:
    if parameter.ndim == 1:
        return torch.ones(parameter.shape)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randn(parameter.shape, generator=generator) * std
