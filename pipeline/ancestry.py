"""What an artifact was made from, back to the raw data, as the manifests tell it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.publish import Manifest
from pipeline.store import Store


@dataclass(frozen=True)
class Link:
    """One artifact of a chain."""

    kind: str
    key: str
    manifest: Manifest

    @property
    def notes(self) -> dict[str, Any]:
        return self.manifest.meta.get("notes", {})

    @property
    def sources(self) -> list[dict[str, str]]:
        """`[{"name", "source", "digest", "context"}]` of what was read from outside the store; empty for most kinds."""
        is_raw = self.manifest.meta.get("recipe", {}).get("sources") or not self.manifest.meta.get("input_keys")
        return self.notes.get("datasets", []) if is_raw else []


def made_from(store: Store, inputs: Mapping[str, tuple[str, str]]) -> list[Link]:
    """What an exported model was made from, after its evaluation; not what the evaluation compared it with.

    `inputs` are (kind, key) of the export's, by name.
    """
    evaluation = [at for name, at in inputs.items() if name == "evaluation"]
    others = [at for name, at in inputs.items() if name != "evaluation"]
    return [*chain(store, evaluation)[:1], *chain(store, others)]


def chain(store: Store, roots: Iterable[tuple[str, str]]) -> list[Link]:
    """The artifacts with these (kind, key) and all they were made from, each once, users before what they use.

    Of two of one kind, such as a classifier and the rival that it is compared with, the one used first comes last.
    An artifact that is not in the store is left out, with what only it was made from.
    """
    found: dict[str, Link] = {}

    def visit(kind: str, key: str) -> None:
        manifest = None if key in found else store.find(kind, key)
        if manifest is None:
            return
        for needed in manifest.meta.get("input_keys", {}).values():
            visit(needed["kind"], needed["key"])
        found[key] = Link(kind, key, manifest)

    for kind, key in roots:
        visit(kind, key)
    return list(reversed(found.values()))
