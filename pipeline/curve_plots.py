"""Curves of an evaluation as pictures: the mean of the classes, the best few and the worst few, the others in grey."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.curves import Curve
from pipeline.plots import LIGHT, Theme, canvas, png, short

NAMED = 3
"""Best classes, and worst classes, that have a line with a name."""

STROKES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


def roc_curves(curves: Sequence[Curve], mean: Curve | None, theme: Theme = LIGHT) -> bytes:
    """The ROC curves of classes against the rest, by area. Without any class to draw, an empty picture."""
    figure, ax = _square(len(curves), theme)
    ax.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    _lines(figure, ax, curves, mean, theme, steps="default")
    ax.set(xlabel="share of the other texts that is taken for the class", ylabel="share of the class that is found")
    ax.set_title("ROC, each class against the rest")
    return png(figure)


def precision_recall_curves(curves: Sequence[Curve], mean: Curve | None, theme: Theme = LIGHT) -> bytes:
    """The precision-recall curves of classes against the rest, by average precision, drawn as steps."""
    figure, ax = _square(len(curves), theme)
    _lines(figure, ax, curves, mean, theme, steps="steps-pre")
    ax.set(xlabel="recall: share of the class that is found", ylabel="precision: share of the finds that is right")
    ax.set_title("Precision and recall, each class against the rest")
    return png(figure)


def coverage_curve(curve: Curve, theme: Theme = LIGHT) -> bytes:
    """How many answers are right if only the surest are given."""
    figure, ax = canvas(4.7, 3.9, theme)
    ax.plot(curve.x, curve.y, color=theme.accent, linewidth=2)
    ax.axhline(curve.y[-1], color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(xlabel="share of the texts that is answered, the surest first", ylabel="share of the answers that is right")
    ax.set(xlim=(0, 1), ylim=(max(0.0, _floor(curve)), 1.005))
    ax.set_title(f"Right where all are answered: {curve.y[-1]:.3f}")
    _percent(ax)
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    return png(figure)


def _floor(curve: Curve) -> float:
    """The lowest height worth showing: the first few answers alone say nothing."""
    return float(np.floor(10 * curve.y[curve.x >= min(0.05, curve.x[-1])].min()) / 10) - 0.02


def _square(n_curves: int, theme: Theme) -> tuple[Figure, Axes]:
    """A square picture with room for the legend beneath it."""
    figure, ax = canvas(5.0, 5.0 + 0.12 * (min(n_curves, 2 * NAMED) + 2), theme)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.set_aspect("equal")
    _percent(ax)
    return figure, ax


def _lines(figure: Figure, ax: Axes, curves: Sequence[Curve], mean: Curve | None, theme: Theme, steps: str) -> None:
    ranked = sorted(curves, key=lambda curve: (-curve.area, curve.name))
    best, others, worst = chosen(ranked)
    for curve in others:
        ax.plot(curve.x, curve.y, color=theme.faint, linewidth=0.8, drawstyle=steps, zorder=1.5)
    for group, color in ((best, theme.accent), (worst, theme.warm)):
        for curve, stroke in zip(group, STROKES, strict=False):
            ax.plot(
                curve.x, curve.y, color=color, linewidth=1.5, linestyle=stroke, drawstyle=steps, label=_label(curve)
            )
    if mean is not None and len(ranked) > 1:
        ax.plot(mean.x, mean.y, color=theme.ink, linewidth=2.6, drawstyle=steps, label=_label(mean))
    if others:
        ax.plot([], [], color=theme.faint, linewidth=0.8, label=f"{len(others)} classes in between")
    if ranked:
        legend = figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False, labelcolor=theme.ink)
        for text in legend.get_texts():
            text.set_parse_math(False)


def chosen(ranked: Sequence[Curve]) -> tuple[Sequence[Curve], Sequence[Curve], Sequence[Curve]]:
    """The best, those in between, and the worst, of curves from the best to the worst."""
    few = min(NAMED, -(-len(ranked) // 2))
    least = min(NAMED, len(ranked) - few)
    return ranked[:few], ranked[few : len(ranked) - least], ranked[len(ranked) - least :]


def _label(curve: Curve) -> str:
    return f"{curve.area:.3f}  {short(curve.name)}"


def _percent(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
