"""CT-RATE's names, layout and prevalence, as the hub and the paper spell them."""

import pytest

from ctclip.data.ct_rate import (
    PREVALENCE,
    labels_path,
    metadata_path,
    names_patient,
    no_chest_path,
    patient_of,
    scan_of,
    volume_name,
    volume_path,
)
from ctclip_model import ABNORMALITIES


def test_hub_layout():
    name = "valid_1_a_1.nii.gz"
    assert volume_path(name, True).as_posix() == f"dataset/valid_fixed/valid_1/valid_1_a/{name}"
    name = "train_12_b_2.nii.gz"
    assert volume_path(name, False).as_posix() == f"dataset/train/train_12/train_12_b/{name}"
    assert (patient_of(name), scan_of(name)) == ("train_12", "train_12_b")
    tables_of = [[f(s).as_posix() for s in ("train", "valid")] for f in (labels_path, metadata_path, no_chest_path)]
    assert tables_of == [
        [f"dataset/multi_abnormality_labels/{s}_predicted_labels.csv" for s in ("train", "valid")],
        [f"dataset/metadata/{s}_metadata.csv" for s in ("train", "validation")],
        [f"dataset/metadata/no_chest_{s}.txt" for s in ("train", "valid")],
    ]


def test_prevalence_is_the_published_one():
    """Pooled over the 18 labels it is 19.2 %."""
    assert tuple(PREVALENCE) == ABNORMALITIES and sum(PREVALENCE.values()) / 18 == pytest.approx(0.192, abs=5e-4)
    assert (PREVALENCE["Medical material"], PREVALENCE["Lung nodule"]) == (0.123, 0.454)


@pytest.mark.parametrize("name", ["train_12_a_1.nii.gz", "dataset/valid/valid_3_b_2.nii.gz", "train_12_a_1"])
def test_names_of_ct_rates_form_tell_the_patient_and_need_no_folder(name):
    assert names_patient(name) and "/" not in volume_name(f" {name} ")


@pytest.mark.parametrize("name", ["scan 3", "train_12_a.nii.gz", "a/b_1.nii.gz", "x_1__1.nii.gz", "a_b_c_1.nii.gz"])
def test_other_names_do_not(name):
    assert not names_patient(name) and volume_name(name) == name
