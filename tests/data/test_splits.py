"""Splits by patient: together, alike, and by the seed only."""

import numpy as np
import pytest

from ctclip.data.cohort import Volume, split_by_patient
from ctclip.data.ct_rate import PREVALENCE, volume_path
from ctclip.data.tables import CohortError


def people(patients, seed=0):
    """One to three reconstructions each, labels at CT-RATE's prevalence."""
    rng, prevalence = np.random.default_rng(seed), np.array(list(PREVALENCE.values()))
    for number in range(patients):
        labels = (rng.random(18) < prevalence).astype(np.float32)
        for reconstruction in range(rng.integers(1, 4)):
            name = f"train_{number}_a_{reconstruction + 1}.nii.gz"
            yield Volume(name, volume_path(name, True), labels)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("patients", [2, 3, 50])
def test_split_keeps_patients_together(patients, fraction):
    volumes = list(people(patients))
    rest, held = split_by_patient(volumes, fraction, seed=1)
    sides = [{v.patient for v in side} for side in (rest, held)]
    assert all(sides) and not sides[0] & sides[1]
    assert sorted(v.name for v in rest + held) == sorted(v.name for v in volumes)
    assert len(sides[1]) == min(max(round(fraction * patients), 1), patients - 1)


def test_split_depends_on_the_seed_only():
    volumes = list(people(40))

    def held(order, seed):
        return {v.name for v in split_by_patient(order, 0.25, seed)[1]}

    assert held(volumes, 1) == held(volumes[::-1], 1) != held(volumes, 2)


def test_split_keeps_label_rates_alike():
    """400 patients, a quarter held out: on average over the labels at most half as far apart as in random splits."""
    volumes = list(people(400))

    def gap(held):
        inside = np.array([v.patient in held for v in volumes])
        labels = np.array([v.labels for v in volumes])
        return np.abs(labels[inside].mean(0) - labels[~inside].mean(0)).mean()

    patients, rng = sorted({v.patient for v in volumes}), np.random.default_rng(0)
    random = np.mean([gap(set(rng.choice(patients, 100, replace=False))) for _ in range(30)])
    for seed in range(5):
        assert gap({v.patient for v in split_by_patient(volumes, 0.25, seed)[1]}) < random / 2


@pytest.mark.parametrize(("patients", "fraction"), [(0, 0.5), (1, 0.5), (5, 0.0), (5, 1.0), (5, float("nan"))])
def test_impossible_splits_are_errors(patients, fraction):
    with pytest.raises(CohortError, match="at least 2 patients and a fraction"):
        split_by_patient(list(people(patients)), fraction, 0)
