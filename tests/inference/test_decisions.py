"""Decisions of scans: what is called, in which order, with which digits, and how sure the threshold is.

References: numbers worked by hand; the thresholds of a calibration fitted on made-up tuning patients; evaluation of the
written table; Wilson's interval as published (Wilson 1927; 10 of 20: 0.299 to 0.701).
"""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ctclip.data.tables import CALIBRATED, MAPPED, UNCALIBRATED
from ctclip.evaluation.calibration import COUNTS, fit_calibration, load_calibration
from ctclip.evaluation.metrics import compute_metrics
from ctclip.evaluation.tables import load_predictions
from ctclip.inference.decisions import Decision, OperatingPoint, decide, decision_columns, decision_lines, summary
from ctclip.inference.predictions import AnswerForm
from ctclip_model import ABNORMALITIES


@pytest.fixture(scope="module")
def tuned():
    """(labels, probabilities, calibration) of 80 tuning patients; one label of the first is unknown."""
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 18)) < 0.3).astype(np.int8)
    labels[0, 0] = -1
    probabilities = np.clip(0.3 * (labels == 1) + rng.uniform(0.2, 0.6, labels.shape), 0, 1)
    return labels, probabilities, fit_calibration(labels, probabilities, np.arange(80), "platt")


def test_calls_are_those_of_the_thresholds_on_either_scale(tuned):
    _, probabilities, calibration = tuned
    for row in probabilities:
        decisions = decide(ABNORMALITIES, calibration.apply(row[None])[0], calibration)
        assert [each.positive for each in decisions] == (row >= calibration.thresholds).tolist()


def test_heat_maps_decide_as_the_table_does_in_every_form_and_are_never_rescaled(tuned):
    _, probabilities, calibration = tuned
    for row in probabilities[:20]:
        for form in (CALIBRATED, UNCALIBRATED, MAPPED):
            answers = AnswerForm.of(form, calibration)
            table = answers.decide(ABNORMALITIES, answers.transform(row[None])[0])
            shown = answers.decide_shown(ABNORMALITIES, row[None])
            assert [each.word for each in shown] == [each.word for each in table]
            expected = row if form == UNCALIBRATED else calibration.apply(row[None])[0]
            assert [each.probability for each in shown] == expected.tolist()
    assert {each.word for each in AnswerForm.of(CALIBRATED, None).decide_shown("ab", row[None, :2])} == {"not decided"}


def test_the_counts_of_a_threshold_are_those_of_its_tuning_patients(tuned, tmp_path):
    labels, probabilities, calibration = tuned
    for j, point in enumerate(OperatingPoint(*row) for row in calibration.counts.tolist()):
        called = probabilities[:, j] >= calibration.thresholds[j]
        assert point.positives + point.negatives == (79 if j == 0 else 80)
        content = point.content()
        assert content["sensitivity"]["value"] == called[labels[:, j] == 1].mean()
        assert content["specificity"]["value"] == (~called)[labels[:, j] == 0].mean()
    calibration.save(tmp_path / "c.json")
    assert np.array_equal(load_calibration(tmp_path / "c.json").counts, calibration.counts)
    chosen = calibration.select(["Emphysema", "Cardiomegaly"])
    at = [ABNORMALITIES.index(name) for name in chosen.findings]
    assert np.array_equal(chosen.counts, calibration.counts[at])


def test_a_calibration_of_an_earlier_version_has_no_counts_and_still_decides(tuned, tmp_path):
    content = tuned[2].content()
    for row in content["per_label"].values():
        for key in COUNTS:
            del row[key]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = load_calibration(tmp_path / "old.json")
    assert old.counts is None
    (decision,) = decide(["Emphysema"], np.array([0.999]), old)
    assert decision.positive and decision.point is None


def test_wilsons_interval_stands_beside_the_shares():
    content = OperatingPoint(10, 20, 0, 0).content()
    assert content["specificity"] is None and content["sensitivity"]["value"] == 0.5
    assert content["sensitivity"]["interval"] == pytest.approx([0.299, 0.701], abs=1e-3)


