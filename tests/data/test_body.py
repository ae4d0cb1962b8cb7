"""The body in a chest CT: with lungs and bowel gas, without the air around it and the table; in scans that end within
it. Reference: shapes whose mask is known."""

import numpy as np
import pytest
import torch

from ctclip.data.body import FINEST, body_mask


def phantom() -> np.ndarray:
    """(z, x, y) HU over the cube: a box of tissue with two lungs, a bubble of gas, and a table below its back."""
    hu = np.full((30, 60, 60), -1000.0)
    hu += np.random.default_rng(0).normal(0, 8, hu.shape)
    hu[:, 10:50, 15:45] = 40
    hu[5:25, 14:26, 20:40] = hu[5:25, 34:46, 20:40] = -850
    hu[10, 30, 30] = -1000
    hu[:, :, 50] = -200  # the table's shell, from side to side
    hu[:, 5:55, 55] = -300
    return hu


def masked(hu: np.ndarray) -> np.ndarray:
    return body_mask(torch.from_numpy(hu / 1000).clamp(-1, 1)[None, None].float())


def test_lungs_and_gas_are_inside_and_the_table_is_not():
    expected = np.zeros((30, 60, 60), bool)
    expected[:, 10:50, 15:45] = True
    np.testing.assert_array_equal(masked(phantom()), expected)


def test_a_scan_that_ends_within_the_lungs_keeps_them():
    """Its sides cut through both lungs, with padding around."""
    hu = np.full((30, 60, 60), -1000.0)
    inside = slice(4, 26), slice(20, 40), slice(22, 44)
    hu[inside] = np.maximum(phantom()[inside], -999)
    found = masked(hu)
    assert found[inside].all() and found.sum() == found[inside].size


@pytest.mark.parametrize("hu", [-1000.0, -800.0, 40.0])
def test_where_no_body_can_be_told_all_is_one(hu):
    assert masked(np.full((6, 6, 6), hu)).all()


def test_of_fine_volumes_every_kth_voxel_is_looked_at():
    volume = torch.full((1, 1, 2 * FINEST, FINEST, 3 * FINEST - 1), -0.99)
    volume[..., 32:96, 96:192] = 0.1
    found = body_mask(volume)
    assert found.shape == (FINEST, FINEST, FINEST)
    np.testing.assert_array_equal(np.flatnonzero(found.any((0, 1))), np.arange(32, 64))
