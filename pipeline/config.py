"""Config files: YAML 1.2 in, frozen dataclasses out, and every wrong value named with its file, line and column.

Values come from, in rising order: defaults, the files named by `extends:`, the file, `--set`. Each knows its origin.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UsageError
from pipeline.identity import is_knob

C = TypeVar("C")
Path_ = tuple[str | int, ...]

MAX_VALUES = 10_000
"""A config with more values than this is a mistake or an attack (aliases that multiply)."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `configs/demo.yaml:4:3` with the line itself, or `--set #2`."""

    where: str
    line: str = ""

    def error(self, message: str) -> str:
        number = self.where.rsplit(":", 2)[-2] if self.line else ""
        return f"{self.where}  {message}" + (f"\n{number:>5} | {self.line}" if self.line else "")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A typed config, and where each of its written values came from, by dotted key."""

    config: C
    origins: Mapping[str, str]


def load(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> Loaded[C]:
    """Read a config file into `cls`, a frozen dataclass. Raises UsageError that lists every problem found.

    Where `cls` has a method `complete`, it is given what was written, as plain dicts, to fill in before it is checked.
    """
    tree, origins = _read_chain(path, ())
    for number, text in enumerate(overrides, 1):
        key, value = _override(text, number)
        _set(tree, origins, key, value, Origin(f"--set #{number}"))
    config = _typed(cls, tree, origins, Origin(str(path)))
    return Loaded(config, {".".join(map(str, key)): origin.where for key, origin in origins.items()})


def schema(cls: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a config, for editors. Descriptions are the docstrings under the fields."""
    document = TypeAdapter(_model(cls)).json_schema()
    root = document["$defs"].pop(cls.__name__)
    _describe(cls, document["$defs"], root)
    root["properties"]["extends"] = {
        "description": "Files to start from, relative to this one; a value here replaces theirs.",
        "default": [],
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": document["$defs"]}


def _model(cls: type[Any]) -> Any:
    """`cls` as a pydantic model: the model's settings reach every dataclass inside it."""
    return create_model("Config", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), config=(cls, ...))


def _describe(cls: type[Any], definitions: dict[str, Any], into: dict[str, Any]) -> None:
    """Put into a section's schema what its class says of each field, and so on for the sections inside it."""
    told = _docstrings(cls)
    for f in fields(cls):
        property_ = into["properties"][f.name]
        property_ |= {"description": told[f.name]} if f.name in told else {}
        property_ |= {"x-knob": True} if is_knob(f) else {}
    for inner in _sections_of(cls):
        _describe(inner, definitions, definitions[inner.__name__])


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """The text under each field of a dataclass, its parents' fields included."""
    told: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for node, text in pairwise(body):
            match node, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    told[name] = inspect.cleandoc(said)
    return told


def _sections_of(cls: type[Any]) -> Iterator[type[Any]]:
    for hint in get_type_hints(cls).values():
        yield from (part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part))


def _read_chain(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path_, Origin]]:
    """One file laid over those that it extends."""
    if path.resolve() in seen:
        raise UsageError(f"{path}: extends itself through {' -> '.join(str(p) for p in seen)}")
    document, lines = _parse(path)
    own, own_origins = _plain(document, path, lines)
    parents = own.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UsageError(own_origins[("extends",)].error("extends: must be the name of a file, or a list of names"))
    tree: dict[str, Any] = {}
    origins: dict[Path_, Origin] = {}
    for parent in parents:
        base, base_origins = _read_chain(path.parent / parent, (*seen, path.resolve()))
        tree = laid_over(tree, base)
        origins |= base_origins
    return laid_over(tree, own), origins | own_origins


