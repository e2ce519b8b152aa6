"""Low-rank adaptation (LoRA, arXiv:2106.09685) through peft: a few small matrices learn, the body stays as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.init import initialize
from pipeline.errors import EnvironmentProblem

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Every matrix of a block: it measures better than the attention's alone (arXiv:2305.14314)."""


def add(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter beside every matrix of the blocks, in place; nothing but the adapters learns after this.

    The second matrix of each is zero, so that the model computes what it did. Raises EnvironmentProblem without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise EnvironmentProblem("finetune.method=lora needs peft: pip install 'gristmill[lora]'") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), model)  # pyright: ignore[reportArgumentType]
    initialize(_FirstMatrices(model), seed)


@torch.no_grad()
def merged(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the model without adapters that computes what this one does with `params`."""
    from peft.tuners.lora import LoraLayer

    model.load_state_dict(params, strict=False)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for module in adapted.values():
        module.merge()  # pyright: ignore[reportCallIssue]
    plain = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): p.detach() for name, p in plain.items()}


class _FirstMatrices(nn.Module):
    """The matrices that begin at random, under their names in the model: peft's own draw depends on the process."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = nn.ParameterDict(
            {name.replace(".", "/"): p for name, p in model.named_parameters() if ".lora_A." in name}
        )
