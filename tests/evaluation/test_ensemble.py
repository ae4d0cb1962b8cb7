"""Several predictions evaluated like one: hand-worked means of logits; weights beside scikit-learn's logistic
regression and an objective written out; which members go together; the command line.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_evaluation import sigmoid, simulate
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

import ctclip_evaluation
import run_task2
from ctclip.config import Settings
from ctclip.evaluation import command
from ctclip.evaluation.ensemble import combine, combined_inputs, fit_weights, mean_and_spread, stored_ensemble
from ctclip.evaluation.evaluate import evaluate, evaluate_tables
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import run_calibration
from ctclip.evaluation.tables import EvaluationInputs, VolumeTable, load_predictions
from ctclip_model import ABNORMALITIES, UNKNOWN, CTCLIPMultiAbnormalityModel

SCRIPT = Path(__file__).resolve().parents[2] / "ctclip_evaluation.py"


def simulated(n=400, quality=((1.2, 0.5), (0.6, 1.1)), rates=(0.3, 0.15), seed=0):
    """(labels (N, L), probabilities (K, N, L)): one volume per patient, `quality` (K, L) the classes' distance."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, len(rates))) < rates).astype(np.int8)
    return y, sigmoid(np.array(quality)[:, None] * (y - 0.5) + rng.normal(size=(len(quality), *y.shape)) - 0.5)


def test_the_mean_is_that_of_logits():
    p = np.array([[[0.8]], [[0.2]]])  # logits +-ln 4
    assert combine(p) == pytest.approx(0.5)
    assert combine(p, np.array([[0.75], [0.25]])) == pytest.approx(2 / 3)  # logit ln 2
    assert combine(np.array([[[0.9]], [[0.9]], [[0.5]]])) == pytest.approx(9 ** (2 / 3) / (1 + 9 ** (2 / 3)))


def test_what_rises_in_one_member_rises_also_where_it_is_saturated():
    one = np.array([0, 1e-300, 1e-17, 1e-9, 0.001, 0.3, 0.999, 1 - 1e-9, np.nextafter(1, 0), 1])[:, None]
    for other in (0.0, 0.3, 1.0):
        combined = combine(np.stack([one, np.full_like(one, other)]))[:, 0]
        assert (np.diff(combined) > 0).all() and combined[0] > 0 and combined[-1] < 1
    assert combine(np.array([[[1.0]], [[0.1]], [[0.1]]])) == pytest.approx(sigmoid((8 - 2 * np.log(9)) / 3))


def test_weights_are_those_of_logistic_regression_where_next_to_nothing_holds_them_together():
    y, p = simulated(n=3000)
    weights = fit_weights(y, p, np.arange(len(y)), prior_sd=1e3)
    for j in range(2):
        fitted = LogisticRegression(C=np.inf).fit(np.log(p[..., j] / (1 - p[..., j])).T, y[:, j]).coef_[0]
        assert weights[:, j] == pytest.approx(fitted / fitted.sum(), abs=1e-3)
    assert weights[0, 0] > 0.6 and weights[1, 1] > 0.6 and weights.sum(axis=0) == pytest.approx(1)


