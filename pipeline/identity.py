"""Identity: the same recipe gives the same key, in any process, on any machine, and says how another differs."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import Enum
from typing import Any

from blake3 import blake3

KEY_DIGITS = 32


def knob(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A field that says how a stage runs, not what it makes. Changing it rebuilds nothing."""
    return field(default=default, default_factory=default_factory, metadata={"identity": False})


def added(default: Any, *, birth: Any = MISSING, where: Mapping[str, Any] | None = None) -> Any:
    """A field that came after the first release: it stays out of the key while it equals its birth value.

    `birth`, where the default has changed since, is what did what was done before there was the field. `where` names
    other fields and the values without which nobody reads this one: then it stays out of the key too.
    """
    return field(default=default, metadata={"birth": default if birth is MISSING else birth, "where": where or {}})


def is_knob(f: "Field[Any]") -> bool:
    return not f.metadata.get("identity", True)


def canonical(value: Any) -> Any:
    """Reduce a value to plain JSON, leaving out knobs and fields at their birth value.

    Raises TypeError for a value with no stable identity (a callable, an open file) and ValueError for NaN and infinity.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in fields(value) if in_key(f, value)}
    if isinstance(value, Enum):
        return canonical(value.value)
    if isinstance(value, Mapping):
        return {_text_key(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no stable identity; give a finite number")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no stable identity; use a dataclass, an Enum or a plain value")


def in_key(f: "Field[Any]", owner: Any) -> bool:
    """Whether a field of a recipe counts: knobs do not, nor a later field with its birth value, or that is not read."""
    unread = any(getattr(owner, name) != value for name, value in f.metadata.get("where", {}).items())
    return not (is_knob(f) or unread or ("birth" in f.metadata and getattr(owner, f.name) == f.metadata["birth"]))


def _text_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"mapping key {key!r} is not a string, so it has no stable identity")
    return key


def fingerprint(value: Any) -> str:
    """The key of a recipe: 32 hex digits of the BLAKE3 of its canonical JSON."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return blake3(text.encode()).hexdigest()[:KEY_DIGITS]


def changes(old: Any, new: Any, at: str = "") -> list[str]:
    """How two canonical recipes differ, one line a field: `model.n_layers: 6 -> 8`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in changes(old.get(name), new.get(name), f"{at}.{name}".lstrip("."))]
    return [] if old == new else [f"{at}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
