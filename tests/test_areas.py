"""The area under a curve, against integrals known by hand."""

import pytest

from pliant.areas import GRID, accuracy_at, area
from pliant.errors import BadInput


def test_a_network_that_loses_nothing_has_its_accuracy_as_area():
    assert area([(0, 0.8), (0.9, 0.8)], chance=0.1) == pytest.approx(0.8, abs=1e-15)


def test_a_straight_line_has_its_mean():
    assert area([(0, 0.9), (0.9, 0.0)], chance=0.1) == pytest.approx(0.45, abs=1e-15)


def test_the_order_of_the_points_does_not_matter():
    points = [(0.5, 0.7), (0, 0.8), (0.9, 0.2), (0.3, 0.75)]
    assert area(points, 0.1) == area(sorted(points), 0.1)


def test_a_size_that_is_not_reached_counts_as_guessing():
    # 0.8 at 0, 0.1, …, 0.5, then 0.1: trapezoids 5·0.8 + 0.45 + 3·0.1 of nine.
    assert area([(0, 0.8), (0.5, 0.8)], chance=0.1) == pytest.approx((5 * 0.8 + 0.45 + 0.3) / 9, abs=1e-15)


def test_a_size_missed_by_a_hair_counts_as_reached():
    assert accuracy_at([(0, 0.8), (0.898, 0.6)], 0.9, chance=0.1) == 0.6
    assert accuracy_at([(0, 0.8), (0.89, 0.6)], 0.9, chance=0.1) == 0.1


def test_points_between_the_grid_are_interpolated():
    assert accuracy_at([(0, 0.8), (0.4, 0.6), (0.9, 0.1)], 0.2, chance=0.1) == pytest.approx(0.7)


def test_of_two_networks_of_one_size_the_better_one_counts():
    assert area([(0, 0.5), (0, 0.8), (0.9, 0.8)], 0.1) == pytest.approx(0.8)


def test_a_curve_needs_the_dense_network():
    with pytest.raises(BadInput, match="dense network"):
        area([(0.5, 0.7)], 0.1)


def test_the_grid_has_ten_shares():
    assert GRID == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
