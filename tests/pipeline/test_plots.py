import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline import curve_plots, curves, metrics, plots
from pipeline.tracking import Point

HOSTILE = ["$x_{1", "日本語", "with\nnewline", "a name that goes on and on and on and on", "<b>&"]


def picture(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert 200 < width < 2600
    assert 150 < height < 2600
    return width, height


def answers(n_labels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, n_labels, 400)
    table = draw.dirichlet(np.ones(n_labels), size=400) + np.eye(n_labels)[targets]
    table /= table.sum(axis=1, keepdims=True)
    return targets, table, [HOSTILE[i] if i < len(HOSTILE) else f"class {i}" for i in range(n_labels)]


def example(n_labels: int) -> tuple[metrics.Scores, np.ndarray]:
    targets, table, names = answers(n_labels)
    confusion = metrics.Labelling(targets, table.argmax(1), n_labels).confusion
    return metrics.score(targets, table, names, resamples=100), confusion


@pytest.mark.parametrize("n_labels", [2, 12, 60])
def test_pictures_are_png_of_a_reasonable_size(n_labels: int):
    scores, confusion = example(n_labels)
    picture(plots.confusion_matrix(confusion, [row.name for row in scores.per_class]))
    picture(plots.class_bars(scores.per_class))
    both = {"before": scores.bins, "after": scores.calibrated_bins}
    wide, _ = picture(plots.reliability_diagram(both))
    narrow, _ = picture(plots.reliability_diagram({"before": scores.bins}))
    assert narrow < wide


@pytest.mark.parametrize("n_labels", [2, 6, 52])
def test_curves_are_pictures_of_a_reasonable_size_in_both_themes(n_labels: int):
    targets, table, names = answers(n_labels)
    drawn = curves.one_vs_rest(targets, table, names)
    for theme in (plots.LIGHT, plots.DARK):
        picture(curve_plots.roc_curves(drawn.roc, drawn.macro_roc, theme))
        picture(curve_plots.precision_recall_curves(drawn.precision_recall, drawn.macro_precision_recall, theme))
        picture(curve_plots.coverage_curve(curves.most_confident(targets, table), theme))


@pytest.mark.parametrize(("n_classes", "groups"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (6, [3, 0, 3]), (9, [3, 3, 3])])
def test_of_many_classes_the_best_and_the_worst_get_a_name(n_classes: int, groups: list[int]):
    line = np.array([0.0, 1.0])
    ranked = [curves.Curve(str(i), line, line, 1 - i / 10) for i in range(n_classes)]
    chosen = curve_plots.chosen(ranked)
    assert [len(group) for group in chosen] == groups
    assert [curve for group in chosen for curve in group] == ranked


def test_a_single_text_can_be_drawn():
    curve = curves.most_confident(np.array([0]), np.array([[1.0, 0.0]]))
    picture(curve_plots.coverage_curve(curve))


def test_equal_inputs_give_equal_bytes_and_the_themes_differ():
    scores, confusion = example(4)
    names = [row.name for row in scores.per_class]
    light, again = (plots.confusion_matrix(confusion, names) for _ in range(2))
    assert light == again
    assert light != plots.confusion_matrix(confusion, names, plots.DARK)


def test_no_picture_says_when_or_with_what_it_was_made():
    scores, _ = example(3)
    png = plots.class_bars(scores.per_class)
    for trace in (b"tEXt", b"tIME", b"iTXt", b"atplotlib"):
        assert trace not in png


def test_a_class_without_texts_and_a_perfect_one_are_drawn():
    picture(plots.confusion_matrix(np.array([[0, 0], [0, 5]]), ["none", "all"]))
    scores = metrics.score(np.array([1] * 5), np.eye(2, dtype=np.float32)[[1] * 5], ["none", "all"], resamples=100)
    picture(plots.class_bars(scores.per_class))
    picture(plots.reliability_diagram({"all": scores.bins}))


def test_a_training_curve_has_what_the_points_have(tmp_path: Path):
    points = [Point(step, 0, {"train/loss": 3 / (step + 1), "train/lr": 1e-3}) for step in range(50)]
    plots.training_curve(points, tmp_path / "a.png")
    plots.training_curve([*points, Point(49, 0, {"val/loss": 0.5})], tmp_path / "b.png")
    plots.training_curve([], tmp_path / "none.png")
    for name in ("a.png", "b.png", "none.png"):
        picture((tmp_path / name).read_bytes())
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
