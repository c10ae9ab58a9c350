"""The area under a curve, against integrals known by hand."""

import pytest
import scipy.stats

from pliant.errors import BadInput
from pliant.reporting.area import GRID, accuracy_at, area, is_reached
from pliant.reporting.intervals import difference, estimate, student_t


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


def test_a_point_is_reached_up_to_the_slack():
    assert is_reached([(0, 0.8), (0.898, 0.6)], 0.9)
    assert not is_reached([(0, 0.8), (0.89, 0.6)], 0.9)


# ------------------------------------------------------------------------------------------------------- intervals

# Student's t for 95 %, two-sided, by degrees of freedom: from any printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize("freedom", TABLE)
def test_students_t_is_that_of_the_tables(freedom):
    assert student_t(freedom) == pytest.approx(TABLE[freedom], abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 101])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_students_t_is_that_of_scipy(freedom, level):
    # 1e-11: scipy's own error is about 1e-14, that of 1 - level at 0.999 about 1e-13.
    assert student_t(freedom, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-11)


def test_an_interval_of_three_values_by_hand():
    # Mean 0.8, standard deviation 0.1: half = t(2)·0.1/√3.
    mean, half, n = estimate([0.7, 0.8, 0.9])
    assert (mean, n) == (pytest.approx(0.8), 3)
    assert half == pytest.approx(4.302652729911275 * 0.1 / 3**0.5)


def test_one_value_has_no_interval():
    assert estimate([0.7]) == (0.7, None, 1)


def test_differences_are_taken_by_pairs_of_equal_seeds():
    # Both vary with the seed; the difference, 0.1 and 0.2 at the common seeds, is what counts: t(1)·0.0707/√2 = 0.635.
    mean, half, n = difference({0: 0.5, 1: 0.9, 7: 0.1}, {1: 0.8, 0: 0.3, 5: 0.9})
    assert mean == pytest.approx(0.15)
    assert half == pytest.approx(12.706204736 * 0.05)
    assert n == 2


def test_one_common_seed_gives_a_difference_without_interval():
    assert difference({0: 0.5, 1: 0.9}, {1: 0.8, 2: 0.1}) == (pytest.approx(0.1), None, 1)


def test_without_common_seeds_the_means_are_compared_without_interval():
    assert difference({0: 0.5, 1: 0.7}, {2: 0.4}) == (pytest.approx(0.2), None, 0)
