"""What `gristmill tune` may change: a config key and the values it may take, as one word of the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UsageError
from pipeline.stages.finetune import FinetuneConfig


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included; whole ones if both are. `log`: every ratio is as likely."""

    low: float
    high: float
    log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, Any]:
        return self.values[0], self.values[-1]


Space = Mapping[str, Between | OneOf]


def parse(words: Sequence[str]) -> Space:
    """`finetune.lr=log:1e-4:1e-2`, `finetune.epochs=2:6`, `finetune.pooling=last,mean`. Raises UsageError."""
    return dict(_parse(word, number) for number, word in enumerate(words, 1))


def _parse(word: str, number: int) -> tuple[str, Between | OneOf]:
    key, equals, values = word.partition("=")
    where = f"--search #{number}  {word!r}"
    if not (key and equals and values):
        raise UsageError(f"{where}: write it as key=low:high, key=log:low:high or key=a,b,c")
    if ":" not in values:
        return key, OneOf(tuple(_value(part, where) for part in values.split(",")))
    *log, low, high = (_value(part, where) for part in values.split(":"))
    if log not in ([], ["log"]) or not all(isinstance(end, int | float) for end in (low, high)) or not low < high:
        raise UsageError(f"{where}: write numbers, the lower one first: low:high or log:low:high")
    if log and low <= 0:
        raise UsageError(f"{where}: log needs numbers above 0")
    return key, Between(low, high, bool(log))


def _value(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UsageError(f"{where}: {text!r} is not a YAML value: {error}") from None


def usual(finetune: FinetuneConfig, section: str) -> Space:
    """Where a search begins that is told nothing: rates up to four times off, and some dropout."""
    rates = {name: getattr(finetune, name) for name in _rates(finetune)}
    around = {f"{section}.{name}": Between(rate / 4, min(1.0, rate * 4), log=True) for name, rate in rates.items()}
    return around | {f"{section}.dropout": OneOf((0.0, 0.1, 0.2))}


def _rates(finetune: FinetuneConfig) -> list[str]:
    """The learning rates that this fine-tuning reads and says."""
    if finetune.method == "head" and finetune.head_lr:
        return ["head_lr"]
    by_muon = finetune.method == "full" and finetune.optimizer == "muon" and finetune.muon_lr
    return ["lr", "muon_lr"] if by_muon else ["lr"]
