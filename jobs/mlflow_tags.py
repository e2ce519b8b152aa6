"""What our runs, models and versions carry in MLflow, by name: enough to walk from a model to the raw data.

A chain can be walked with the tracking server alone, since all of it is in tags and params and no file is read: the
tag `gristmill.inputs` of a stage's run names the artifacts it used, and by the tag `gristmill.key` they are found.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RUN, STAGE, KEY, PLAN, ATTEMPT = (f"gristmill.{word}" for word in ("run", "stage", "key", "plan", "attempt"))
KIND, DIGEST, URI, JOB, IMAGE = (f"gristmill.{word}" for word in ("kind", "digest", "uri", "ray_job_id", "image"))
INPUTS = "gristmill.inputs"
"""JSON `{field: {"kind", "key", "digest"}}` of the artifacts that a stage used. Of many, `gristmill.inputs.1` and so on
have the rest, each a JSON of its own."""
SOURCES = "gristmill.sources"
"""JSON `[{"name", "uri", "digest", "files": {place: BLAKE3}}]` of what a stage read from outside."""
COMMIT, DIRTY = "commit", "dirty"
REUSED_FROM = "gristmill.reused_from"
TRIED = "gristmill.tried"
"""The key of what a trial of a search made. It is no KEY: a trial does not say what its artifact was made from."""
REGISTERED = "gristmill.registered"
PROMOTED_AT, PROMOTED_FROM, GATES, ROLLED_BACK_AT = (
    f"gristmill.{word}" for word in ("promoted_at", "promoted_from", "gates", "rolled_back_at")
)
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
NOTE = "mlflow.note.content"
"""The Markdown that MLflow shows on the page of a run."""

LONGEST_TAG, LONGEST_PARAM = 8000, 6000
"""Characters. MLflow cuts what is longer."""
INPUTS_PER_TAG = 40
"""Each has two times 32 hex digits and two words: 40 are some 5,500 characters."""


def made(key: str) -> str:
    """What finds the runs that show how an artifact was made: finished ones, which so have every tag of the chain."""
    return f"tags.`{KEY}` = '{key}' AND tags.`{DIGEST}` LIKE '%' AND attributes.status = 'FINISHED'"


def inputs_tags(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The INPUTS tags of a stage."""
    items = list(inputs.items())
    parts = [items[start : start + INPUTS_PER_TAG] for start in range(0, len(items), INPUTS_PER_TAG)] or [[]]
    return {f"{INPUTS}.{n}" if n else INPUTS: json.dumps(dict(part)) for n, part in enumerate(parts)}


def inputs_of(tags: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What `inputs_tags` was given."""
    parts = [json.loads(text) for name, text in tags.items() if name == INPUTS or name.startswith(f"{INPUTS}.")]
    return {field: used for part in parts for field, used in part.items()}


def is_set_aside(tags: Mapping[str, str]) -> bool:
    """Whether a version was rolled back, and not promoted again since."""
    rolled_back = tags.get(ROLLED_BACK_AT)
    return rolled_back is not None and rolled_back >= tags.get(PROMOTED_AT, rolled_back)


def params_of(kind: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """The settings in a stage's recipe as MLflow's params: `pretrain.lr`, `model.d_model`.

    They are named after the kind of stage, wherever in a config they stand: another run may have the same artifact from
    another place, as from `midtrain` or a task, and in a table of runs a setting is one column. What is longer than
    MLflow keeps is cut, and then read back as a text.
    """
    own = {name: value for name, value in recipe.items() if name not in ("stage", "sources", "inputs", "config")}
    named = {**own, **({kind: recipe["config"]} if recipe.get("config") else {})}
    return {name: _text(value)[:LONGEST_PARAM] for name, value in _leaves(named)}


def config_of(kind: str, params: Mapping[str, str]) -> dict[str, Any]:
    """The settings that `params_of` was given: those of the stage's `config` at the top, the others beside them."""
    config: dict[str, Any] = {}
    for name, text in params.items():
        *path, last = name.removeprefix(f"{kind}.").split(".")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = _value(text)
    return config


def _leaves(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted name. A mapping that such names could not tell is one value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not any("." in name for name in value):
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _text(value: Any) -> str:
    """A text as it is, unless that would be read as another value; anything else as JSON."""
    if isinstance(value, str) and value and _value(value) is value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def sources_text(datasets: Sequence[Mapping[str, str]], files: Mapping[str, str]) -> str:
    """The value of the SOURCES tag. Of more files than fit, only their number is told; `digest` covers them all."""
    told = [{"name": d["name"], "uri": as_uri(d["source"]), "digest": d["digest"]} for d in datasets]
    text = json.dumps([{**source, "files": dict(files)} for source in told], ensure_ascii=False)
    if len(text) <= LONGEST_TAG:
        return text
    return json.dumps([{**source, "n_files": len(files)} for source in told], ensure_ascii=False)[:LONGEST_TAG]


def as_uri(source: str) -> str:
    """An absolute path as a URI; anything else as it is."""
    return Path(source).as_uri() if Path(source).is_absolute() else source
