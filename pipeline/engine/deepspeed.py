"""The DeepSpeed engine: the plain engine's numbers, with optimizer state, gradients and weights shared out over ranks.

The model stays float32 to DeepSpeed and autocast is ours, inside its forward pass, so gradients are added up and
reduced in float32 at every ZeRO stage. Accumulation is ours too: DeepSpeed neither counts nor rescales micro batches.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from model.batch import Batch
from pipeline import deepspeed_config
from pipeline import optimizer as optimizers
from pipeline.config import laid_over
from pipeline.engine import SILENCE, EngineSettings, Hold, Objective, not_finite, pick_device
from pipeline.engine.plain import clip, replicated_shard, restore_whole
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import Precision, autocast, resolve
from pipeline.state import Piece, Shard, TrainState, check_same_model, owners, piece

T = TypeVar("T")

ZERO_STAGES = (0, 1, 2, 3)
FETCH_TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others where one may be downloading its inputs, or a checkpoint."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Runner(nn.Module):
    """The module that DeepSpeed wraps: any work on the model, so that every forward pass goes through its hooks."""

    def __init__(self, model: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._precision: Precision = precision
        self._device = device

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        with autocast(self._precision, self._device):
            return work(self.model)


class Replicated:
    """Stage 0: every rank has all of the state, so the plain engine's ways do."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self._model, self._optimizer = model, optimizer
        self.hold: Hold = not_finite
        self._norm = torch.zeros(())

        def before_update(*_: object) -> None:
            self._norm = clip(model, optimizer, grad_clip, self.hold)

        optimizer.register_step_pre_hook(before_update)  # between DeepSpeed's reduction and the update

    def norm(self) -> Tensor:
        return self._norm

    def shard(self) -> Shard:
        return replicated_shard(self._model, self._optimizer, distributed.get_rank(), distributed.get_world_size())

    def restore(self, state: TrainState) -> None:
        restore_whole(self._model, self._optimizer, state)


class Sharded:
    """Stages 1 to 3: every rank has a part of the flattened optimizer state; at stage 3, of the weights as well."""

    def __init__(self, library: ModuleType, engine: Any, model: nn.Module) -> None:
        self._library, self._engine = library, engine
        self._zero, self._base = engine.optimizer, engine.basic_optimizer
        self._params: dict[str, Any] = dict(model.named_parameters())
        self._shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._params.items()}
        self.hold: Hold = not_finite
        home = self._flats()[0].device

        def before_update(*_: object) -> None:  # DeepSpeed has the norm by then, and has clipped the gradients
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=engine.device)
            # where the update is offloaded the host has to wait for the verdict, as it has to for the gradients
            optimizers.hold_if(self._base, self.hold(norm).to(home))

        self._base.register_step_pre_hook(before_update)

    def norm(self) -> Tensor:
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._engine.device)

    def shard(self) -> Shard:
        """This rank's partition as it lies in memory: nothing is gathered."""
        steps = optimizers.steps_taken(self._base)
        self._link_moments()
        mine = owners(self._shapes, distributed.get_world_size())
        params: dict[str, Piece] = {}
        moments: dict[str, dict[str, Piece]] = {}
        for name, p in self._params.items():
            if (part := self._partition(p)) is not None:
                params[name] = part()
                moments[name] = {key: part(key) for key in MOMENTS} if steps else {}
            elif not p.requires_grad and not hasattr(p, "ds_tensor") and mine[name] == distributed.get_rank():
                params[name] = piece(p)
        return Shard(params, moments if steps else {}, steps, self._shapes)

    def _partition(self, parameter: Any) -> "Callable[..., Piece] | None":
        """What gives this rank's elements of a parameter, or of one of its moments; None where it has none."""
        if hasattr(parameter, "ds_tensor"):
            return self._stage3_partition(parameter)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        return lambda key=None: piece(mapping.get_hp_fragment(key), mapping.lp_fragment_address.start)

    def _stage3_partition(self, parameter: Any) -> "Callable[..., Piece] | None":
        size, whole_size = parameter.ds_tensor.numel(), parameter.ds_numel
        start = distributed.get_rank() * size
        if start >= whole_size:
            return None
        utils = self._library.utils

        def part(key: str | None = None) -> Piece:
            if not parameter.requires_grad:
                own = parameter.ds_tensor
            elif key is None:
                own = utils.safe_get_local_fp32_param(parameter)
            else:
                own = utils.safe_get_local_optimizer_state(parameter, key)
            return piece(own.flatten()[: whole_size - start], start)  # the last rank's is padded

        return part

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        check_same_model(state.shapes, self._shapes)
        for name, p in self._params.items():
            with self._library.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(state.params[name])
        self._zero.refresh_fp32_params()
        self._make_moments(state.optimizer_step)
        for name, p in self._params.items():
            if p.requires_grad and name in state.optimizer:
                self._set_moments(p, state.optimizer[name])

    def _make_moments(self, steps: int) -> None:
        """Give the optimizer the state that it would otherwise make in its first step."""
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._base.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **zeros}
        self._link_moments()

    def _flats(self) -> Sequence[Tensor]:
        """This rank's part of the float32 weights, as the optimizer has them: on the CPU where it is offloaded."""
        if self._engine.zero_optimization_stage() == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _link_moments(self) -> None:
        """Give each parameter its view of the flat state; DeepSpeed does so too early for all groups but the first."""
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_moments(self, parameter: Any, moments: Mapping[str, Tensor]) -> None:
        for key in MOMENTS:
            if hasattr(parameter, "ds_tensor"):  # safe_set_full_ needs a size that the ranks divide
                part = _own_part(moments[key], parameter.ds_tensor.numel())
                self._library.utils.safe_set_local_optimizer_state(parameter, part, key)
            else:
                self._library.utils.safe_set_full_optimizer_state(parameter, moments[key], key)


