import math
import random
from itertools import pairwise

import pytest

from srd_modifier.evaluation.plots.labels import Label, place_labels, spread
from srd_modifier.evaluation.plots.style import new_figure, settings


def placed(labels, *, lines=()):
    """The boxes that labels get on an empty square, in pixels, and those of their markers."""
    with settings():
        figure = new_figure(5.0)
        axes = figure.add_subplot()
        axes.set(xlim=(0, 10), ylim=(0, 10))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        points = [(label.x, label.y) for label in labels]
        place_labels(axes, labels, points=points, lines=lines)
        from matplotlib.text import Text

        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
        return boxes, [axes.transData.transform(point) for point in points], axes.bbox


def test_a_label_alone_is_beside_its_point():
    (box,), (point,), _ = placed([Label("a model", 5, 5)])
    nearest = min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)
    assert 0 < math.dist(point, nearest) < 20


def test_labels_cover_neither_one_another_nor_the_points():
    labels = [Label(f"model number {number}", 3 + number * 0.15, 7 - number * 0.3) for number in range(12)]
    boxes, points, _ = placed(labels, lines=[[(label.x, label.y) for label in labels]])
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*point) for point in points)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (10, 0), (0, 10), (10, 10)])
def test_labels_stay_inside_of_the_axes(x, y):
    (box,), _, frame = placed([Label("a model with a long name", x, y)])
    assert frame.x0 <= box.x0
    assert box.x1 <= frame.x1
    assert frame.y0 <= box.y0
    assert box.y1 <= frame.y1


def test_no_labels_are_no_error():
    assert placed([])[0] == []


def test_things_that_have_room_stay_where_they_are():
    assert spread([50, 10, 30], [10, 10, 10], high=100) == [50, 10, 30]


def test_things_that_touch_move_apart_by_as_much():
    assert spread([20, 20], [10, 10], high=100) == [15, 25]


def test_a_column_ends_at_its_ends():
    assert spread([0, 1, 99], [10, 10, 10], high=100) == [5, 15, 95]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_overlaps_after_spreading(seed):
    source = random.Random(seed)
    sizes = [source.uniform(5, 12) for _ in range(8)]
    found = spread([source.uniform(-20, 120) for _ in sizes], sizes, high=100)
    ends = sorted((middle - size / 2, middle + size / 2) for middle, size in zip(found, sizes, strict=True))
    assert ends[0][0] >= -1e-9
    assert ends[-1][1] <= 100 + 1e-9
    assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(ends))


def test_nothing_to_spread_is_no_error():
    assert spread([], [], high=10) == []