def test_weights_minimise_the_log_loss_and_stay_together():
    """One finding, two volumes of each patient: the objective written out, minimised without gradients, twice: around
    equal weights, then around what that gave."""
    y, p = (np.repeat(array, 2, axis=axis) for array, axis in zip(simulated(60, ((1.5,), (0.2,)), (0.3,)), (0, 1),
                                                                   strict=True))
    logits = np.log(p[..., 0] / (1 - p[..., 0]))

    def objective(unknowns, prior):
        q = sigmoid(np.exp(unknowns[:2]) @ logits + unknowns[2])
        loss = -0.5 * np.where(y[:, 0] == 1, np.log(q), np.log(1 - q)).sum()  # half a patient each
        d = unknowns[:2] - prior
        return loss + ((d - d.mean()) ** 2).sum() / 2 + d.mean() ** 2 / 8

    prior = np.log([0.5, 0.5])
    for _ in range(2):
        options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 10_000, "maxfev": 10_000}
        prior = minimize(objective, [*prior, 0], args=(prior,), method="Nelder-Mead", options=options).x[:2]
    expected = np.exp(prior) / np.exp(prior).sum()
    assert fit_weights(y, p, np.arange(120) // 2)[:, 0] == pytest.approx(expected, abs=1e-5)
    free = fit_weights(y, p, np.arange(120) // 2, prior_sd=1e3)[0, 0]
    assert 0.5 < expected[0] < free


def test_a_member_loses_no_weight_for_being_badly_calibrated():
    y, p = simulated(n=2000, quality=((0.9, 0.9), (0.9, 0.9)))
    over = np.stack([p[0], sigmoid(np.log(p[1] / (1 - p[1])) + 2)])  # says positive far too often
    assert fit_weights(y, over, np.arange(2000)) == pytest.approx(fit_weights(y, p, np.arange(2000)), abs=1e-4)
    stretched = np.stack([p[0], sigmoid(np.log(p[1] / (1 - p[1])) * 0.25)])
    weights = fit_weights(y, stretched, np.arange(2000))
    assert weights[1] / weights[0] == pytest.approx(4, rel=0.25)  # the mean of logits would hardly listen to it


def test_a_rare_finding_follows_the_others():
    """Three positives that one member ranks first by chance; a finding with one class; one that nobody has labelled."""
    y, p = simulated(300, np.full((2, 8), 0.9), np.full(8, 0.3))
    y[:, 5:] = 0
    y[:3, 5], p[0, :3, 5], p[1, :3, 5] = 1, 0.97, 0.2
    y[:, 7] = UNKNOWN
    weights, free = (fit_weights(y, p, np.arange(300), prior_sd=sd) for sd in (1.0, 1e3))
    common = weights[0, 6]
    assert weights[0, 7] == common == pytest.approx(0.5, abs=0.08)
    assert common < weights[0, 5] < 0.85 < 0.99 < free[0, 5]
    assert fit_weights(y[:, 6:], p[..., 6:], np.arange(300)).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_unknown_labels_are_left_out():
    y, p = simulated(200)
    y[150:, 0] = UNKNOWN
    alone = fit_weights(y[:150, :1], p[:, :150, :1], np.arange(150))
    assert fit_weights(y[:, :1], p[..., :1], np.arange(200)) == pytest.approx(alone, abs=1e-5)


def test_mean_and_spread():
    assert mean_and_spread([0.7, 0.8, 0.9]) == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1)}
    assert mean_and_spread([0.7, None]) == {"mean": None, "sd": None}


