"""A scan's maps in memory: which tokens count as body, how bright a map is, where its strongest evidence lies in words
and in slices. References: places known by construction."""

import numpy as np
import pytest
from helpers_maps import cube, cylinder, maps_of, within

from ctclip.inference.decisions import Decision
from ctclip.inference.scan_maps import brightness, location_words, slice_number, strongest_place, tokens_within


def test_only_tokens_in_the_body_count():
    """The strongest of all lies in the air."""
    values = np.zeros((1, 8, 12, 12))
    values[0, 2, 5, 7], values[0, 3, 0, 6], values[0, 4, 5, 5] = 2, 9, -5
    maps = maps_of(values)
    assert maps.tokens_in_body[:, 2:10, 2:10].all() and not maps.tokens_in_body[:, 0].any()
    assert maps.highest.tolist() == [2] and maps.values[0, 3, 0, 6] == 0 and maps.values[0, 4, 5, 5] == -5
    assert strongest_place(maps, 0) == pytest.approx((2.5 / 8, 5.5 / 12, 7.5 / 12))
    assert maps.contributions.values[0, 3, 0, 6] == 9, "numbers stay as they are"


def test_tokens_that_the_body_half_fills_are_in_it_and_the_fullest_of_a_thin_scan():
    body = np.zeros((8, 12, 12), bool)
    body[:, 3:10, 4:8] = True
    assert np.flatnonzero(tokens_within(body, (4, 6, 6)).any((0, 2))).tolist() == [1, 2, 3, 4]  # 3 and 9 are halves
    body[:] = False
    body[3] = True
    assert np.flatnonzero(tokens_within(body, (2, 6, 6)).any((1, 2))).tolist() == [0]


@pytest.mark.parametrize(
    ("probability", "cut", "expected"),
    [(0.36, 0.36, 0.5), (0.18, 0.36, 0.25), (0.68, 0.36, 0.75), (1, 0.36, 1), (0, 0.36, 0.001), (0.4, None, 1),
     (1, 1, 1), (0.99, 1, 0.495), (0, 0, 0.5)],
)  # fmt: skip
def test_brightness_follows_the_answer_and_half_is_the_cut(probability, cut, expected):
    assert brightness(Decision("Emphysema", probability, cut)) == pytest.approx(expected)


def test_of_one_evidence_a_no_is_dimmer_than_a_yes():
    values = np.zeros((2, 8, 12, 12))
    values[:, 4, 5, 6] = 3
    maps = maps_of(values, (("A", 0.9, 0.5), ("B", 0.05, 0.5)))
    assert maps.reached.tolist() == pytest.approx([0.9, 0.05])


def test_evidence_outside_the_body_keeps_what_is_inside_dim():
    values = np.zeros((3, 8, 12, 12))
    values[:2, 4, 5, 6], values[:, 3, 0, 6], values[2] = 1, 4, values[2] - 1
    values[1, 3, 0, 6] = 0
    maps = maps_of(values, (("A", 0.9, 0.5), ("B", 0.9, 0.5), ("C", 0.9, 0.5)))
    assert maps.reached.tolist() == pytest.approx([0.9 / 4, 0.9, 0])
    assert maps.outside.tolist() == pytest.approx([0.8, 0, 0])


@pytest.mark.parametrize(
    ("token", "words"),
    [((5, 3, 3), "on the patient's right, in the anterior third of the body, 112 mm below the top of the scan"),
     ((5, 8, 8), "on the patient's left, in the posterior third of the body, 112 mm below the top of the scan"),
     ((1, 5, 6), "near the midline, in the middle third of the body, 292 mm below the top of the scan")],
)  # fmt: skip
def test_places_in_words(token, words):
    values = np.zeros((1, 8, 12, 12))
    values[0][token] = 1
    assert location_words(maps_of(values), 0) == words


def test_where_the_scan_ends_within_the_body_its_middle_is_not_the_patient_s():
    values = np.zeros((1, 8, 12, 12))
    values[0, 4, 7, 6] = 1
    placement, voxels = within((0.0, 1.0), x=(0.25, 0.75)), cylinder()
    voxels[..., :12, :] = voxels[..., 36:, :] = -1
    assert location_words(maps_of(values, placement=placement, voxels=voxels), 0).startswith("towards the patient")


def test_slices_count_from_head_right_and_front_whatever_the_order_in_the_file():
    upright = cube((10, 20, 30))
    assert [slice_number(upright, axis, 0.01) for axis in range(3)] == [(30, 30), (1, 10), (1, 20)]
    turned = within((1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (10, 20, 30))
    assert [slice_number(turned, axis, 0.01) for axis in range(3)] == [(30, 30), (1, 10), (1, 20)]
    assert slice_number(turned, 0, 0.99) == (1, 30)


def test_without_evidence_the_place_is_the_middle_of_the_body():
    maps = maps_of(np.full((1, 8, 12, 12), -1.0), voxels=cylinder(z=(0.25, 0.75)), placement=within((0.25, 0.75)))
    assert strongest_place(maps, 0) == pytest.approx((0.5, 0.5, 0.5), abs=0.02)
