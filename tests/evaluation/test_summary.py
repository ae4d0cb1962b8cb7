"""The summary printed after an evaluation: its numbers are those of metrics.json, its length and its notices."""

import json
from html import unescape

import pytest
from helpers_evaluation import simulate

from ctclip.config import SYNTHETIC_NOTE
from ctclip.evaluation.evaluate import Settings, evaluate, evaluate_tables
from ctclip.evaluation.summary import LINE_WIDTH, format_summary
from ctclip.evaluation.tables import EvaluationInputs, as_table
from ctclip_model import ABNORMALITIES

MOST_LINES = 17  # beside the report's place, the time and what to do next: 20


def rows(text):
    """{name at the start of a line: the rest}, continued lines joined."""
    name, found = "", {}
    for line in text.splitlines():
        name = line[:24].strip() or name
        found[name] = f"{found.get(name, '')} {line[24:].strip()}".strip()
    return found


@pytest.fixture(scope="module")
def metrics():
    predictions, labels = simulate(60, seed=0, shift=1.0)
    return evaluate(predictions, labels, simulate(50, seed=1, shift=1.0, split="train"), simulate(60, seed=2)[0],
                    phantom=True, resamples=100)


def test_every_number_of_the_summary_is_that_of_metrics_json(metrics):
    text = format_summary(metrics)
    found = rows(text)
    half, tuned, thresholds = metrics["at_0.5"], metrics["tuned"], metrics["thresholds"]
    rates = [f"{100 * value:.1f} %" for value in (half["positive_rate"], tuned["positive_rate"], half["label_rate"])]
    assert found["Positive rate"] == f"{rates[0]} -> {rates[1]}   (labels: {rates[2]})"
    assert f"at or above 0.5: {rates[0]} (truly positive: {rates[2]})" in found["PREDICTION ANALYSIS"]
    assert found["PREDICTION ANALYSIS"].startswith("120 volumes of 60 patients; range [")
    assert found["Hamming accuracy"] == (f"{half['hamming_accuracy']:.3f} -> {tuned['hamming_accuracy']:.3f}   "
                                         f"(saying no to everything: {1 - half['label_rate']:.3f})")
    assert found["F1 macro"] == f"{half['f1_macro']:.3f} -> {tuned['f1_macro']:.3f}"
    low, high = metrics["intervals"]["at_0.5"]["auroc_macro"]
    assert found["AUROC macro"] == f"{half['auroc_macro']:.3f} ({low:.3f} to {high:.3f}); needs no threshold"
    before, after = (metrics["calibration"][when] for when in ("before", "after"))
    assert found["Calibration error"].startswith(f"{before['ece']:.3f} -> {after['ece']:.3f} ")
    assert f"Brier score {before['brier']:.3f} -> {after['brier']:.3f}" in found["Calibration error"]
    low, high = (pick(thresholds["per_label"].values()) for pick in (min, max))
    assert found["OPTIMAL THRESHOLD"] == (f"{thresholds['global']:.2f} for all findings together; {low:.2f} "
                                          f"to {high:.2f} one by one (fitted on 50 other patients)")
    assert text == format_summary(json.loads(json.dumps(metrics)))


def test_the_findings_named_are_those_with_the_highest_and_the_lowest_auroc(metrics):
    found, auroc = rows(format_summary(metrics)), {name: row["auroc"] for name, row in metrics["per_label"].items()}
    order = sorted(ABNORMALITIES, key=auroc.__getitem__)
    for title, names in (("Highest AUROC", order[: -4 : -1]), ("Lowest AUROC", order[:3])):
        assert found[title] == ", ".join(f"{name} {auroc[name]:.3f}" for name in names)


def test_criteria_that_are_not_met_are_named(metrics):
    missed = [row for row in metrics["success_criteria"] if not row["passed"]]
    said = rows(format_summary(metrics))["CRITERIA"]
    assert missed and said.startswith(f"{6 - len(missed)} of 6 met; not met: ")
    assert said.endswith("; ".join(row["criterion"] for row in missed))
    passed = [row | {"passed": True} for row in metrics["success_criteria"]]
    assert rows(format_summary(metrics | {"success_criteria": passed}))["CRITERIA"].startswith("6 of 6 met")


def test_the_summary_is_short_and_carries_the_notice(metrics):
    lines = format_summary(metrics).splitlines()
    assert lines[-1] == SYNTHETIC_NOTE and len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= LINE_WIDTH


def test_a_notebook_shows_what_evaluate_returns_as_its_summary():
    predictions, labels = simulate(12, seed=0)
    found = evaluate(predictions, labels, resamples=100)
    assert unescape(found._repr_html_()) == f"<pre>{format_summary(found)}</pre>"
    assert json.loads(json.dumps(found)) == dict(found)


def test_the_baseline_takes_two_lines(metrics):
    said = rows(format_summary(metrics))["BASELINE"]
    base, found = metrics["baseline"], metrics["baseline"]["differences"]["at_0.5"]["auroc_macro"]
    ours = base["this"]["at_0.5"]["auroc_macro"]
    change = f"{ours - base['at_0.5']['auroc_macro']:+.3f} ({found['interval'][0]:+.3f} to {found['interval'][1]:+.3f})"
    assert f"{base['at_0.5']['auroc_macro']:.3f} -> {ours:.3f}: {change}, p {found['p']:.3f}" in said
    assert "F1 macro, cross-fitted thresholds" in said
    assert "BASELINE" not in rows(format_summary(metrics | {"baseline": None}))


def test_few_patients_and_findings_of_one_class_are_said():
    predictions, labels = simulate(6, seed=0)
    labels.iloc[:, 3:] = 0
    found = rows(format_summary(evaluate(predictions, labels, resamples=100)))
    assert found["Note"] == (
        "No intervals with fewer than 10 patients: they would be far too short calibration and thresholds are fitted "
        "on 6 patients only: with fewer than 50, rates can be wrong by 10 points and more")
    assert "cross-fitted by patient" in found["OPTIMAL THRESHOLD"] and "(" not in found["AUROC macro"]
    assert found["Highest AUROC"].count(",") <= 2
    labels.iloc[:] = 0
    found = rows(format_summary(evaluate(predictions, labels, resamples=100)))
    assert found["AUROC macro"] == "undefined; needs no threshold" and "Highest AUROC" not in found


def test_volumes_that_were_left_out_are_counted():
    predictions, labels = simulate(12, seed=0)
    inputs = EvaluationInputs(as_table(predictions), as_table(labels.iloc[2:]))
    evaluation = evaluate_tables(inputs, Settings(resamples=100, allow_partial=True))
    assert rows(format_summary(evaluation.metrics))["Skipped"].startswith("2 rows of the predictions")
    assert repr(evaluation) == format_summary(evaluation.metrics)  # what a notebook shows of it
