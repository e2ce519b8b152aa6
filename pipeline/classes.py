"""The class, or the classes, that a row of a file gives to its text."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import orjson

from pipeline.errors import DataError

SEPARATOR = ","
"""What stands between the classes of a text where they come as one string."""


def class_name(value: object, where: str) -> str:
    """A class as a string: yes, no, 1 and 0 are names like any other. Raises DataError where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if _is_missing(value) or not str(value).strip():
        raise DataError(f"{where} is {value!r}: this row has no class. Give it one, or leave the row out")
    if isinstance(value, list | tuple):
        raise DataError(
            f"{where} is {value!r:.60}: not a class. Give a string or a whole number; for several classes a text, or "
            "none, set labels.multi_label to true"
        )
    if not isinstance(value, str | int | float):
        raise DataError(f"{where} is {value!r:.60}: not a class. Give a string or a whole number")
    return str(value).strip()


def class_names(value: object, where: str, separator: str) -> tuple[str, ...]:
    """The classes of a list, or of a string with a separator between them: sorted, each once, and there may be none.

    Raises DataError for anything else, such as a null, which may mean that nobody has looked.
    """
    if isinstance(value, str):
        return tuple(sorted({name.strip() for name in value.split(separator)} - {""}))
    if isinstance(value, list | tuple):
        return tuple(sorted({_listed(item, value, where) for item in value}))
    if _is_missing(value):
        raise DataError(f"{where} is {value!r}: give a list of classes, [] for none, or leave the row out")
    raise DataError(
        f"{where} is {value!r:.60}: not a list of classes. Give [{value!r:.60}]; where each text has one class, set "
        "labels.multi_label to false"
    )


Names = Sequence[str] | None
"""Those that the numbers of a column stand for, where they stand for any."""


def class_label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> Names:
    """The names of a column's classes where `datasets` keeps numbers in their place (its feature ClassLabel).

    It says so in the metadata of an Arrow schema.
    """
    told = (metadata or {}).get(b"huggingface")
    try:
        feature = orjson.loads(told)["info"]["features"][column] if told else {}
        feature = feature.get("feature", feature)  # what a list holds
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
        return names if isinstance(names, list) else None
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):  # written by something else
        return None


def by_name(values: list[Any], names: Names) -> list[Any]:
    """Class numbers, or lists of them, as names. One below 0, which says that there is no class, becomes None."""
    return values if names is None else [_named(value, names) for value in values]


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def _listed(item: Any, value: object, where: str) -> str:
    if isinstance(item, list | tuple) or _is_missing(item) or not str(item).strip():
        raise DataError(f"{where} is {value!r:.60}: {item!r:.60} in it is not a class. Give strings or whole numbers")
    return class_name(item, where)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))
