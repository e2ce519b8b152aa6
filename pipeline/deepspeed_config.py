"""A DeepSpeed JSON that the user brings: what is DeepSpeed's own matter passes, what fields of ours decide must agree.

"auto" stands for the value of our field, or for DeepSpeed's default where no field of ours decides. Keys that would
change what is trained are refused, because `deepspeed_config` is a knob: it may say only how training runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.optimizer import OptimizerConfig

ENGINE = {
    "managed_gradient_accumulation": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What the engine is built on: it counts micro batches itself, and its optimizer is torch's, wherever the state lies.

The last one also keeps offloading from compiling DeepSpeed's own Adam.
"""


class Decided(NamedTuple):
    """A key that a field of ours decides."""

    by: str
    """The field's name."""
    value: Any
    """What the key has to say; UNSAYABLE where nothing but "auto" can be right."""


class Refused(NamedTuple):
    """A key that does what nothing of ours can answer for."""

    reason: str
    unless: Any = False
    """The value at which it says what holds anyway."""


UNSAYABLE = object()
SWITCHED = ("bf16", "fp16", "bfloat16", "amp", "torch_autocast")
"""Sections that mean nothing unless `enabled` in them is true."""
SECTIONS = dict.fromkeys(SWITCHED, "precision") | {"optimizer": "optimizer", "scheduler": "schedule"}
"""Sections of which every key is decided by a field of ours."""
_OTHER_NUMBERS = "changes what is trained, and this file may say only how"
_OTHER_STATE = "keeps optimizer state where checkpoints do not look for it"
_OLD_NAME = "is DeepSpeed's old name for what offload decides"
REFUSED = {
    "communication_data_type": Refused(_OTHER_NUMBERS, unless="fp32"),
    "compression_training": Refused(_OTHER_NUMBERS),
    "curriculum_learning": Refused(_OTHER_NUMBERS),
    "data_efficiency": Refused(_OTHER_NUMBERS),
    "data_types": Refused(_OTHER_NUMBERS, unless={"grad_accum_dtype": "fp32"}),
    "gradient_allreduce_op": Refused(_OTHER_NUMBERS, unless="mean"),
    "progressive_layer_drop": Refused(_OTHER_NUMBERS),
    "weight_quantization": Refused(_OTHER_NUMBERS),
    "zero_optimization.zero_quantized_gradients": Refused(_OTHER_NUMBERS),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused(_OTHER_NUMBERS),
    "zero_optimization.zero_quantized_weights": Refused(_OTHER_NUMBERS),
    "zero_optimization.offload_optimizer.ratio": Refused(_OTHER_STATE, unless=1),
    "zero_optimization.offload_optimizer.super_offload": Refused(_OTHER_STATE),
    "zero_optimization.zenflow": Refused(_OTHER_STATE),
    "zero_optimization.cpu_offload": Refused(_OLD_NAME),
    "zero_optimization.cpu_offload_param": Refused(_OLD_NAME),
}


def read(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says beyond `fields`, those of a TrainingConfig by name, with its precision resolved.

    Raises UsageError naming file and place for what is no JSON object, and one that names, for every key that
    contradicts a field, the file, the key, both values and the remedy.
    """
    reading = _Reading(path, fields, _decided(fields))
    passed = reading.section(_parse(Path(path)), ())
    if reading.problems:
        raise UsageError("\n".join(reading.problems))
    return passed


@dataclass(frozen=True)
class _Reading:
    """A pass over the file that goes on after a problem, so that all of them can be told at once."""

    path: str
    fields: Mapping[str, Any]
    decided: Mapping[str, Decided]
    problems: list[str] = field(default_factory=list)

    def section(self, section: Mapping[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
        """What passes of a section; what cannot stand is added to the problems."""
        passed = {}
        for name, written in section.items():
            key, value = ".".join((*at, name)), _without_effect_removed(name, written)
            if value == "auto":
                continue
            if objection := self._objection(key, value):
                self.problems.append(f"{self.path}: {key}={json.dumps(value)} {objection}")
            elif isinstance(value, Mapping):
                inner = self.section(value, (*at, name))
                passed |= {name: inner} if inner else {}
            elif self._decides(key) is None:
                passed[name] = value
        return passed

    def _objection(self, key: str, value: Any) -> str | None:
        refused, decided = REFUSED.get(key), self._decides(key)
        if refused:
            return None if _same(value, refused.unless) or _is_off(value) else f"{refused.reason}; remove it"
        if decided is None or isinstance(value, Mapping) or _same(value, decided.value):
            return None
        what = "decides it" if decided.value is UNSAYABLE else f"makes it {json.dumps(decided.value)}"
        remedy = f'write "auto" or remove it, and set {decided.by} instead'
        return f"contradicts {decided.by}={self.fields.get(decided.by)}, which {what}; {remedy}"

    def _decides(self, key: str) -> Decided | None:
        section = key.partition(".")[0]
        return self.decided.get(key) or (Decided(SECTIONS[section], UNSAYABLE) if section in SECTIONS else None)


def _decided(fields: Mapping[str, Any]) -> dict[str, Decided]:
    given = OptimizerConfig(lr=fields["lr"], weight_decay=fields["weight_decay"], beta2=fields["beta2"])
    batch = "batch_size" if "batch_size" in fields else "global_batch_tokens"
    uses_bf16 = fields["precision"] == "bf16"
    return {
        "zero_optimization.stage": Decided("zero_stage", fields["zero_stage"]),
        "zero_optimization.offload_optimizer.device": Decided("offload", _home(fields, "optimizer", "all")),
        "zero_optimization.offload_param.device": Decided("offload", _home(fields, "all")),
        "gradient_clipping": Decided("grad_clip", fields["grad_clip"]),
        "train_batch_size": Decided(batch, fields.get("batch_size", UNSAYABLE)),
        "train_micro_batch_size_per_gpu": Decided("micro_batch_size", fields["micro_batch_size"]),
        "gradient_accumulation_steps": Decided("micro_batch_size", UNSAYABLE),
        "optimizer.type": Decided("optimizer", {"adamw": "AdamW", "muon": "Muon"}[fields["optimizer"]]),
        "optimizer.params.lr": Decided("lr", given.lr),
        "optimizer.params.weight_decay": Decided("weight_decay", given.weight_decay),
        "optimizer.params.betas": Decided("beta2", [given.beta1, given.beta2]),
        "optimizer.params.eps": Decided("optimizer", given.eps),
        **{f"{name}.enabled": Decided("precision", uses_bf16 and name.startswith("bf")) for name in SWITCHED},
        **{key: Decided("engine", value) for key, value in ENGINE.items()},
    }


def _home(fields: Mapping[str, Any], *moved: str) -> str:
    return "cpu" if fields["offload"] in moved else "none"


def _without_effect_removed(name: str, value: Any) -> Any:
    """A section that is off says no more than that: templates carry a loss scale for an fp16 that nobody uses."""
    return {"enabled": value.get("enabled", "auto")} if name in SWITCHED and _is_off(value) else value


def _is_off(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("enabled", "absent") in (False, "auto")


def _same(a: Any, b: Any) -> bool:
    """Equal, and not as True equals 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}:{error.colno}  not JSON: {error.msg}") from None
    except FileNotFoundError:
        raise UsageError(f"deepspeed_config={path}: no such file (looked at {path.absolute()})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"deepspeed_config={path}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path}:1:1  a DeepSpeed config is a JSON object such as {{}}")
    return document


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} stands in one section twice")
    return dict(pairs)