def noisy(predictions, seed, sd=0.8):
    """Another model's predictions of the same volumes: one error for all of a patient's volumes."""
    errors = np.repeat(np.random.default_rng(seed).normal(size=(len(predictions) // 2, 18)), 2, axis=0)
    return sigmoid(np.log(predictions / (1 - predictions)) + sd * errors)


def member(name, predictions, labels, tuning=None):
    """`tuning`: (predictions, labels)."""
    def table(frame, what):
        return VolumeTable(frame, f"{name}/{what}.csv")

    both = tuning and (table(tuning[0], "tuning_predictions"), table(tuning[1], "tuning_labels"))
    return EvaluationInputs(table(predictions, "predictions"), table(labels, "labels"), both)


@pytest.fixture(scope="module")
def cohort():
    """((predictions, labels) of 30 reported, and of 24 tuning patients), two volumes of each."""
    return simulate(30, seed=0), simulate(24, seed=1, first=500, split="train")


def two(cohort, *tuning):
    """Two members; `tuning` gives each its (predictions, labels), by default the whole cohort's."""
    (predictions, labels), (fitted, truth) = cohort
    own = tuning or ((fitted, truth), (noisy(fitted, 9, 2.0), truth))
    return [member("A", predictions, labels, own[0]), member("B", noisy(predictions, 8, 2.0), labels, own[1])]


def test_findings_and_volumes_are_joined_by_name(cohort):
    (predictions, labels), _ = cohort
    other = noisy(predictions, 3)
    expected = combine(np.stack([predictions.to_numpy(), other.to_numpy()]))
    shuffled = other.sample(frac=1, random_state=0)[list(ABNORMALITIES[::-1])]
    shuffled.index = [name.removesuffix(".nii.gz").upper() for name in shuffled.index]
    inputs = combined_inputs([member("A", predictions, labels), member("B", shuffled, labels)], "mean")
    assert np.array_equal(inputs.predictions.frame.to_numpy(), expected)
    assert inputs.predictions.frame.index.equals(predictions.index) and inputs.predictions.findings == ABNORMALITIES
    assert inputs.tuning is None and inputs.ensemble["weights"] is None
    assert inputs.ensemble["sources"] == ["A/predictions.csv", "B/predictions.csv"]


def test_volumes_that_one_lacks_are_refused_or_skipped_and_counted(cohort):
    (predictions, labels), _ = cohort
    members = [member("A", predictions, labels), member("B", predictions.iloc[4:], labels)]
    with pytest.raises(EvaluationError, match="B/predictions.csv: found no row for 4 of the 60 .* --allow-partial"):
        combined_inputs(members, "mean")
    inputs = combined_inputs(members, "mean", allow_partial=True)
    assert len(inputs.predictions.frame) == 56 and inputs.ensemble["left_out"] == {"A/predictions.csv": 4}


def test_weights_thresholds_and_calibration_come_from_tuning_patients(cohort):
    """The ensemble's metrics are those of its table evaluated alone, a member's those of its own."""
    members, settings = two(cohort), Settings(resamples=100)
    inputs = combined_inputs(members, "stacked", of_runs=True)
    truth, p = cohort[1][1].to_numpy(), np.stack([each.tuning[0].frame.to_numpy() for each in members])
    weights = fit_weights(truth, p, np.arange(48) // 2)
    assert np.array_equal(list(inputs.ensemble["weights"].values()), weights.T) and (weights[0] > 0.5).all()
    assert np.array_equal(inputs.tuning[0].frame.to_numpy(), combine(p, weights))
    metrics = evaluate_tables(inputs, settings).metrics
    tables = inputs.predictions.frame, inputs.labels.frame, (inputs.tuning[0].frame, inputs.tuning[1].frame)
    alone = evaluate(*tables, resamples=100)
    assert {key: value for key, value in metrics.items() if key != "ensemble"} == alone
    for found, each in zip(metrics["ensemble"]["members"], members, strict=True):
        expected = evaluate_tables(each, settings).metrics
        assert found == {"n_volumes": 60, "n_patients": 30, "auroc_macro": expected["at_0.5"]["auroc_macro"],
                         **{key: expected["tuned"][key] for key in ("f1_macro", "positive_rate", "crg")}}
    scores = [found["auroc_macro"] for found in metrics["ensemble"]["members"]]
    assert metrics["ensemble"]["auroc_macro"] == mean_and_spread(scores)
    assert metrics["ensemble"]["tuning_patients"] == 24 and metrics["ensemble"]["tuning_patients_of_some"] == 0


def test_other_findings_and_unknown_labels(cohort):
    """Two findings that the labels name, one of them not one of the 18; a fifth of their cells unknown."""
    names = {ABNORMALITIES[4]: ABNORMALITIES[4], ABNORMALITIES[2]: "Nodule above 8 mm"}
    tables = [(p.rename(columns=names), y.rename(columns=names)[list(names.values())]) for p, y in cohort]
    for _, labels in tables:
        labels[:] = np.where(np.random.default_rng(0).random(labels.shape) < 0.2, UNKNOWN, labels)
    inputs = combined_inputs(two(tables), "stacked")
    assert inputs.predictions.findings == tuple(inputs.ensemble["weights"]) == tuple(names.values())
    p = np.stack([each.tuning[0].frame[list(names.values())].to_numpy() for each in two(tables)])
    weights = fit_weights(tables[1][1].to_numpy(), p, np.arange(48) // 2)
    assert np.array_equal(list(inputs.ensemble["weights"].values()), weights.T)
    metrics = evaluate_tables(inputs, Settings(resamples=100)).metrics
    assert list(metrics["per_label"]) == list(names.values()) and metrics["unknown_labels"]["decisions"] > 0
    alone = evaluate(tables[0][0][list(names.values())], tables[0][1], resamples=100)
    assert metrics["ensemble"]["members"][0]["auroc_macro"] == alone["at_0.5"]["auroc_macro"]


def test_runs_with_other_tuning_patients_share_those_of_all(cohort):
    """12 and 18 of 24, of whom 6 are the same: weights are fitted on these, thresholds cross-fitted, which is said."""
    fitted, truth = cohort[1]
    members = two(cohort, (fitted[:24], truth[:24]), (fitted[12:], truth[12:]))
    inputs = combined_inputs(members, "stacked", of_runs=True)
    same = fit_weights(truth[12:24].to_numpy(), np.stack([fitted[12:24]] * 2), np.arange(12) // 2)
    assert np.array_equal(list(inputs.ensemble["weights"].values()), same.T) and inputs.tuning is None
    evaluation = evaluate_tables(inputs, Settings(resamples=100))
    assert evaluation.metrics["thresholds"]["fitted_on"] == "cross-fitted by patient"
    said = " ".join(repr(evaluation).split())
    assert "fitted on 6 tuning patients; 18 patients are tuning patients of some only" in said
    apart = two(cohort, (fitted[:24], truth[:24]), (fitted[24:], truth[24:]))
    assert combined_inputs(apart, "mean", of_runs=True).tuning is None
    with pytest.raises(EvaluationError, match="--ensemble stacked without patients who are tuning patients of all"):
        combined_inputs(apart, "stacked", of_runs=True)
    without = [apart[0], replace(apart[1], tuning=None)]
    assert combined_inputs(without, "mean", of_runs=True).ensemble["tuning_patients_of_some"] == 12


def test_members_that_do_not_go_together_are_refused(cohort):
    (predictions, labels), (fitted, truth) = cohort
    one = member("A", predictions, labels)
    wrong = labels.copy()
    wrong.iloc[5, 3] = 1 - wrong.iloc[5, 3]
    seen = (predictions[:20], labels[:20])
    for other, message in (
        (member("A", predictions, labels), "A/predictions.csv twice, expected predictions of different models"),
        (member("B", fitted, truth), "no volume that all of them predict, .* --ensemble pooled"),
        (member("B", predictions, wrong), "B/labels.csv: found other labels than in A/labels.csv for 1 of 60 volumes, "
                                          "first valid_3_a_2.nii.gz"),
        (member("B", predictions, labels[list(ABNORMALITIES[:5])]), "B/labels.csv: found other findings than in A/"),
        (member("B", predictions.drop(columns="Emphysema"), labels), "B/predictions.csv: found no column 'Emphysema'"),
        (member("B", predictions, labels, seen), "B/tuning_predictions.csv: found 10 tuning patients among"),
    ):
        with pytest.raises(EvaluationError, match=message):
            combined_inputs([one, other], "mean", of_runs=True)


def test_folds_are_put_together_and_evaluated_once(cohort):
    predictions, labels = cohort[0]
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    folds = [member(f"fold{k}", predictions[part], labels[part], (predictions[:10], labels[:10]))
             for k, part in enumerate(parts)]
    inputs = combined_inputs(folds, "pooled", of_runs=True)
    pd.testing.assert_frame_equal(inputs.predictions.frame, predictions)
    metrics = evaluate_tables(inputs, Settings(resamples=100)).metrics
    alone = evaluate(predictions, labels, resamples=100)
    assert {key: value for key, value in metrics.items() if key != "ensemble"} == alone
    last, expected = metrics["ensemble"]["members"][-1], evaluate(predictions[40:], labels[40:], resamples=100)
    assert last["n_patients"] == 10 and last["auroc_macro"] == expected["at_0.5"]["auroc_macro"]
    assert last["f1_macro"] == expected["tuned"]["f1_macro"]
    one_table = [replace(fold, labels=VolumeTable(labels, "labels.csv")) for fold in folds]
    assert evaluate_tables(combined_inputs(one_table, "pooled"), Settings(resamples=100)).metrics == metrics
    twice = [folds[0], member("other", predictions[19:40], labels[19:40])]
    with pytest.raises(EvaluationError, match="other/predictions.csv: found patient valid_10, whom fold0/"):
        combined_inputs(twice, "pooled")


@pytest.fixture
def tables(cohort, tmp_path, monkeypatch):
    """a.csv, b.csv, l.csv, the same of tuning patients after a "t", and runs A and B of them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for prefix, (predictions, labels) in zip(("", "t"), cohort, strict=True):
        labels.to_csv(f"{prefix}l.csv")
        for name, frame in (("a", predictions), ("b", noisy(predictions, 8, 2.0))):
            frame.to_csv(f"{prefix}{name}.csv")
            run = Path(name.upper())
            run.mkdir(exist_ok=True)
            frame.to_csv(run / f"{'tuning_' if prefix else ''}predictions.csv")
            labels.to_csv(run / f"{'tuning_' if prefix else ''}labels.csv")
            (run / "run.json").write_text(json.dumps({"config": {}, "phantom": True}))
    return tmp_path


TUNING = ["--tuning-predictions", "ta.csv", "tb.csv", "--tuning-labels", "tl.csv"]


def test_script_on_several_tables(tables, capsys):
    """Stacked, reported and applied to new predictions, in processes of their own."""
    argv = ["--predictions", "a.csv", "b.csv", "--labels", "l.csv", *TUNING, "--ensemble", "stacked",
            "--resamples", "100"]
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = Path("results/ensemble_stacked")
    assert "ENSEMBLE                mean of the logits of 2 predictions of the same volumes, weighted" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"--apply {folder} --predictions NEW1.csv NEW2.csv")
    report, page = ((folder / name).read_text() for name in ("report.txt", "report.html"))
    assert "SEVERAL PREDICTIONS" in report and "1 a.csv" in report and "Standard deviation (n - 1)" in report
    assert '<section id="ensemble">' in page
    metrics = json.loads((folder / "metrics.json").read_text())
    sources, weights = stored_ensemble(folder / "metrics.json", ABNORMALITIES)
    assert sources == metrics["ensemble"]["sources"] == ["a.csv", "b.csv"] and weights.shape == (2, 18)
    combined = combine(np.stack([load_predictions(f"{name}.csv").to_numpy() for name in "ab"]), weights)
    assert np.allclose(load_predictions(folder / "predictions.csv").to_numpy(), combined, rtol=1e-12)

    applied = ["--apply", str(folder), "--predictions", "a.csv", "b.csv", "--output-dir", "new"]
    assert ctclip_evaluation.main(applied) == 0
    for name in ("predictions_calibrated.csv", "predictions_mapped.csv"):
        assert np.array_equal(load_predictions(f"new/{name}"), load_predictions(folder / name))
    load_predictions("b.csv").iloc[1:].to_csv("b.csv")
    assert ctclip_evaluation.main(applied) == 2
    assert "b.csv: found other volumes than in a.csv" in capsys.readouterr().err


@pytest.mark.parametrize("main", [ctclip_evaluation.main, lambda argv: run_task2.main(["--mode", "evaluate", *argv])])
def test_several_runs_from_either_script(main, tables, monkeypatch, capsys):
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    before = {path: path.read_bytes() for name in "AB" for path in Path(name).iterdir()}
    assert main(["--checkpoint", "A", "B", "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "mean of the logits of 2 predictions" in printed and "Synthetic data" in printed
    metrics = json.loads(Path("results/ensemble_mean/metrics.json").read_text())
    assert metrics["ensemble"]["sources"] == ["A/predictions.csv", "B/predictions.csv"] and metrics["phantom"]
    assert metrics["thresholds"]["fitted_on"] == "tuning patients" and metrics["thresholds"]["n_patients"] == 24
    assert {path: path.read_bytes() for name in "AB" for path in Path(name).iterdir()} == before


def test_predictions_that_runs_lack_are_made(tables, phantoms, tiny_classfine, monkeypatch, capsys):
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    for run in ("C", "D"):
        model.save_pretrained(run)
        Path(run, "run.json").write_text(json.dumps({"phantom": True, "data_dir": str(phantoms)}))
    assert ctclip_evaluation.main(["--checkpoint", "C", "nowhere"]) == 2  # before any work
    assert "nowhere: found no such folder" in capsys.readouterr().err and not Path("C/predictions.csv").exists()
    assert ctclip_evaluation.main(["--checkpoint", "C", "D", "--resamples", "100", "--workers", "0"]) == 0
    alone = load_predictions("C/predictions.csv")
    assert len(alone) == 16 and Path("D/labels.csv").is_file()
    inside = alone.gt(0.001) & alone.lt(0.999)
    assert inside.to_numpy().any()
    assert np.allclose(load_predictions("results/ensemble_mean/predictions.csv")[inside], alone[inside], equal_nan=True)


PAIR = ["--predictions", "a.csv", "b.csv", "--labels", "l.csv"]


@pytest.mark.parametrize("argv, message", [
    ([*PAIR, "--ensemble", "stacked"], "found --ensemble stacked without patients who are tuning patients of all"),
    ([*PAIR, "--ensemble", "pooled"], "b.csv: found patient valid_1, whom a.csv predicts too"),
    ([*PAIR, *TUNING, "--ensemble", "pooled"], "found --tuning-predictions with --ensemble pooled"),
    ([*PAIR, "--tuning-predictions", "ta.csv", "--tuning-labels", "tl.csv"], "found 1 --tuning-predictions for 2"),
    ([*PAIR, "--output-dir", "A"], "A: found a run, whose tables"),
    (["--predictions", "a.csv", "./a.csv", "--labels", "l.csv"], "a.csv twice"),
    (["--predictions", "a.csv", "ta.csv", "--labels", "l.csv"], "found no volume that all of them predict"),
    (["--predictions", "a.csv", "--labels", "l.csv", "--ensemble", "mean"], "found --ensemble mean with one source"),
    (["--example", "--ensemble", "mean"], "found --ensemble mean with one source"),
    (["--checkpoint", "A", "--ensemble", "stacked"], "found --ensemble stacked with one source"),
    (["--checkpoint", "A", "B", "--output-dir", "A"], "A: found a run, whose tables"),
    (["--checkpoint", "A", "B", "--ensemble", "pooled"], "B/predictions.csv: found patient valid_1, whom A/"),
    (["--checkpoint", "A", "B", "--save-ensemble", "./A"], "A: found a run, expected no such folder"),
    (["--checkpoint", "A", "B", "--save-ensemble", "AB"], "A: found no model.safetensors, expected a run with a"),
    (["--checkpoint", "A", "B", "--save-ensemble", "AB", "--output-dir", "o"], "found --output-dir with --save-"),
    (["--checkpoint", "A", "B", "--save-ensemble", "AB", "--ensemble", "pooled"], "found --ensemble pooled with"),
    (["--apply", "A", "--predictions", "a.csv", "b.csv"], "found 2 tables of predictions, expected one, as A was"),
])
def test_wrong_usage_is_one_line_and_exit_code_2(argv, message, tables, capsys):
    run_calibration(Path("A")).save("A/calibration.json")
    assert ctclip_evaluation.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and "expected" in err


@pytest.mark.parametrize("argv, message", [
    (["--ensemble", "mean"], "found --ensemble mean with one source"),
    (["--mode", "predict", "--checkpoint", "A", "B", "--input", "x.nii.gz"], "A: found no model.safetensors, expected"),
    (["--mode", "predict", "--checkpoint", "A", "B", "--input", "x", "--explain", "all"], "--explain with 2 runs"),
    (["--mode", "predict", "--checkpoint", "A", "B", "--input", "x", "--ensemble", "pooled"], "--ensemble pooled"),
    (["--save-ensemble", "AB"], "found --save-ensemble with one source"),
    (["--mode", "evaluate", "--checkpoint", "A", "B", "--save-ensemble", "AB", "--data-dir", "D"],
     "found --data-dir with --save-ensemble"),
    (["--export", "onnx", "--checkpoint", "A", "B"], "found 2 runs after --checkpoint"),
])
def test_the_task_refuses_several_runs_where_it_needs_one(argv, message, tables, capsys):
    assert run_task2.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_damaged_ensemble_is_not_applied(tmp_path):
    path = tmp_path / "metrics.json"
    assert stored_ensemble(path, ABNORMALITIES) == ([], None)
    for content in ("[]", '{"ensemble": {"method": "mean"}}',
                    '{"ensemble": {"method": "stacked", "sources": ["a", "b"], "weights": {"Emphysema": [0.5, 0.6]}}}'):
        path.write_text(content)
        with pytest.raises(EvaluationError, match="metrics.json: found no readable ensemble"):
            stored_ensemble(path, ["Emphysema"])
    path.write_text('{"ensemble": {"method": "pooled"}}')
    assert stored_ensemble(path, ["Emphysema"]) == ([], None)
