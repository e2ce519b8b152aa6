"""Pictures of an evaluation and of a training run, as PNG files that equal inputs give byte for byte."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.metrics import Bin, ClassScore, expected_calibration_error
from pipeline.tracking import Point

DPI = 120
MAX_CLASSES = 50
"""Of more classes a picture shows only the most frequent."""
MAX_NAME = 28
FEW = 10
"""How often fewer texts than this are right says little: their bar is pale."""


@dataclass(frozen=True)
class Theme:
    """Colours that go together on one kind of page."""

    paper: str
    ink: str
    faint: str
    accent: str
    warm: str


LIGHT = Theme(paper="#ffffff", ink="#1f2328", faint="#d8dee4", accent="#1f5fbf", warm="#c2571a")
DARK = Theme(paper="#161b22", ink="#e6edf3", faint="#3a424c", accent="#6ca8ff", warm="#f0a35e")


def confusion_matrix(confusion: np.ndarray, names: Sequence[str], theme: Theme = LIGHT) -> bytes:
    """Each row of counts (one true class) as shares of its predictions."""
    shown = _most_frequent(confusion.sum(axis=1))
    rows = confusion[np.ix_(shown, shown)]
    shares = rows / np.maximum(confusion.sum(axis=1)[shown, None], 1)
    side = max(len(shown) * (0.46 if len(shown) <= 20 else 0.3), 2.6) + 1.8
    figure, ax = canvas(side + 0.4, side, theme)
    ax.imshow(shares, cmap=LinearSegmentedColormap.from_list("shares", [theme.paper, theme.accent]), vmin=0, vmax=1)
    labels = [short(name) for name in np.array(names, dtype=object)[shown]]
    ax.set_xticks(range(len(shown)), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(range(len(shown)), labels, parse_math=False)
    ax.set_xticks(np.arange(1, len(shown)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(shown)) - 0.5, minor=True)
    ax.grid(which="major", visible=False)
    ax.grid(which="minor", color=theme.faint, linewidth=0.5)
    ax.tick_params(which="both", length=0, labelsize=9 if len(shown) <= 30 else 7)
    _write_shares(ax, shares, theme)
    ax.set(xlabel="predicted", ylabel="true", title=_title("Where the texts of each class go, %", shown, names))
    return png(figure)


def _write_shares(ax: Axes, shares: np.ndarray, theme: Theme) -> None:
    """Percentages into the cells; of many classes only into those that matter."""
    few = len(shares) <= 20
    image = ax.images[0]
    for row, column in np.argwhere(shares >= (0.005 if few else 0.05)):
        share = shares[row, column]
        color = _readable_on(tuple(image.to_rgba(share)), theme)
        ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9 if few else 7, color=color)


def _readable_on(background: Sequence[float], theme: Theme) -> str:
    """The one of ink and paper that stands out more."""
    return max((theme.ink, theme.paper), key=lambda color: abs(_luminance(to_rgb(color)) - _luminance(background)))


def _luminance(rgb: Sequence[float]) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def reliability_diagram(panels: Mapping[str, Sequence[Bin]], counted: str = "texts", theme: Theme = LIGHT) -> bytes:
    """How often predictions of a given confidence are right, over how many there are of each confidence.

    A panel for each kind of probability, with its name; `counted` says what the predictions are of.
    """
    figure = _figure(4.6 * len(panels) + 0.4, 5.2, theme)
    figure.get_layout_engine().set(wspace=0.06)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    rows = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for place, (name, bins) in enumerate(panels.items()):
        _reliability(rows[0, place], rows[1, place], name, bins, theme)
    rows[0, 0].set(ylabel="share that is right")
    rows[1, 0].set(ylabel=f"share of {counted}")
    _legend(rows[0, 0], theme, loc="upper left")
    rows[0, 0].get_legend().set_zorder(9)
    return png(figure)


def _reliability(upper: Axes, lower: Axes, name: str, bins: Sequence[Bin], theme: Theme) -> None:
    full = [b for b in bins if b.count]
    left, width = np.array([b.low for b in full]), np.array([b.high - b.low for b in full])
    accuracy, confidence = np.array([b.accuracy for b in full]), np.array([b.confidence for b in full])
    bars = upper.bar(left, accuracy, width, align="edge", color=theme.accent, edgecolor=theme.paper)
    for drawn, one in zip(bars, full, strict=True):
        drawn.set_alpha(1.0 if one.count >= FEW else 0.25)
    upper.hlines(confidence, left, left + width, color=theme.warm, linewidth=2.5, label="average confidence")
    upper.plot([0, 1], [0, 1], color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), label="as right as confident")
    upper.set(title=f"{name}: ECE {expected_calibration_error(bins):.3f}", xlim=(0, 1), ylim=(0, 1))
    total = sum(b.count for b in full)
    lower.bar(left, [b.count / total for b in full], width, align="edge", color=theme.accent, edgecolor=theme.paper)
    lower.set(xlabel="confidence: probability of the answer")
    for ax in (upper, lower):
        _dress(ax, theme)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def class_bars(scores: Sequence[ClassScore], theme: Theme = LIGHT) -> bytes:
    """The F1 of every class, best first."""
    shown = _most_frequent(np.array([s.support for s in scores]))
    best_first = sorted((scores[i] for i in shown), key=lambda s: (-s.f1, s.name))
    figure, ax = canvas(6.4, 0.3 * len(best_first) + 1.3, theme)
    f1 = [s.f1 for s in best_first]
    ax.barh(range(len(f1)), f1, height=0.72, color=theme.accent)
    for place, value in enumerate(f1):
        ax.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8.5, color=theme.ink)
    labels = [f"{short(s.name)} ({s.support})" for s in best_first]
    ax.set_yticks(range(len(labels)), labels, parse_math=False)
    ax.set(ylim=(len(f1) - 0.4, -0.6), xlim=(0, 1.08), xlabel="F1", xticks=np.linspace(0, 1, 6))
    ax.set_title(_title("F1 by class (test texts)", shown, scores))
    ax.grid(axis="y", visible=False)
    return png(figure)


def training_curve(
    points: Iterable[Point], path: Path, metrics: Sequence[str] = ("train/loss", "val/loss"), theme: Theme = LIGHT
) -> None:
    """Write a line for every one of `metrics` that the points have, over the optimizer step."""
    known = list(points)
    figure, ax = canvas(7, 4, theme)
    for metric, color in zip(metrics, (theme.accent, theme.warm, theme.ink), strict=False):
        line = [(p.step, p.metrics[metric]) for p in known if metric in p.metrics]
        steps, values = np.array(line).reshape(-1, 2).T
        ax.plot(steps, values, color=color, linewidth=1.4, label=metric, marker="o" if len(line) < 20 else "", ms=4)
    ax.set(xlabel="step", title=" and ".join(metrics))
    _legend(ax, theme, loc="best")
    path.write_bytes(png(figure))


def _figure(width: float, height: float, theme: Theme) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=theme.paper)


def canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """An empty picture of this size in inches, dressed."""
    figure = _figure(width, height, theme)
    ax = figure.subplots()
    _dress(ax, theme)
    return figure, ax


def _dress(ax: Axes, theme: Theme) -> None:
    ax.set_facecolor(theme.paper)
    ax.set_axisbelow(True)
    ax.grid(color=theme.faint, linewidth=0.6)
    ax.tick_params(colors=theme.ink, labelsize=9, length=0)
    ax.spines[:].set_visible(False)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_color(theme.ink)
    ax.title.set_fontsize(11)


def _legend(ax: Axes, theme: Theme, loc: Literal["best", "upper left"]) -> None:
    ax.legend(loc=loc, fontsize=8.5, facecolor=theme.paper, edgecolor=theme.faint, labelcolor=theme.ink)


def png(figure: Figure) -> bytes:
    """The bytes of a picture, without a word of when or by what it was made."""
    out = BytesIO()
    with warnings.catch_warnings():  # a class may be named in a script that the font lacks: boxes are drawn
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _most_frequent(support: np.ndarray) -> np.ndarray:
    """The classes to show, in their own order."""
    return np.sort(np.argsort(-support, kind="stable")[:MAX_CLASSES])


def _title(text: str, shown: np.ndarray, everything: Sequence[object]) -> str:
    return text if len(shown) == len(everything) else f"{text}: the {len(shown)} largest of {len(everything)} classes"


def short(name: str) -> str:
    """A name on one line, cut where it is long."""
    line = " ".join(name.split())
    return line if len(line) <= MAX_NAME else f"{line[: MAX_NAME - 1]}…"
