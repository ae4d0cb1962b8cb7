"""Runs of unlike models, a tiny CT-CLIP and a tiny slice backbone, saved as one and used like one. References:
`combine` of the partners' predictions; the evaluation of the fused table; digests taken with hashlib."""

import hashlib
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import affine_of, chest
from helpers_evaluation import sigmoid, simulate
from helpers_maps import page_blocks
from helpers_scans import write_mha
from helpers_training import damage, one_line

import ctclip_evaluation
import ctclip_model
import ctclip_training
import run_task2
from ctclip.data.cohort import Volume
from ctclip.evaluation import command
from ctclip.evaluation.calibration import load_calibration
from ctclip.evaluation.ensemble import combine
from ctclip.evaluation.run_folder import RunError, run_calibration, run_tuning
from ctclip.evaluation.saved_ensemble import check_partners, labels_of, save_ensemble, saved_ensemble
from ctclip.evaluation.tables import VolumeTable, load_predictions
from ctclip.hub import __main__ as hub
from ctclip.inference.fusion import FusedModels
from ctclip.inference.predictions import predict
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(phantoms, tiny_classfine, tmp_path_factory):
    """results/ with the runs clip and slices, which have tuning tables and no predictions yet."""
    results = tmp_path_factory.mktemp("ensembles") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctclip_model, "SLICE_INPUT_SHAPE", (24, 64, 64))
        torch.manual_seed(0)  # with some backbones nearly every decision is negative
        slices = CTCLIPMultiAbnormalityModel(ctclip_path=None, backbone="test_vit", pretrained=False)
        slices.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))
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
    assert saved.description == "weighted mean of clip, slices" and labels_of(saved.folder) == ABNORMALITIES
    assert np.array_equal(saved.weights, np.tile([[0.25], [0.75]], 18))
    assert np.array_equal(run_tuning(results / "both")[0].frame, tuning[0].frame)
    assert run_calibration(results / "both").n_patients == 10
    results.rename("moved")  # paths are relative
    saved_ensemble("moved/both").check_partners()
    assert saved_ensemble("moved/clip") is None is saved_ensemble("nowhere")