@pytest.mark.parametrize(
    ("probability", "threshold", "text", "rounded"),
    [
        (0.81234567, 0.36, "0.81, cut 0.36", 0.8123),
        (0.3598, 0.3602, "0.3598, cut 0.3602", 0.3598),  # two digits would read as a yes
        (0.123449, 0.12344, "0.12, cut 0.12", 0.12345),  # four digits, 0.1234, would be a no
        (0.000123456, 0.5, "0.00, cut 0.50", 0.0001235),
        (0.99998765, 0.5, "1.00, cut 0.50", 0.99998765),
        (0.3, None, "0.30", 0.3),
        (1.0, np.nextafter(1, 2), "1.00, cut above 1", 1.0),
    ],
)
def test_digits_never_contradict_the_call(probability, threshold, text, rounded):
    decision = Decision("Emphysema", probability, threshold)
    assert decision.numbers == text and decision.rounded() == pytest.approx(rounded, abs=1e-12)
    if threshold is not None:
        assert (decision.rounded() >= threshold) == decision.positive


def test_a_summary_begins_with_what_lies_farthest_above_its_cut():
    decisions = [Decision("a", 0.5, 0.4), Decision("b", 0.9, 0.3), Decision("c", 0.1, 0.2)]
    assert summary(decisions) == "b (0.90, cut 0.30), a (0.50, cut 0.40)"
    assert summary(decisions[2:]) == "no finding called" and summary([Decision("a", 0.5, None)]) == ""
    lines = decision_lines({str(i): decisions for i in range(12)}, 10)
    assert len(lines) == 11 and lines[-1] == "  and 2 more in the table"
    lines = decision_lines({str(i): decisions[2:] for i in range(2)}, 10, {"1": "little lung"})
    assert lines == ["  0  no finding called", "  1  no finding called; warning: little lung"]
    point = OperatingPoint(3, 4, 70, 76)
    of_scan = {"scan": [*decisions, Decision("d", 0.19, 0.2, point)]}
    single = decision_lines(of_scan, 10)
    assert decision_lines(of_scan, 10, {"scan": "little lung"}) == [*single, "  warning: little lung"]
    assert [line.split()[:2] for line in single[1:]] == [["b", "yes"], ["a", "yes"], ["d", "no"], ["c", "no"]]
    assert single[3].endswith("yes for 3 of 4 with it, no for 70 of 76 without")


def test_a_table_of_four_digits_evaluates_as_the_whole_numbers_do(tuned, tmp_path):
    labels, probabilities, calibration = tuned
    known, answers = labels[1:], calibration.apply(probabilities)[1:]
    decisions = {f"scan_{i}": decide(ABNORMALITIES, row, calibration) for i, row in enumerate(answers)}
    table = decision_columns(decisions)
    table.rename_axis("VolumeName").to_csv(tmp_path / "p.csv")
    read = load_predictions(tmp_path / "p.csv")
    assert list(read.columns) == list(ABNORMALITIES), "calls and summaries are no findings"
    rounded = read.to_numpy()
    assert len(str(rounded[0, 0])) <= 7 and not np.array_equal(rounded, answers)
    called = answers >= calibration.calibrated_thresholds
    assert np.array_equal(rounded >= calibration.calibrated_thresholds, called)
    assert np.array_equal(table[[f"Call: {name}" for name in ABNORMALITIES]], called)
    whole, less = (compute_metrics(known, values)["auroc_macro"] for values in (answers, rounded))
    assert less == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize(("spread", "count"), [(1e-1, 300), (1e-3, 300), (1e-5, 300), (1e-4, 3000)])
def test_digits_leave_the_order_of_scans_also_where_a_model_hardly_tells_them_apart(spread, count):
    """By sums over all pairs; four digits alone change these by 0.003 to 0.03."""
    rng = np.random.default_rng(1)
    positive = rng.random(count) < 0.2
    values = 0.2 + spread * (rng.normal(size=count) + 0.5 * positive)
    decisions = {str(i): [Decision("Emphysema", float(value), 0.2)] for i, value in enumerate(values)}
    rounded = decision_columns(decisions)["Emphysema"].to_numpy()
    whole, less = (roc_auc_score(positive, each) for each in (values, rounded))
    assert abs(whole - less) < 1e-3 and np.array_equal(rounded >= 0.2, values >= 0.2)
    assert (np.diff(rounded[np.argsort(values)]) >= 0).all() and max(len(str(value)) for value in rounded) < 12


def test_own_findings_of_a_table_are_told_from_their_calls(tmp_path):
    """Also where a call's column holds nothing but 0 and 1, as probabilities may."""
    pd.DataFrame(
        {"VolumeName": ["a", "b"], "Rib fracture": [0.2, 0.7], "Call: Rib fracture": [0, 1], "Summary": ["", "x"]}
    ).to_csv(tmp_path / "p.csv", index=False)
    assert list(load_predictions(tmp_path / "p.csv").columns) == ["Rib fracture"]
