"""What a config resolves to, where its values come from, and what its keys mean."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from textwrap import indent
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import flat, load, properties, schema
from pipeline.errors import UsageError
from pipeline.pipeline_config import SHARED, PipelineConfig


def show_config(path: Path, overrides: Sequence[str], *, origin: bool, as_json: bool) -> None:
    loaded = load(PipelineConfig, path, overrides)
    tree = json.loads(json.dumps(asdict(loaded.config)))
    if as_json:
        sys.stdout.write(json.dumps(tree) + "\n")
    elif origin:
        for key, value in flat(tree):
            sys.stdout.write(f"{key} = {json.dumps(value)}  # {_origin(key, loaded.origins)}\n")
    else:
        YAML().dump(tree, sys.stdout)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Where the value of a key was written; a task has from the pipeline's own section what it does not say itself."""
    shared = re.sub(rf"^tasks\.[^.]+\.(?=({'|'.join(SHARED)})\.)", "", key)
    return origins.get(key) or origins.get(shared, "default")


def explain_key(key: str) -> str:
    """Type, default, range and meaning of a key, or of every key below it. Raises UsageError with the nearest names."""
    rows = dict(_rows(schema(PipelineConfig), ()))
    chosen = {name: node for name, node in rows.items() if not key or name == key or name.startswith(f"{key}.")}
    if not chosen:
        near = get_close_matches(key, rows, n=3, cutoff=0.4)
        raise UsageError(f"{key}: no such key." + (f" Did you mean {', '.join(near)}?" if near else ""))
    return "".join(_text(name, node) for name, node in chosen.items())


def _rows(document: dict[str, Any], at: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, node in properties(document, at).items():
        below = list(_rows(document, (*at, name)))
        yield from below or [(".".join((*at, name)), node)]


def _text(name: str, node: Mapping[str, Any]) -> str:
    default = f"default {json.dumps(node['default'])}" if "default" in node else "required"
    knob = f"; {_effect(name)}" if node.get("x-knob") else ""
    return f"{name}: {_type(node)}, {default}{knob}\n{indent(node.get('description', ''), ' ' * 4)}\n"


def _effect(name: str) -> str:
    is_place = name.rpartition(".")[2] == "path"
    return "what is there counts, not where that is" if is_place else "a knob: changing it rebuilds nothing"


def _type(node: Mapping[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_type(option) for option in node["anyOf"])
    if "enum" in node:
        return " | ".join(map(str, node["enum"]))
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {json.dumps(node[bound])}" for bound, sign in bounds if bound in node]
    return " ".join([str(node.get("const", node.get("type", "value"))), *([", ".join(limits)] if limits else [])])