def test_a_partner_that_is_gone_or_changed_is_refused(results):
    save_ensemble(results / "both", [results / "clip", results / "slices"])
    ensemble = saved_ensemble(results / "both")
    assert ensemble.weights is None and ensemble.description == "mean of clip, slices"
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


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of `trained` whose runs are saved as results/both, weighted, from the command line; the working folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained, folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(command, "write_pictures", lambda *args: None)
        argv = ["--checkpoint", "results/clip", "results/slices", "--ensemble", "stacked", "--save-ensemble", "both"]
        assert ctclip_evaluation.main([*argv, "--resamples", "100", "--results-json", "results.json"]) == 0
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of two."""
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(2):
        write_mha(folder / f"amos_{seed}.mha", chest(seed=seed), affine_of((7.5, 7.9, 12.25)))
    return folder


def answers(path) -> np.ndarray:
    """(N, 18) of a results.json, in the order of names."""
    rows = {row["input_image_name"]: row["probabilities"] for row in json.loads(Path(path).read_text())["predictions"]}
    return np.array([list(rows[name].values()) for name in sorted(rows)])


def test_what_was_evaluated_is_what_is_saved(evaluated, monkeypatch):
    monkeypatch.chdir(evaluated)
    both, members = saved_ensemble("results/both"), [load_predictions(f"results/{name}/predictions.csv") for name in
                                                     ("clip", "slices")]
    metrics = json.loads(Path("results/both/metrics.json").read_text())
    assert metrics["ensemble"]["weights"] == dict(zip(ABNORMALITIES, both.weights.T.tolist(), strict=True))
    assert both.weights.std(axis=1).min() > 0.01 and metrics["thresholds"]["fitted_on"] == "tuning patients"
    fused = load_predictions("results/both/predictions.csv")
    expected = combine(np.stack([member.to_numpy() for member in members]), both.weights)
    np.testing.assert_allclose(fused, expected, rtol=1e-12)
    stored, calibration = load_calibration("results/both/calibration.json"), run_calibration(Path("results/both"))
    assert np.array_equal(stored.thresholds, calibration.thresholds) and stored.n_patients == 30
    decided = {name: row["threshold"] for name, row in metrics["per_label"].items()}
    decisions = fused[list(ABNORMALITIES)].loc[sorted(fused.index)].to_numpy() >= list(decided.values())
    assert np.array_equal(answers("results.json") >= 0.5, decisions) and 0.05 < decisions.mean() < 0.95


def test_it_is_evaluated_alone_as_a_baseline_and_applied(evaluated, monkeypatch, capsys):
    """The fused table gives what the evaluation of both gave; it is applied to its own table and to the partners'."""
    monkeypatch.chdir(evaluated)
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    together = json.loads(Path("results/both/metrics.json").read_text())
    alone = ["--checkpoint", "results/both", "--resamples", "100", "--results-json", "alone.json"]
    assert ctclip_evaluation.main(alone) == 0
    assert np.array_equal(answers("alone.json"), answers("results.json"))
    again = json.loads(Path("results/both/metrics.json").read_text())
    assert again["tuned"] == together["tuned"] and again["calibrated"] == together["calibrated"]
    assert command.read_baseline("results/both").frame.equals(load_predictions("results/both/predictions.csv"))
    for name, given in (("own", ["results/both"]), ("theirs", ["results/clip", "results/slices"])):
        named = [f"{run}/predictions.csv" for run in given]
        assert ctclip_evaluation.main(["--apply", "results/both", "--predictions", *named, "--output-dir", name]) == 0
    mapped = [load_predictions(f"{name}/predictions_mapped.csv") for name in ("own", "theirs", "results/both")]
    np.testing.assert_allclose(mapped[0].iloc[:, :18], mapped[1].iloc[:, :18], rtol=1e-12)
    assert mapped[0].equals(mapped[2])
    capsys.readouterr()
    assert run_task2.main(["--mode", "runs"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("both")]
    assert "weighted mean of clip, slices" in row


def test_scans_are_answered_as_the_partners_answers_fused(evaluated, scans, monkeypatch, capsys):
    """Uncalibrated, and mapped, by the saved ensemble and by the same runs named each."""
    monkeypatch.chdir(evaluated)
    given = {name: predict(scans, f"results/{name}", form="uncalibrated") for name in ("clip", "slices", "both")}
    weights = saved_ensemble("results/both").weights
    expected = combine(np.stack([given["clip"].to_numpy(), given["slices"].to_numpy()]), weights)
    np.testing.assert_allclose(given["both"], expected, rtol=1e-6)
    assert np.abs(given["clip"] - given["both"]).to_numpy().max() > 0.01
    mapped = run_calibration(Path("results/both")).rescale_to_half(expected)
    for named, flags in (("results/both", []), ("results/clip results/slices", ["--ensemble", "stacked"])):
        argv = ["--mode", "predict", "--checkpoint", *named.split(), *flags, "--input", str(scans), "--map-thresholds"]
        assert run_task2.main([*argv, "--output", "mapped.csv"]) == 0
        assert f"2 scans, model {named}; not probabilities" in capsys.readouterr().out
        np.testing.assert_allclose(load_predictions("mapped.csv")[list(ABNORMALITIES)], mapped, rtol=1e-6)


def test_the_page_of_an_ensemble_has_its_scans_without_evidence(evaluated, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(evaluated)
    page = tmp_path / "both.html"
    argv = ["--mode", "predict", "--checkpoint", "results/both", "--input", str(scans), "--output", str(page)]
    assert run_task2.main(argv) == 0
    blocks, table = page_blocks(page), load_predictions(page.with_suffix(".csv"))
    assert [block["name"] for block in blocks] == list(table.index) and len(table) == 2
    for block, row in zip(blocks, table[list(ABNORMALITIES)].to_numpy(), strict=True):
        assert block["maps"] is None and len(block["images"]) == block["shape"][0] > 10
        np.testing.assert_allclose([finding["probability"] for finding in block["findings"]], row, atol=1e-4)


def test_the_container_answers_with_a_gathered_ensemble(evaluated, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(evaluated)
    gather = runpy.run_path(str(ROOT / "docker" / "gather.py"))["main"]
    assert gather(["results/both"]) == 0 and gather(["results/clip"]) == 2
    assert "found no ensemble, expected one of --save-ensemble" in capsys.readouterr().err
    container = Path("results/both/container").rename(tmp_path / "model")
    files = {str(path.relative_to(container)) for path in container.rglob("*") if path.is_file()}
    assert files == {"run.json", "calibration.json", "files.jsonl", "partner_1/config.json", "partner_2/config.json",
                     "partner_1/model.safetensors", "partner_2/model.safetensors"}
    assert "train_" not in (container / "run.json").read_text()
    expected = tmp_path / "expected.json"
    argv = ["--mode", "predict", "--checkpoint", "results/both", "--input", str(scans), "--map-thresholds"]
    assert run_task2.main([*argv, "--output", str(expected)]) == 0
    for name, place in (("INPUT", scans), ("MODEL", container), ("OUTPUT", tmp_path)):
        monkeypatch.setenv(f"CTCLIP_{name}", str(place))
    assert runpy.run_path(str(ROOT / "docker" / "entrypoint.py"))["main"]() == 0
    assert np.array_equal(answers(tmp_path / "results.json"), answers(expected))
    damage(container / "partner_2" / "model.safetensors")
    capsys.readouterr()
    assert runpy.run_path(str(ROOT / "docker" / "entrypoint.py"))["main"]() == 2
    assert "partner_2/model.safetensors: found another file" in (err := capsys.readouterr().err) and one_line(err)


@pytest.mark.parametrize("main, argv, message", [
    (run_task2.main, ["--mode", "predict", "--input", "scans", "--explain", "all"], "found --explain with an ensemble"),
    (run_task2.main, ["--export", "onnx"], "both: found an ensemble of clip, slices, expected one run"),
    (ctclip_evaluation.main, ["results/clip"], "both: found an ensemble, expected a run; name its partners"),
])
def test_what_needs_one_model_refuses_an_ensemble(main, argv, message, evaluated, scans, monkeypatch, capsys):
    monkeypatch.chdir(evaluated)
    several = argv[0] == "results/clip"
    checkpoint = ["--checkpoint", "results/both", *(["results/clip", "--save-ensemble", "x"] if several else argv)]
    if "scans" in argv:
        checkpoint[checkpoint.index("scans")] = str(scans)
    assert main(checkpoint) == 2
    assert message in (err := capsys.readouterr().err) and one_line(err)


def test_training_and_the_card_refuse_it(evaluated, monkeypatch, capsys):
    monkeypatch.chdir(evaluated)
    assert ctclip_training.main(["--resume", "results/both"]) == 2
    assert "results/both: found an ensemble of clip, slices, expected a run" in capsys.readouterr().err
    assert hub.main(["card", "results/both"]) == 2
    assert "both: found an ensemble of clip, slices, expected one run" in capsys.readouterr().err


def test_partners_of_one_shape_and_one_encoder_share_reading_and_encoding(tiny_classfine, scans, monkeypatch):
    """Folds: three heads on one frozen encoder, which sees each volume once; answers as those of each alone."""
    models = []
    for seed in range(3):
        model = CTCLIPMultiAbnormalityModel(tiny_classfine).eval()
        model.classifier.weight.data.normal_(std=5, generator=torch.Generator().manual_seed(seed))
        models.append(model)
    volumes = [Volume(scan.name, scan, np.zeros(18, np.float32)) for scan in sorted(scans.iterdir())]
    alone = np.stack([FusedModels((model,), ABNORMALITIES).predict(volumes)[1] for model in models])
    encoded, code_ids = [], CTCLIPMultiAbnormalityModel.code_ids
    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "code_ids",
                        lambda self, x: encoded.append(len(x)) or code_ids(self, x))
    told = []
    read, together = FusedModels(tuple(models), ABNORMALITIES).predict(
        volumes, on_answer=lambda index, row, *_: told.append(index)
    )
    assert read == sorted(told) == [0, 1] and sum(encoded) == 2
    np.testing.assert_allclose(together, combine(alone), rtol=1e-4)
    assert (np.abs(alone[0] - together) > 0.01).any()
