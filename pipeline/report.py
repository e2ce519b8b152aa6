"""One self-contained page of an evaluation: no script, nothing fetched, every text escaped, light and dark."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from pipeline.targets import shown

TEMPLATE = Path(__file__).with_name("report.html")

RIVALS = {
    "random_init": "the same body from random weights",
    "tfidf-logreg": "TF-IDF + logistic regression",
    "linear-svm": "linear SVM over words and characters",
    "majority": "the most frequent class",
}
"""What scores.json calls a rival -> what a person calls it."""

MOST_FREQUENT_SET = "the most frequent set of classes"
"""What the majority is called where a text may have several classes."""

NONE = "\N{EN DASH}"

OURS = "this classifier"


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one text. `confidence` is the probability of `predicted`, as served.

    `label` and `predicted` are a class each, or lists of them where a text may have several.
    """

    text: str
    label: str | Sequence[str]
    predicted: str | Sequence[str]
    confidence: float


@dataclass(frozen=True)
class Picture:
    """One PNG twice, for light and for dark pages."""

    light: bytes
    dark: bytes

    @property
    def width(self) -> int:
        """CSS pixels: three quarters of its own, so that it is sharp on dense screens."""
        return int.from_bytes(self.light[16:20]) * 3 // 4  # in the IHDR chunk, which every PNG starts with


def render(
    scores: Mapping[str, Any],
    mistakes: Sequence[Prediction],
    pictures: Mapping[str, Picture],
    about: str = "",
) -> str:
    """The page. `scores` is what scores.json holds; `about` says what was measured, where that is not plain."""
    rows = headline_rows(scores)
    return _template().render(
        scores=scores,
        multi_label=is_of_several(scores),
        about=about,
        rows=[{**row, **_place(row, rows)} for row in rows],
        verdicts=verdicts(scores),
        best_first=sorted(scores["per_class"], key=lambda row: (-row["f1"], row["name"])),
        mistakes=mistakes,
        pictures=pictures,
    )


def is_of_several(scores: Mapping[str, Any]) -> bool:
    """Whether the scores are of a classifier that may give a text several classes, or none."""
    return scores.get("multi_label", False)


def rivals(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the classifier was compared with, by the keys of RIVALS; only what was measured."""
    found = {"random_init": scores["random_init"], **{rival["name"]: rival for rival in scores["baselines"]}}
    return {key: rival for key, rival in {**found, "majority": scores["majority"]}.items() if rival}


def headline_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{name, accuracy, accuracy_ci, macro_f1, macro_f1_ci}` of the classifier and of every rival that was measured."""
    columns = ("accuracy", "accuracy_ci", "macro_f1", "macro_f1_ci")
    names = RIVALS | ({"majority": MOST_FREQUENT_SET} if is_of_several(scores) else {})
    everyone = {OURS: scores, **{names[key]: rival for key, rival in rivals(scores).items()}}
    return [{"name": name, **{c: row[c] for c in columns}} for name, row in everyone.items()]


def verdicts(scores: Mapping[str, Any]) -> list[str]:
    """A sentence a rival: by how much the classifier leads, and whether that may be chance; then one for the seeds."""
    compared = [_verdict(RIVALS[key], rival) for key, rival in rivals(scores).items() if key != "majority"]
    return [*compared, *([_over_seeds(scores["seeds"]["macro_f1"])] if scores["seeds"] else [])]


def _over_seeds(spread: Mapping[str, Any]) -> str:
    each = ", ".join(f"{value:.3f}" for value in spread["values"])
    return (
        f"Fine-tuned with {len(spread['values'])} seeds, of which the first is this classifier, macro-F1 is "
        f"{spread['mean']:.3f} on average ({each}; standard deviation {spread['std']:.3f})."
    )


def _verdict(name: str, rival: Mapping[str, Any]) -> str:
    lead, (low, high) = rival["lead"], rival["lead_ci"]
    where = "above" if lead >= 0 else "below"
    proof = "more than chance" if low > 0 or high < 0 else "which may be chance"
    difference = f"interval of the difference {low:+.3f} to {high:+.3f}"
    return f"Macro-F1 is {abs(lead):.3f} {where} {name} ({difference}), {proof}."


def _place(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where the macro-F1 of a row and its interval stand, in percent of a scale that all but weak rows fit on."""
    bounds = [end for other in rows for end in other["macro_f1_ci"] if other["macro_f1"] >= rows[0]["macro_f1"] / 2]
    low, high = min(bounds), max(bounds)
    room = max((high - low) / 8, 1e-6)
    start, size = low - room, high - low + 2 * room
    left, right, dot = (
        round(100 * min(max((value - start) / size, 0.0), 1.0), 2) for value in (*row["macro_f1_ci"], row["macro_f1"])
    )
    return {"left": left, "span": round(right - left, 2), "dot": dot}


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.filters["ratio"] = _ratio
    environment.filters["label"] = lambda label: shown(label) or NONE
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["count"] = "{:,}".format
    environment.filters["interval"] = lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