def _parse(path: Path) -> tuple[CommentedMap, list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file (looked at {path.absolute()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{at}  not YAML: {error.problem}") from None
    except (YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UsageError(f"{path}  not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, CommentedMap):
        raise UsageError(f"{path}:1:1  a config is a mapping of sections such as `corpus:` and `model:`")
    return document, text.splitlines()


def _plain(document: CommentedMap, path: Path, lines: list[str]) -> tuple[dict[str, Any], dict[Path_, Origin]]:
    """The document as plain dicts, lists and scalars, and the origin of every key."""
    origins: dict[Path_, Origin] = {}
    budget = iter(range(MAX_VALUES))

    def walk(node: Any, at: Path_) -> Any:
        if next(budget, None) is None:
            raise UsageError(f"{path}: more than {MAX_VALUES} values; an alias that multiplies?")
        if isinstance(node, TaggedScalar) or getattr(getattr(node, "tag", None), "value", None):
            raise UsageError(f"{path}: {'.'.join(map(str, at))}: YAML tags such as {node.tag.value} are refused")
        if isinstance(node, CommentedMap):
            for key in node:
                row, column = node.lc.key(key) if key in (node.lc.data or ()) else (node.lc.line, node.lc.col)
                origins[(*at, str(key))] = Origin(f"{path}:{row + 1}:{column + 1}", lines[row])
            return {str(key): walk(value, (*at, str(key))) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(item, (*at, i)) for i, item in enumerate(node)]
        return _scalar(node)

    return walk(document, ()), origins


def _scalar(node: Any) -> Any:
    """ruamel's round-trip numbers and strings as Python's own."""
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with the values of another in place of its own, neither of them changed."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = laid_over(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def _override(text: str, number: int) -> tuple[Path_, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set #{number}  {text!r}: write it as --set section.key=value")
    if key == "extends":
        raise UsageError(f"--set #{number}  extends: a file alone can extend another; write it there")
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
        list(_keys(parsed, ()))
    except (YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--set #{number}  {key}: {value!r:.200} is not a YAML value: {error}") from None
    return tuple(key.split(".")), parsed


def _set(tree: dict[str, Any], origins: dict[Path_, Origin], key: Path_, value: Any, origin: Origin) -> None:
    node: Any = tree
    for depth, part in enumerate(key[:-1], 1):
        if not isinstance(node.get(part), dict):
            node[part] = {}
            origins.setdefault(key[:depth], origin)
        node = node[part]
    node[key[-1]] = value
    for stale in [known for known in origins if known[: len(key)] == key]:
        del origins[stale]
    origins |= dict.fromkeys(_keys(value, key), origin)


def _keys(value: Any, at: Path_) -> Iterator[Path_]:
    """The key of a value, and of every value in it."""
    yield at
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _keys(inner, (*at, key))


def _typed(cls: type[C], tree: dict[str, Any], origins: Mapping[Path_, Origin], file: Origin) -> C:
    written = getattr(cls, "complete", dict)(tree)
    try:
        config = _model(cls).model_validate({"config": written}).config
    except ValidationError as errors:
        problems = dict.fromkeys(_explain(e, written, origins, file, schema(cls)) for e in errors.errors())
        raise UsageError("\n".join(problems)) from None
    if booleans := list(_booleans_as_numbers(written, config)):
        messages = ((at, f"{'.'.join(map(str, at))}={value}: must be a number") for at, value in booleans)
        raise UsageError("\n".join(_origin(at, origins, file).error(message) for at, message in messages))
    return config


def _booleans_as_numbers(written: Any, typed: Any, at: Path_ = ()) -> Iterator[tuple[Path_, bool]]:
    """Where true or false was written and pydantic took it for 1 or 0."""
    if isinstance(written, Mapping):
        for key, value in written.items():
            inner = typed[key] if isinstance(typed, Mapping) else getattr(typed, key)
            yield from _booleans_as_numbers(value, inner, (*at, key))
    elif isinstance(written, list):
        for i, (value, inner) in enumerate(zip(written, typed, strict=True)):
            yield from _booleans_as_numbers(value, inner, (*at, i))
    elif isinstance(written, bool) and not isinstance(typed, bool):
        yield at, written


def _explain(
    error: ErrorDetails,
    tree: Mapping[str, Any],
    origins: Mapping[Path_, Origin],
    file: Origin,
    document: dict[str, Any],
) -> str:
    at = tuple(error["loc"][1:])
    section = properties(document, at[:-1])
    key = at if (at and at[-1] in section) or error["type"] == "unexpected_keyword_argument" else _written(at, origins)
    tried = [part for part in at[len(key) :][:1] if isinstance(part, str)]  # the name of one of several types
    if tried and not properties(document, key):
        message = _no_form(key, tree, document)
    else:
        message = _message(error, at, sorted(section))
    return _origin(at, origins, file).error(f"{'.'.join(map(str, key)) or 'config'}{message}")


def _origin(at: Path_, origins: Mapping[Path_, Origin], file: Origin) -> Origin:
    """That of the longest part of a position that has one."""
    return next((origins[at[:n]] for n in range(len(at), 0, -1) if at[:n] in origins), file)


def _no_form(key: Path_, tree: Any, document: dict[str, Any]) -> str:
    """What to say, once, of a value that is of none of several types: what the key is for."""
    value = reduce(lambda node, part: node[part], key, tree)
    told = properties(document, key[:-1]).get(str(key[-1]), {}).get("description", "")
    return f"={value!r}: has none of the forms that this key takes. {' '.join(told.split())}".rstrip()


def _written(at: Path_, origins: Mapping[Path_, Origin]) -> Path_:
    """The part of an error's position that a person wrote: pydantic adds the names of the types it tried."""
    return next((at[:n] for n in range(len(at), 0, -1) if at[:n] in origins), at)


def _message(error: ErrorDetails, at: Path_, known: Sequence[str]) -> str:
    match error["type"]:
        case "unexpected_keyword_argument":
            near = get_close_matches(str(at[-1]), known, n=1)
            return f": unknown key. Did you mean `{near[0]}`?" if near else f": unknown key. Keys: {', '.join(known)}."
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return ": required, and not given"
        case "dataclass_type":
            return f"={error['input']!r}: must be a section of keys"
        case "value_error":
            return f": {error.get('ctx', {}).get('error')}"
        case _:
            must = re.sub(r"^\w+ should ", "must ", error["msg"])
            return f"={error['input']!r}: {must}"


def properties(document: dict[str, Any], at: Path_ = ()) -> dict[str, Any]:
    """The properties of one section of a schema, by name; empty where there is no such section.

    A section whose keys are the user's own, such as `tasks`, has the one property NAME.
    """
    node = document
    for part in at:
        own = node.get("properties", {}).get(part, node.get("additionalProperties", {}))
        node = _section(own, document) if isinstance(own, dict) else {}
    any_name = node.get("additionalProperties")
    return {"NAME": any_name} if isinstance(any_name, dict) else node.get("properties", {})


def _section(node: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The object that a property refers to, also among alternatives such as "or null"."""
    for option in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        if "$ref" in option:
            return document["$defs"][option["$ref"].rsplit("/", 1)[-1]]
    return node


def flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping by its dotted key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flat(value, f"{at}.{key}".lstrip("."))
    else:
        yield at, tree
