import random

import pytest

from srd_modifier.evaluation.plots.pareto import Point, pareto


def points(*pairs: tuple[int, float], higher_is_better: bool = False) -> list[Point]:
    return [Point(str(number), "", size, value, higher_is_better) for number, (size, value) in enumerate(pairs)]


def front(*pairs: tuple[int, float], higher_is_better: bool = False) -> list[str]:
    return [point.label for point in pareto(points(*pairs, higher_is_better=higher_is_better))]


def test_a_model_that_is_larger_and_worse_is_not_on_the_front():
    assert front((10, 3.0), (20, 2.0), (30, 2.5), (15, 4.0)) == ["0", "1"]


def test_the_front_goes_from_the_smallest_to_the_largest():
    assert front((30, 1.0), (10, 3.0), (20, 2.0)) == ["1", "2", "0"]


def test_accuracies_count_the_other_way():
    assert front((10, 0.5), (20, 0.4), (30, 0.6), higher_is_better=True) == ["0", "2"]


def test_of_equal_sizes_the_better_one_is_on_the_front():
    assert front((10, 3.0), (10, 2.0)) == ["1"]


def test_of_equal_scores_the_smaller_one_is_on_the_front():
    assert front((20, 2.0), (10, 2.0)) == ["1"]


def test_models_that_are_equal_in_both_are_all_on_the_front():
    assert front((10, 2.0), (10, 2.0), (20, 1.0)) == ["0", "1", "2"]


def test_no_models_have_no_front():
    assert pareto([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_its_definition_says(seed):
    source = random.Random(seed)
    some = points(*((source.randint(1, 6), source.randint(1, 6)) for _ in range(12)))

    def beats(one: Point, other: Point) -> bool:
        at_least = one.bytes <= other.bytes and one.value <= other.value
        return at_least and (one.bytes, one.value) != (other.bytes, other.value)

    expected = {point for point in some if not any(beats(other, point) for other in some)}
    assert set(pareto(some)) == expected
