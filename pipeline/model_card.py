"""The README.md of an export: what the classifier does, how well, beside what, and when not to trust it."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from pipeline.ancestry import Link
from pipeline.report import RIVALS, headline_rows, is_of_several, verdicts
from pipeline.windows import ONE_WINDOW, Windows

TEMPLATE = Path(__file__).with_name("model_card.md")
MARKUP = re.compile(f"([{re.escape(string.punctuation)}])")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the card says of the model itself.

    `data_digest` is that of the labelled text; `checked` counts texts; `stock` says whether transformers has the class;
    `programs` are those that were checked; `temperature` is what the logits are divided by; `chain` is what the model
    was made from, the raw data last; `windows` is how it reads a text of more than `seq_len` tokens; `ngrams` is
    the shape of those that it reads.
    """

    parameters: int
    seq_len: int
    language: str | None
    license: str | None
    data_digest: str
    checked: int
    tolerance: float
    stock: bool
    programs: str
    temperature: float
    chain: Sequence[Link] = ()
    windows: Windows = ONE_WINDOW
    ngrams: Mapping[str, int] | None = None


def model_card(scores: Mapping[str, Any], facts: ModelFacts) -> str:
    """Markdown with YAML front matter. `scores` is what an evaluation's scores.json holds."""
    return _template().render(
        metadata=_metadata(scores, facts),
        scores=scores,
        multi_label=is_of_several(scores),
        rows=headline_rows(scores),
        verdicts=verdicts(scores),
        weakest=min((row for row in scores["per_class"] if row["support"]), key=lambda row: (row["f1"], row["name"])),
        ahead=[RIVALS[rival["name"]] for rival in scores["baselines"] if rival["lead"] < 0],
        parameters=facts.parameters,
        seq_len=facts.seq_len,
        windows=facts.windows if facts.windows.count > 1 else None,
        ngrams=facts.ngrams,
        checked=facts.checked,
        tolerance=f"{facts.tolerance:g}",
        stock=facts.stock,
        programs=facts.programs,
        temperature=facts.temperature,
        calibrated=scores.get("calibrated") if facts.temperature != 1 else None,
        overlap=_overlap(scores),
        language=facts.language,
        chain=facts.chain,
        raw_data=[f"{link.kind} `{source['digest']}`" for link in facts.chain for source in link.sources],
    )


def _overlap(scores: Mapping[str, Any]) -> list[str]:
    """How many of the test texts the model may have met before, place by place."""
    places = {"corpus": "the corpus of the pretraining", "training": "the texts it was trained or validated on"}
    found = scores.get("contamination") or {}
    leaks = {name: leak for place, name in places.items() if (leak := found.get(place))}
    return [f"{leak['n']:,} of {scores['n']:,} test texts stand in {name}" for name, leak in leaks.items()]


def _metadata(scores: Mapping[str, Any], facts: ModelFacts) -> str:
    """The front matter, in the hub's own form."""
    from huggingface_hub import EvalResult, ModelCardData

    names = {"accuracy": ("accuracy", "accuracy"), "f1": ("macro_f1", "macro F1")}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="labelled-text",
            dataset_name="test split of the labelled text",
            dataset_split="test",
            dataset_revision=facts.data_digest,
            metric_type=kind,
            metric_name=name,
            metric_value=scores[field],
            metric_args={"average": "macro"} if kind == "f1" else None,
        )
        for kind, (field, name) in names.items()
    ]
    card = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers" if facts.stock else "onnx",
        pipeline_tag="text-classification",
        tags=["gristmill", *(["multi-label"] if is_of_several(scores) else [])],
        model_name=f"text classifier, {len(scores['per_class'])} classes",
        eval_results=results,
    )
    return card.to_yaml().strip()


def _plain(text: str) -> str:
    """A text that Markdown shows as it is: on one line, all punctuation escaped."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=False,  # noqa: S701 -- Markdown, not HTML: `plain` escapes what the data brings in
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["ratio"] = "{:.3f}".format
    environment.filters["count"] = "{:,}".format
    environment.filters["interval"] = lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
