"""What `gristmill tune` may change: a config key and the values it may take, as one word of the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included; whole ones if both are. `log`: every ratio is as likely."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]


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


def usual(config: PipelineConfig, section: str) -> Space:
    """Where a search begins that is told nothing: rates up to four times off, and some dropout."""
    finetune = next(iter(config.all_tasks.values())).finetune
    rates = {"lr": finetune.lr} | ({"muon_lr": finetune.muon_lr} if finetune.muon_lr else {})
    around = {f"{section}.{name}": Between(rate / 4, min(1.0, rate * 4), log=True) for name, rate in rates.items()}
    return around | {f"{section}.dropout": OneOf((0.0, 0.1, 0.2))}
