"""`--label-map`: RAD-ChestCT's labels and predictions of the 18 against a mapping by hand and scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from helpers_evaluation import simulate

import ctclip_evaluation
from ctclip.data.label_map import any_label, read_label_map
from ctclip.data.tables import CohortError
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.tables import read_labels, read_predictions
from ctclip_model import ABNORMALITIES, UNKNOWN

pytestmark = pytest.mark.usefixtures("undrawn")
CALCIFICATIONS = ["Arterial wall calcification", "Coronary artery wall calcification"]
SAME = [name for name in ABNORMALITIES if name not in (*CALCIFICATIONS, "Mosaic attenuation pattern")]
DEVICES = ("catheter_or_port", "chest_tube", "clip", "gi_tube", "hardware", "pacemaker_or_defib", "stent",
           "tracheal_tube")  # fmt: skip
COLUMNS = {  # abnormalities of RAD-ChestCT by finding
    "Medical material": DEVICES, "Calcification": ("calcification",), "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",), "Hiatal hernia": ("hernia",),
    "Lymphadenopathy": ("lymphadenopathy",), "Emphysema": ("emphysema",), "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule", "nodulegr1cm"), "Lung opacity": ("opacity",),
    "Pulmonary fibrotic sequela": ("fibrosis",), "Pleural effusion": ("pleural_effusion",),
    "Peribronchial thickening": ("bronchial_wall_thickening",), "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",), "Interlobular septal thickening": ("septal_thickening",),
}  # fmt: skip
DECOYS = ("scattered_calc", "pericardial_thickening", "scattered_nod", "pleural_thickening", "bandlike_or_linear")
PLACES = ("right_upper", "left_lung", "other_location")


def rad_tables(folder, patients=40, seed=0, prefix="tst", stem=""):
    """Writes predictions of the 18 and labels as RAD-ChestCT has them; -> (predictions, 16 labels by hand)."""
    predictions, labels = simulate(patients, seed=seed)
    rng = np.random.default_rng(seed)
    truth = labels[SAME].assign(Calcification=labels[CALCIFICATIONS].max(axis=1))[list(COLUMNS)]
    names = [f"{prefix}{number:05d}" for number in range(1, 1 + len(truth))]
    cells = {}
    for finding, abnormalities in COLUMNS.items():
        own = [f"{abnormality}*{place}" for abnormality in abnormalities for place in PLACES]
        shown = rng.random((len(truth), len(own))) < 0.3
        shown[np.arange(len(truth)), rng.integers(len(own), size=len(truth))] = True
        cells |= dict(zip(own, (shown & (truth[[finding]].to_numpy() == 1)).T.astype(int), strict=True))
    cells |= {f"{name}*{place}": rng.integers(2, size=len(truth)) for name in DECOYS for place in PLACES}
    pd.DataFrame(cells, pd.Index(names, name="NoteAcc_DEID")).to_csv(folder / f"{stem}rad.csv")
    predictions.index = pd.Index([f"{name}.nii.gz" for name in names], name="VolumeName")
    predictions.to_csv(folder / f"{stem}p.csv")
    return predictions, truth.set_axis(predictions.index)


def run(folder, *args, table="p.csv", map_name="rad-chestct"):
    paths = [folder / name for name in (table if isinstance(table, list) else [table])]
    return ctclip_evaluation.main([
        "--predictions", *map(str, paths), "--labels", str(folder / "rad.csv"), "--label-map", str(map_name),
        "--output-dir", str(folder / "out"), "--resamples", "100", "--pictures", "0", *map(str, args)])  # fmt: skip


def test_any_label_is_positive_negative_or_unknown():
    labels = [[1, 0, UNKNOWN], [0, 0, 0], [0, UNKNOWN, 0], [UNKNOWN] * 3, [1, 1, 1]]
    assert any_label(np.array(labels)).tolist() == [1, 0, UNKNOWN, UNKNOWN, 1]


def test_the_shipped_map_makes_16_findings_of_predictions_of_the_18():
    label_map = read_label_map("rad-chestct")
    assert list(label_map.labels) == list(COLUMNS) and len(COLUMNS) == 16
    assert label_map.name_column == "NoteAcc_DEID" and "2403.17834" in label_map.source
    used = {name for names in label_map.predictions.values() for name in names}
    assert used == {*ABNORMALITIES} - {"Mosaic attenuation pattern"}


def test_rad_chestct_is_evaluated_on_16_findings_and_applied(tmp_path, capsys):
    predictions, truth = rad_tables(tmp_path)
    assert run(tmp_path) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Label map rad-chestct (source: metrics.json): positive where any of a finding's columns is; " in out
    assert "Calcification has the highest probability of Arterial wall calcification, Coronary artery wall" in out
    assert "'Mosaic attenuation pattern' of" in out and "--label-map rad-chestct" in out.partition("Next:")[2]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["per_label"]) == list(COLUMNS) and metrics["n_rows"] == len(truth)
    by_hand = predictions.assign(Calcification=predictions[CALCIFICATIONS].max(axis=1))
    for name in COLUMNS:
        expected = sk.roc_auc_score(truth[name], by_hand[name])
        assert metrics["per_label"][name]["auroc"] == pytest.approx(expected, abs=1e-12), name
    assert metrics["label_map"]["name"] == "rad-chestct" and "16653ef" in metrics["label_map"]["source"]
    assert metrics["label_map"]["findings"]["Calcification"] == {
        "labels": ["calcification[*]*"], "predictions": CALCIFICATIONS}  # fmt: skip
    assert ctclip_evaluation.main(["--apply", str(tmp_path / "out"), "--predictions", str(tmp_path / "p.csv"),
                                   "--label-map", "rad-chestct", "--output-dir", str(tmp_path / "new")]) == 0
    assert {*read_predictions(tmp_path / "new/predictions_calibrated.csv").findings} == {*COLUMNS}


def test_tuning_tables_baseline_and_ensemble_are_mapped_too(tmp_path, capsys):
    predictions, truth = rad_tables(tmp_path)
    rad_tables(tmp_path, patients=60, seed=1, prefix="val", stem="tuning_")
    (1 - predictions).to_csv(tmp_path / "worse.csv")
    tuning = "--tuning-predictions", tmp_path / "tuning_p.csv", "--tuning-labels", tmp_path / "tuning_rad.csv"
    assert run(tmp_path, *tuning, "--baseline", tmp_path / "worse.csv") == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["thresholds"]["n_rows"] == 120 and list(metrics["thresholds"]["per_label"]) == list(COLUMNS)
    assert metrics["baseline"]["scale"] == "uncalibrated"
    (predictions * 0.9).to_csv(tmp_path / "other.csv")
    assert run(tmp_path, "--findings", "Calcification,Emphysema", table=["p.csv", "other.csv"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["per_label"]) == list(metrics["label_map"]["findings"]) == ["Calcification", "Emphysema"]


MINE = {"name_column": "Scan", "findings": {"Mass": {"labels": ["mass_*", "Tumour"], "predictions": ["Emphysema"]}}}


def test_a_map_of_ones_own_and_unknown_labels(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(MINE))
    (tmp_path / "l.csv").write_text("Scan,mass_left,Tumour,other\na,1,,7\nb,0,,7\nc,0,0,7\nd,-1,0,7\n")
    (tmp_path / "p.csv").write_text("VolumeName,Emphysema\na,0.5\nb,0.25\nc,0\nd,1\n")
    label_map = read_label_map(str(tmp_path / "m.json"))
    table = read_labels(tmp_path / "l.csv", None, True, label_map)
    assert table.frame["Mass"].to_dict() == {"a": 1, "b": UNKNOWN, "c": 0, "d": UNKNOWN} and not table.unused
    assert read_predictions(tmp_path / "p.csv", None, label_map).frame["Mass"].tolist() == [0.5, 0.25, 0, 1]
    with pytest.raises(EvaluationError, match="line 5: found -1 for mass_left of d.*--minus-one-is-unknown"):
        read_labels(tmp_path / "l.csv", None, False, label_map)
    with pytest.raises(EvaluationError, match="found no 'Nodule' in the label map .*expected some of Mass"):
        read_labels(tmp_path / "l.csv", ["Nodule"], True, label_map)


@pytest.mark.parametrize("edit, found", [
    (lambda text: text.replace("NoteAcc_DEID", "VolumeName"), "found no column 'NoteAcc_DEID'"),
    (lambda text: text.replace("hernia*", "rupture*"), r"rad.csv: found no column 'hernia\[\*\]\*' for Hiatal hernia"),
])  # fmt: skip
def test_a_table_that_is_not_the_maps_is_refused(edit, found, tmp_path):
    rad_tables(tmp_path, patients=2)
    path = tmp_path / "rad.csv"
    path.write_text(edit(path.read_text()))
    with pytest.raises(EvaluationError, match=found):
        read_labels(path, label_map=read_label_map("rad-chestct"))


@pytest.mark.parametrize("content, found", [
    ("[]", "it names no findings"),
    ('{"findings": {}}', "it names no findings"),
    ('{"finding": {}, "findings": {"Mass": {"labels": ["m"]}}}', "unknown key 'finding'"),
    ('{"name_column": 3, "findings": {"Mass": {"labels": ["m"]}}}', "source or name_column is no text"),
    ('{"findings": {"Mass": ["m"]}}', "'Mass' has not labels"),
    ('{"findings": {"Mass": {"labels": []}}}', "of 'Mass' are no list of names"),
    ('{"findings": {"Mass": {"labels": ["m"], "predictions": "Mass"}}}', "of 'Mass' are no list of names"),
    ('{"findings": {"Scale": {"labels": ["m"]}}}', "'Scale' cannot be a finding"),
    ("{", "found no label map"),
    (None, "found no readable file"),
])  # fmt: skip
def test_what_is_no_label_map_is_refused_in_one_line(content, found, tmp_path):
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CohortError, match="expected rad-chestct or a JSON file like") as caught:
        read_label_map(str(path))
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_the_flag_is_for_tables(tmp_path, capsys):
    assert ctclip_evaluation.main(["--example", "--label-map", "rad-chestct"]) == 2
    assert "--label-map" in capsys.readouterr().err
    rad_tables(tmp_path, patients=2)
    assert run(tmp_path, map_name="rad-chest") == 2
    assert "--label-map rad-chest: found no readable file" in capsys.readouterr().err
