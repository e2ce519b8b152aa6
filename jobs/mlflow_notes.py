"""What people read on MLflow's pages: Markdown with links from a result to what it was made from."""

import re
from collections.abc import Sequence

from jobs.mlflow_client import CLASSIC_VIEW
from jobs.mlflow_runs import Book, maker_of
from jobs.mlflow_tags import LONGEST_TAG, STAGE
from jobs.record import StageRecord
from pipeline.ancestry import Link

SHORT = 12
"""Digits of a key or digest that a person compares by eye."""
MARKUP = re.compile(r"([\\`*_{}\[\]#|~])")
"""What MLflow's Markdown would not show as it is. It shows the backslash before any other character."""


def stage_note(book: Book, link: Link) -> str:
    """What came of a stage, what it used, and what its artifact is called."""
    inputs = link.manifest.meta.get("input_keys", {})
    used = [
        f"{plain(field)}: {_run(book, needed['kind'], needed['key'])}, content `{needed['digest'][:SHORT]}`"
        for field, needed in inputs.items()
    ]
    parts = [
        plain(_headline(link)),
        _listed("Made from", [*used, *_raw(link)]),
        f"Key `{link.key}`, content `{link.manifest.digest}`.",
    ]
    return _fitting(parts, LONGEST_TAG)


def run_note(book: Book) -> str:
    """The stages of a run, each linked to the run that made it."""
    return _fitting([_listed("Stages", [_stage_line(book, stage) for stage in book.record.stages])], LONGEST_TAG)


def chain_note(book: Book, links: Sequence[Link], longest: int) -> str:
    """What a model is, and everything it was made from, the raw data last."""
    evaluation = next((link for link in links if link.kind == "evaluate"), None)
    raw = [f"{link.kind}: {line}" for link in links for line in _raw(link)]
    commit = book.record.commit or "unknown"
    edited = ", with changes that were not committed" if book.record.dirty else ""
    parts = [
        plain(_headline(evaluation)) if evaluation else "",
        f"Made by {_link(book, book.parent.info.run_id, book.record.run)} from commit `{commit}`{edited}.",
        _listed("Made from", [_chain_line(book, link) for link in links]),
        _listed("Raw data", raw),
    ]
    return _fitting(parts, longest)


def registered_note(name: str) -> str:
    """What the aliases of a registered model mean, and how they move."""
    return (
        f"Versions of one text classifier. Aliases: `candidate` is what the newest run proposes, `champion` what is in "
        f"use, `previous` the champion before it. `gristmill promote {name}` moves them, `gristmill lineage {name}` "
        f"says what a version was made from."
    )


def plain(text: str) -> str:
    """A text that MLflow's Markdown shows as it is, on one line."""
    return MARKUP.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def _headline(link: Link) -> str:
    return str(link.notes.get("headline", ""))


def _raw(link: Link) -> list[str]:
    return [f"{plain(source['source'])}, content `{source['digest']}`" for source in link.sources]


def _chain_line(book: Book, link: Link) -> str:
    told = f": {plain(_headline(link))}" if _headline(link) else ""
    return f"{_run(book, link.kind, link.key)} `{link.key[:SHORT]}`{told}"


def _stage_line(book: Book, stage: StageRecord) -> str:
    manifest = book.store.find(stage.kind, stage.key) if stage.key else None
    if stage.key is None or manifest is None:
        return f"{plain(stage.name)}: {stage.status}"
    return f"{_chain_line(book, Link(stage.kind, stage.key, manifest))} ({stage.status})"


def _run(book: Book, kind: str, key: str) -> str:
    """The name of a stage, linked to the run that made the artifact of this key, if one is known."""
    maker = maker_of(book, key)
    if maker is None:
        return plain(kind)
    return _link(book, maker.info.run_id, maker.data.tags.get(STAGE, kind), maker.info.experiment_id)


def _link(book: Book, run_id: str, text: str, experiment_id: str | None = None) -> str:
    """Relative to the page, so that it holds wherever the server is reached."""
    place = f"#/experiments/{experiment_id or book.experiment.experiment_id}/runs/{run_id}?{CLASSIC_VIEW}"
    return f"[{plain(text)}]({place})"


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"**{title}**", "", *(f"- {line}" for line in lines)]) if lines else ""


def _fitting(parts: Sequence[str], longest: int) -> str:
    """As much of the text as MLflow keeps, cut between lines."""
    text = "\n\n".join(part for part in parts if part)
    return text if len(text) <= longest else text[: text.rfind("\n", 0, longest)]
