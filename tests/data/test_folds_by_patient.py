"""Folds of cross-validation: every patient in one, alike, and by the seed only."""

import numpy as np
import pytest
from test_splits import people

from ctclip.data.cohort import patient_folds
from ctclip.data.tables import CohortError


@pytest.mark.parametrize(("patients", "folds"), [(2, 2), (7, 3), (7, 7), (60, 5)])
def test_every_patient_is_in_one_fold_with_all_volumes(patients, folds):
    volumes = list(people(patients))
    found = patient_folds(volumes, folds, seed=3)
    sets = [{volume.patient for volume in fold} for fold in found]
    assert len(found) == folds and sorted(p for each in sets for p in each) == sorted({v.patient for v in volumes})
    assert sorted(v.name for fold in found for v in fold) == sorted(v.name for v in volumes)
    assert max(map(len, sets)) - min(map(len, sets)) <= 1 and min(map(len, sets)) >= 1


def test_folds_depend_on_the_seed_only():
    volumes = list(people(30))

    def names(order, seed):
        return [sorted(v.name for v in fold) for fold in patient_folds(order, 3, seed)]

    assert names(volumes, 1) == names(volumes[::-1], 1) != names(volumes, 2)


def test_folds_have_label_rates_alike():
    """300 patients: rates of five folds are at most half as far apart as in random folds."""
    volumes = list(people(300))
    patients, rng = sorted({v.patient for v in volumes}), np.random.default_rng(0)

    def spread(folds):
        rates = [np.mean([v.labels for v in volumes if v.patient in fold], axis=0) for fold in folds]
        return np.std(rates, axis=0).mean()

    random = [spread([set(part) for part in np.array_split(rng.permutation(patients), 5)]) for _ in range(10)]
    assert spread([{v.patient for v in fold} for fold in patient_folds(volumes, 5, 0)]) < np.mean(random) / 2


def test_more_folds_than_patients_is_an_error():
    with pytest.raises(CohortError, match="found 3 patients for 4 folds"):
        patient_folds(list(people(3)), 4, 0)