def _own_part(whole: Tensor, size: int) -> Tensor:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    return pad(whole.flatten(), (0, size * world_size - whole.numel()))[rank * size :][:size]


class DeepSpeed:
    """`pipeline.engine.Engine` on as many ranks as torch.distributed or the launcher's environment has."""

    def __init__(
        self,
        engine: Any,
        store: Replicated | Sharded,
        objective: Objective,
        device: torch.device,
        patient: Any,
    ) -> None:
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()
        self.device = device
        self._engine, self._store, self._objective = engine, store, objective
        self._patient = patient
        self._hosts = distributed.new_group(backend="gloo", timeout=_timeout())  # NCCL would wait for the device

    def accumulate(self, batch: Batch, denominator: float) -> Tensor:
        batch = batch.to(self.device)
        total: Tensor = self._engine(lambda model: self._objective(model, batch).sum)
        # DeepSpeed takes the mean over ranks; the gradient wanted is the sum
        self._engine.backward(total / denominator * self.world_size, scale_wrt_gas=False)
        return total.detach()

    def step(self, lr_scale: float, hold: Hold = not_finite, done: float = 1.0) -> Tensor:
        optimizers.scale_lr(self._engine.basic_optimizer, lr_scale, done)
        self._store.hold = hold
        self._engine.step()
        return self._store.norm()

    @torch.no_grad()
    def forward(self, function: Callable[[nn.Module], T]) -> T:
        results = list[T]()
        # passed around DeepSpeed, whose hooks know tensors and plain containers only
        with optimizers.averaged(self._engine.basic_optimizer):
            self._engine(lambda model: results.append(function(model)))
        return results[0]

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    def agree(self, values: Sequence[float]) -> list[float]:
        numbers = torch.tensor([0.0, *values], dtype=torch.float64)  # with nothing to say, gloo would not wait
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._hosts)
        return numbers[1:].tolist()

    def wait(self) -> None:
        distributed.barrier(self._patient)

    def shard(self) -> Shard:
        return self._store.shard()

    def restore(self, state: TrainState) -> None:
        self._store.restore(state)

    def close(self) -> None:
        self._engine.destroy()


def create(
    model: nn.Module,
    objective: Objective,
    *,
    optimizer: OptimizerConfig,
    precision: str,
    grad_clip: float,
    settings: EngineSettings,
    n_layers: int,
) -> DeepSpeed:
    """See `pipeline.engine.create`."""
    stage = settings.zero_stage
    device = pick_device(settings.device)
    library = _library(device)
    _join_group(device)
    # made first of all, which takes every rank: each has its inputs by then, and what follows waits for less long
    patient = distributed.new_group(backend="gloo", timeout=FETCH_TIMEOUT)
    base = optimizers.build(model.to(device).named_parameters(), optimizer, n_layers)
    runner = Runner(model, resolve(precision, device), device)
    engine = _initialize(library, runner, base, _config(settings, grad_clip))
    store = Sharded(library, engine, model) if stage else Replicated(model, base, grad_clip)
    return DeepSpeed(engine, store, objective, device, patient)


def _library(device: torch.device) -> ModuleType:
    """DeepSpeed, imported so that it neither looks for a GPU that is not used nor compiles anything."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as missing:
        raise EnvironmentProblem(
            "engine=deepspeed needs a package that is not installed: pip install 'gristmill[deepspeed]', "
            "or set engine to plain"
        ) from missing
    ops: Any = deepspeed.ops
    ops.__compatible_ops__ = {}  # else it probes the compiler and builds an op that training never uses, 80 s
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [], True  # its own handler writes to stdout
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's to heed
    return deepspeed


def _join_group(device: torch.device) -> None:
    """Make the process group from the launcher's environment unless there is one; without a launcher, one of one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group(backend, timeout=_timeout())
    else:
        alone = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=_timeout())


def _timeout() -> timedelta:
    """How long a rank waits for the others before it gives up: a while longer than its launcher would."""
    return timedelta(seconds=2 * float(os.environ.get(SILENCE, "60")))


def _initialize(library: ModuleType, runner: Runner, base: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    try:
        return library.initialize(model=runner, optimizer=base, config=config, dist_init_required=False)[0]
    except ValidationError as error:
        wrong = "\n".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise UsageError(f"deepspeed_config: {error.title} of DeepSpeed refuses\n{wrong}") from None


def _config(settings: EngineSettings, grad_clip: float) -> dict[str, Any]:
    stage = settings.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # unused, but it insists on one
        "gradient_clipping": grad_clip if stage else 0.0,
        "zero_optimization": zero,
        **deepspeed_config.ENGINE,
    }
    quiet = {"timers": {"throughput": {"enabled": False}}}
    return laid_over(laid_over(quiet, settings.deepspeed), ours)
