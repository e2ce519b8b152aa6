"""Which parameter is trained how: AdamW for all, or Muon for the matrices of the blocks; and its state, by name."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipeline.muon import Muon
from pipeline.state import AVERAGE

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_ADAPTER = re.compile(r"\.lora_[AB]\.")
_HEAD = re.compile(r"^head\.")
_EMBEDDING = re.compile(r"(?:^|\.)embed\.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights follow gradients. Learning rates are the peak ones; the schedule scales them."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv:1711.05101) for all, or Muon (arXiv:2502.16982) for the blocks' matrices and AdamW for the rest."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """AdamW's learning rate."""
    muon_lr: Annotated[float, Gt(0)] | None = None
    """Muon's learning rate; null is `lr`, which suits because Muon's updates are scaled to the size of AdamW's."""
    head_lr: Annotated[float, Gt(0)] | None = None
    """AdamW's learning rate of a head with weights of its own; null is `lr`."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled decay of the blocks' matrices, times the learning rate. Embeddings, norms, heads, adapters: none."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW's memory of the gradient."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW's memory of the squared gradient."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to AdamW's denominator."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Muon's memory of the gradient."""
    layer_lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """A layer's learning rate over that of the layer above it; below 1 for fine-tuning (arXiv:1801.06146)."""
    unfreeze: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Part of training after which all layers learn: the head from the start, each layer later than the one above it
    (gradual unfreezing, arXiv:1801.06146)."""
    average: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the steps so far, about, that the weights' running mean looks back over (arXiv:1212.1824, polynomial
    decay); 0 keeps no mean."""


class _Recipe(NamedTuple):
    kind: Literal["adamw", "muon"]
    lr: float
    weight_decay: float
    thaw: float


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, n_layers: int) -> Optimizer:
    """One torch optimizer over all trainable parameters; a parameter tied under two names counts once, by its first.

    Every group has "param_names", "initial_lr", its peak learning rate, and "thaw", the part of training before which
    it stays as it is.
    """
    groups: dict[_Recipe, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in _trainable(named_parameters):
        groups.setdefault(_recipe(name, parameter, config, n_layers), []).append((name, parameter))
    parts = [_part(kind, groups, config) for kind in ("adamw", "muon") if any(r.kind == kind for r in groups)]
    optimizer = parts[0] if len(parts) == 1 else Joint(parts)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if config.average:
        optimizer.register_step_post_hook(lambda done, *_: _follow(done, config.average))
    return optimizer


def _trainable(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and parameter not in seen:
            seen.add(parameter)
            yield name, parameter


def _recipe(name: str, parameter: nn.Parameter, config: OptimizerConfig, n_layers: int) -> _Recipe:
    block = _BLOCK.search(name)
    below_top = n_layers - int(block[1]) if block else (n_layers + 1 if _EMBEDDING.search(name) else 0)
    scale, thaw = config.layer_lr_decay**below_top, config.unfreeze * below_top / (n_layers + 1)
    if _HEAD.search(name):
        return _Recipe("adamw", config.head_lr or config.lr, 0.0, thaw)
    if not block or parameter.ndim < 2 or _ADAPTER.search(name):
        return _Recipe("adamw", config.lr * scale, 0.0, thaw)
    if config.name == "muon" and parameter.ndim == 2:
        return _Recipe("muon", (config.muon_lr or config.lr) * scale, config.weight_decay, thaw)
    return _Recipe("adamw", config.lr * scale, config.weight_decay, thaw)


def _part(
    kind: str, groups: Mapping[_Recipe, list[tuple[str, nn.Parameter]]], config: OptimizerConfig
) -> "AdamW | Muon":
    own: list[dict[str, Any]] = [
        {"params": members, "lr": recipe.lr, "weight_decay": recipe.weight_decay, "thaw": recipe.thaw}
        for recipe, members in groups.items()
        if recipe.kind == kind
    ]
    if kind == "muon":
        return Muon(own, momentum=config.momentum)
    return AdamW(own, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class Joint(Optimizer):
    """Several optimizers behind the face of one: they share its groups and its state."""

    found_inf: Tensor | None = None

    def __init__(self, parts: "Sequence[AdamW | Muon]") -> None:
        super().__init__([group for part in parts for group in part.param_groups], defaults={})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del closure
        for part in self.parts:
            if self.found_inf is not None:
                hold_if(part, self.found_inf)
            part.step()


def scale_lr(optimizer: Optimizer, scale: float, done: float = 1.0) -> None:
    """Set the learning rate of every group to `scale` times its peak, or to 0 where it is frozen until later.

    `done` is the part of training that is over. A frozen group's gradients are remembered, so that it begins in swing.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale * (done >= group["thaw"])


def hold_if(optimizer: Optimizer, bad: Tensor) -> None:
    """Make the next steps leave the weights as they are if `bad`, a 0-dim bool that the host need not know."""
    optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]  # torch.amp's protocol


@torch.no_grad()
def _follow(optimizer: Optimizer, share: float) -> None:
    """Move each running mean after a step: all the way in the first, and by 1 / (share * step) in the long run."""
    lag = 1 / share - 1
    steps = next(state["step"] for state in optimizer.state.values() if "step" in state)
    weight = (1 + lag) / (steps + lag)
    if (held := getattr(optimizer, "found_inf", None)) is not None:
        weight = weight * (1 - held)
    for parameter, own in optimizer.state.items():
        if AVERAGE in own:
            own[AVERAGE].lerp_(parameter, weight)
        else:
            own[AVERAGE] = parameter.clone()


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """The running means in the place of the weights, where they are kept; nothing is copied."""
    _exchange(optimizer)
    try:
        yield
    finally:
        _exchange(optimizer)


def _exchange(optimizer: Optimizer) -> None:
    for parameter, own in optimizer.state.items():
        if AVERAGE in own:
            parameter.data, own[AVERAGE] = own[AVERAGE], parameter.data


def moments(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter, its own tensors and not copies; {} before the first step."""
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if key != "step"}
        for name, parameter in _named(optimizer)
        if parameter in optimizer.state
    }


def steps_taken(optimizer: Optimizer) -> int:
    """How many steps AdamW's bias correction has counted. Waits for the device."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def restore(optimizer: Optimizer, saved: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
    """Put back what `moments` and `steps_taken` gave. A parameter that `saved` lacks starts afresh."""
    optimizer.state.clear()
    for name, parameter in _named(optimizer):
        if name not in saved:
            continue
        state = {key: value.to(parameter.device, copy=True) for key, value in saved[name].items()}
        if "exp_avg" in state:
            state["step"] = torch.tensor(float(steps), device=parameter.device)
        optimizer.state[parameter] = state


def _named(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
