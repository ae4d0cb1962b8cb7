"""Runs of unlike models, a tiny CT-CLIP and a tiny slice backbone, saved as one and used like one. References: `combine`
of the partners' predictions; the evaluation of the fused table; digests taken with hashlib."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_evaluation import sigmoid, simulate
from helpers_training import damage

import ctclip_model
from ctclip.evaluation.run_folder import RunError, run_calibration, run_tuning
from ctclip.evaluation.saved_ensemble import check_partners, labels_of, save_ensemble, saved_ensemble
from ctclip.evaluation.tables import VolumeTable
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel


@pytest.fixture(scope="module")
def trained(phantoms, tiny_classfine, tmp_path_factory):
    """results/ with the runs clip and slices, which have tuning tables and no predictions yet."""
    results = tmp_path_factory.mktemp("ensembles") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctclip_model, "SLICE_INPUT_SHAPE", (24, 64, 64))
        slices = CTCLIPMultiAbnormalityModel(ctclip_path=None, backbone="test_vit", pretrained=False)
        slices.classifier.weight.data.normal_(generator=ctclip_model.torch.Generator().manual_seed(0))
        models = {"clip": CTCLIPMultiAbnormalityModel(tiny_classfine), "slices": slices}
        for seed, (name, model) in enumerate(models.items()):
            model.save_pretrained(results / name)
            tuning, labels = simulate(30, seed=1, split="train")
            if seed:
                noise = np.random.default_rng(8).normal(size=tuning.shape)
                tuning = sigmoid(np.log(tuning / (1 - tuning)) + noise)
            tuning.to_csv(results / name / "tuning_predictions.csv")
            labels.to_csv(results / name / "tuning_labels.csv")
            config = {"epochs": 2, "model": "ctclip" if not seed else "test_vit", "seed": 0}
            record = {"status": "finished", "config": config, "phantom": True, "data_dir": str(phantoms),
                      "working_folder": "/", "labels": list(ABNORMALITIES)}
            (results / name / "run.json").write_text(json.dumps(record))
        yield results


@pytest.fixture
def results(trained, tmp_path, monkeypatch):
    """A copy of `trained`, below the working folder."""
    shutil.copytree(trained, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return Path("results")


def test_what_is_saved_names_partners_and_weights(results):
    weights = {name: [0.25, 0.75] for name in ABNORMALITIES}
    tuning = tuple(VolumeTable(frame) for frame in simulate(10, seed=3, split="train"))
    saved = save_ensemble(results / "both", [results / "clip", results / "slices"], weights, tuning)
    record = json.loads((results / "both" / "run.json").read_text())
    assert [partner["path"] for partner in record["ensemble"]["partners"]] == ["../clip", "../slices"]
    digest = hashlib.sha256((results / "clip" / "model.safetensors").read_bytes()).hexdigest()
    assert record["ensemble"]["partners"][0]["sha256"]["model.safetensors"] == digest
    assert record["config"] == {"epochs": 2, "seed": 0} and record["phantom"] and record["labels"] == [*ABNORMALITIES]
    assert saved.method == "stacked" and saved.names == "clip, slices" and labels_of(saved.folder) == ABNORMALITIES
    assert np.array_equal(saved.weights, np.tile([[0.25], [0.75]], 18))
    assert np.array_equal(run_tuning(results / "both")[0].frame, tuning[0].frame)
    assert run_calibration(results / "both").n_patients == 10
    results.rename("moved")  # paths are relative
    saved_ensemble("moved/both").check_partners()
    assert saved_ensemble("moved/clip") is None is saved_ensemble("nowhere")


def test_a_partner_that_is_gone_or_changed_is_refused(results):
    save_ensemble(results / "both", [results / "clip", results / "slices"])
    ensemble = saved_ensemble(results / "both")
    assert ensemble.weights is None and ensemble.method == "mean"
    damage(results / "clip" / "model.safetensors")
    with pytest.raises(RunError, match=r"clip/model.safetensors: found another file than .*both was saved"):
        ensemble.check_partners()
    shutil.rmtree(results / "clip")
    with pytest.raises(RunError, match=r"clip: found no model.safetensors, expected the run that the ensemble .*both"):
        ensemble.check_partners()


@pytest.mark.parametrize("change", [
    {"partners": [{"path": "../clip"}] * 2}, {"partners": []}, {"weights": {"Emphysema": [0.5, 0.5]}}, {"partners": 3},
    {"weights": dict.fromkeys(ABNORMALITIES, [0.5, 0.6])}, {"weights": dict.fromkeys(ABNORMALITIES, [1.5, -0.5])},
    {"weights": dict.fromkeys(ABNORMALITIES, [1])},
])
def test_a_damaged_ensemble_is_one_line(results, change):
    save_ensemble(results / "both", [results / "clip", results / "slices"])
    path = results / "both" / "run.json"
    record = json.loads(path.read_text())
    record["ensemble"] |= change
    path.write_text(json.dumps(record))
    (results / "both" / "files.jsonl").unlink()
    with pytest.raises(RunError, match="run.json: found no readable ensemble .* expected what --save-ensemble writes"):
        saved_ensemble(results / "both")


def test_runs_that_make_no_ensemble_are_refused(results, tiny_classfine):
    clip, slices, both = (results / name for name in ("clip", "slices", "both"))
    save_ensemble(both, [clip, slices])
    few = CTCLIPMultiAbnormalityModel(tiny_classfine)
    few.reset_classifier(labels=ABNORMALITIES[:3])
    few.save_pretrained("few")
    for partners, message in (
        ([clip], "found 1 run, expected at least two"),
        ([clip, both], "both: found an ensemble, expected a run; name its partners"),
        ([clip, slices, clip], "clip: found this run twice"),
        ([clip, results / "other"], "other: found no model.safetensors, expected a run with a finished epoch"),
        ([clip, Path("few")], "few: found other findings than .*clip has"),
    ):
        with pytest.raises(RunError, match=message):
            check_partners(partners)
    with pytest.raises(RunError, match="clip: found a run, expected no such folder"):
        save_ensemble(clip, [clip, slices])
    Path("mine").mkdir()
    Path("mine/predictions.csv").write_text("mine")
    with pytest.raises(RunError, match="mine: found predictions.csv, which no run or evaluation wrote"):
        save_ensemble("mine", [clip, slices])
