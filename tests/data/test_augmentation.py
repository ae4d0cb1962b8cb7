"""Augmentation that moves a little, never mirrors, and follows from seed and name alone."""

import numpy as np
import torch
from helpers_data import SMALL, A, C, row_for

from ctclip.data.augmentation import Augmentation, augment
from ctclip.data.cohort import load_cohort
from ctclip.data.loading import volume_loader
from ctclip.data.preprocessing import preprocess_volume


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def marked():
    """Air with a bright block left of the middle, in the upper back: axes (z, x, y), x to the left."""
    volume = torch.full((1, 100, 100, 130), -1.0)
    volume[0, 70:80, 75:85, 100:110] = 0.9
    return volume


def test_augmentation_moves_a_little_and_never_mirrors():
    """The block stays where it was but for 3 % of each axis, and such moves do occur."""
    shifts = []
    for seed in range(40):
        volume = marked()
        assert augment(volume, seeded(seed)) is volume, "in place"
        assert volume.min() >= -1 and volume.max() <= 1 and volume.isfinite().all()
        block = (volume[0] > 0.4).nonzero()
        assert len(block) == 1000
        shifts.append((block.min(0).values - torch.tensor([70, 75, 100])).tolist())
    shifts = np.array(shifts)
    assert shifts.min(0).tolist() == [-3, -3, -4] and shifts.max(0).tolist() == [3, 3, 4]


def test_augmentation_moves_air_in_and_keeps_the_rest_in_place():
    """Every voxel has its own value: the voxel that lands somewhere is the one that should, all others are air."""
    before = torch.rand(1, 40, 50, 60, generator=seeded(0)) - 0.3
    for seed in range(8):
        after = augment(before.clone(), seeded(seed))[0]
        draws = seeded(seed)  # the order in which augment draws
        shift = [int(torch.randint(-most, most + 1, (), generator=draws)) for most in (1, 2, 2)]
        expected = torch.full_like(after, -1)
        to = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, after.shape, strict=True))
        of = tuple(slice(max(-s, 0), n + min(-s, 0)) for s, n in zip(shift, after.shape, strict=True))
        expected[to] = before[0][of]
        inside = expected > -1
        gain, offset = np.polyfit(expected[inside], after[inside], 1)
        assert 0.95 <= gain <= 1.05 and -0.021 <= offset <= 0.021
        noise = after[inside] - gain * expected[inside] - offset
        assert noise.std() < 0.0201 and noise.abs().max() < 0.12
        assert (after[~inside] < -0.8).all()


def tensors(volumes, seed, **kwargs):
    """Name -> tensor of one epoch."""
    augmentation = None if seed is None else Augmentation(seed)
    loader = volume_loader(volumes, SMALL, augmentation=augmentation, **kwargs)
    return {volumes[int(batch.index[0])].name: batch.volumes[0].clone() for batch in loader}


def test_augmentation_follows_from_seed_and_name(data_dir):
    volumes = load_cohort(data_dir, "valid").volumes
    first = tensors(volumes, 7)
    for again in (
        tensors(volumes[::-1], 7),
        tensors(volumes[1:], 7),  # a resumed epoch
        tensors(volumes, 7, num_workers=2),
    ):
        assert again and all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    other, plain = tensors(volumes, 8), tensors(volumes, None)
    assert len(first) == 3
    for volume in volumes:
        assert not torch.equal(other[volume.name], first[volume.name])
        untouched = preprocess_volume(volume.path, volume.metadata and row_for(volume), SMALL)
        assert torch.equal(plain[volume.name], untouched) and not torch.equal(first[volume.name], untouched)
    assert not torch.equal(first[A] - plain[A], first[C] - plain[C]), "every volume draws its own"
