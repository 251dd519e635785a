"""Labels of a plot cover neither each other nor the points, and stay within the axes."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.labels import place_labels

LABELS = {
    "apart": [("first", 1.0, 1.0), ("second", 2.0, 3.0), ("third", 4.0, 2.0)],
    "crowded": [(f"network_{index}", 2 + 0.02 * index, 2 + 0.01 * index) for index in range(5)],
    "at the edge": [("a long name at the right edge", 3.98, 2.0), ("top", 2.0, 3.98)],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_stay_apart(labels):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter([x for _, x, _ in labels], [y for _, _, y in labels], s=4)
    axes.set(xlim=(0, 4), ylim=(0, 4))
    place_labels(axes, labels, size=7)
    assert [text.get_text() for text in axes.texts] == [text for text, _, _ in labels]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label, renderer) for label in axes.texts]  # without the lines that lead there
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    room = axes.get_window_extent(renderer)
    for box in boxes:
        assert room.x0 <= box.x0 < box.x1 <= room.x1
        assert room.y0 <= box.y0 < box.y1 <= room.y1
        assert not any(box.contains(*axes.transData.transform((x, y))) for _, x, y in labels)
