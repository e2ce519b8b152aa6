"""One self-contained page of an evaluation: no script, nothing fetched, every text escaped, light and dark."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

TEMPLATE = Path(__file__).with_name("report.html")

RIVALS = {
    "random_init": "the same body from random weights",
    "baseline": "TF-IDF + logistic regression",
    "majority": "the most frequent class",
}
"""What scores.json calls a rival -> what a person calls it."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one text. `confidence` is the probability of `predicted`."""

    text: str
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Picture:
    """One PNG twice, for light and for dark pages, and in words for who cannot see it."""

    light: bytes
    dark: bytes
    alt: str

    @property
    def width(self) -> int:
        """CSS pixels: three quarters of its own, so that it is sharp on dense screens."""
        return int.from_bytes(self.light[16:20]) * 3 // 4  # in the IHDR chunk, which every PNG starts with


def render(scores: Mapping[str, Any], mistakes: Sequence[Prediction], pictures: Sequence[Picture]) -> str:
    """The page. `scores` is what scores.json holds."""
    return _template().render(
        scores=scores, rows=headline_rows(scores), verdicts=verdicts(scores), mistakes=mistakes, pictures=pictures
    )


def headline_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{name, accuracy, accuracy_ci, macro_f1, macro_f1_ci}` of the classifier and of every rival that was measured."""
    rivals = {name: scores[key] for key, name in RIVALS.items() if scores[key]}
    columns = ("accuracy", "accuracy_ci", "macro_f1", "macro_f1_ci")
    everyone = {"this classifier": scores, **rivals}
    return [{"name": name, **{c: row[c] for c in columns}} for name, row in everyone.items()]


def verdicts(scores: Mapping[str, Any]) -> list[str]:
    """A sentence per rival: by how much the classifier leads, and whether that is more than chance."""
    return [_verdict(name, scores[key]) for key, name in RIVALS.items() if scores[key] and key != "majority"]


def _verdict(name: str, rival: Mapping[str, Any]) -> str:
    lead, (low, high) = rival["lead"], rival["lead_ci"]
    where = "above" if lead >= 0 else "below"
    proof = "more than chance" if low > 0 or high < 0 else "which may be chance"
    difference = f"interval of the difference {low:+.3f} to {high:+.3f}"
    return f"Macro-F1 is {abs(lead):.3f} {where} {name} ({difference}), {proof}."


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.filters["ratio"] = "{:.3f}".format
    environment.filters["count"] = "{:,}".format
    environment.filters["interval"] = lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
