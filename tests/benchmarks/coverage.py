"""How often a 95 % interval holds the truth, and how often two equally good predictions differ "significantly".

    python tests/benchmarks/coverage.py [--cohorts 200] [--patients 80 300] [--resamples 1000] [--processes 2]

Simulated: 18 findings at CT-RATE's rates that come together, one to three volumes of a patient, alike but not the same;
AUROC 0.75, logits twice as large as they should be and too high. Each cohort is evaluated as an evaluation does it,
with thresholds and calibration ("platt") fitted on 100 other patients, then cross-fitted, with an equally good
baseline. The truth is the metric of 20,000 other patients with the thresholds and maps that this cohort's evaluation
fitted; cross-fitted ones are dealt to those patients as the folds are to the reported ones. Half of the patients are
men, which nothing depends on: their truth is everybody's, that of a difference 0. The truth of a threshold is the one
tuned on the 20,000.

"given": how often there is an interval at all, or a p-value. Figures of labels are pooled over the 18. A coverage
passes within 93 to 97 %, a share of p < 0.05 up to 7 %, each widened by two standard errors of this simulation. Exit
code 1 where one does not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from multiprocessing import Pool
from typing import NamedTuple
from unittest import mock

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # each process has one core
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from rows import machine  # noqa: E402
from scipy.special import expit, logit  # noqa: E402
from scipy.stats import norm  # noqa: E402

from ctclip.config import Settings  # noqa: E402
from ctclip.data.ct_rate import PREVALENCE  # noqa: E402
from ctclip.evaluation import bootstrap, calibration, clinical, metrics, thresholds  # noqa: E402
from ctclip.evaluation.evaluate import evaluate_tables  # noqa: E402
from ctclip.evaluation.tables import EvaluationInputs, VolumeTable  # noqa: E402
from ctclip_model import ABNORMALITIES  # noqa: E402

RATES = np.array([PREVALENCE[name] for name in ABNORMALITIES])
DISTANCE = 0.954  # of two unit normals whose AUROC is 0.75: sqrt(2) * 0.6745
SLOPE, OFFSET = 2.0, 2.0  # of the logits, where a calibrated model has 1 and 0
FINDINGS_ALIKE, LABELS_ALIKE, SCORES_ALIKE, PREDICTIONS_ALIKE = 0.2, 0.9, 0.8, 0.5  # correlations
TUNING_PATIENTS, POPULATION = 100, 20_000
WAYS = ("at_0.5", "calibrated", "tuned", "tuned_global")
BENEFITS = tuple(f"{threshold:.2f}" for threshold in clinical.NET_BENEFIT_AT)
LOWEST, HIGHEST, MOST_FALSE = 0.93, 0.97, 0.07
FEWEST = 10  # cohorts with an interval, to say how often it holds


class Simulated(NamedTuple):
    patients: np.ndarray  # (N,)
    labels: np.ndarray  # (N, 18)
    predictions: list[np.ndarray]  # (N, 18) each


class Found(NamedTuple):
    """One interval or p-value of one evaluation; `right`: the truth lies in the interval, p is not below 0.05."""

    patients: int
    kind: str
    way: str
    metric: str
    given: bool
    right: bool


def simulate(rng: np.random.Generator, patients: int, predictions: int = 1) -> Simulated:
    """Predictions are equally good, with errors that are alike."""
    who = np.repeat(np.arange(patients), rng.integers(1, 4, patients))

    def normals(columns: int, alike: float) -> np.ndarray:
        """Standard normals (N, columns), a patient's correlated."""
        own = rng.normal(size=(patients, columns))[who]
        return np.sqrt(alike) * own + np.sqrt(1 - alike) * rng.normal(size=own.shape)

    health = _mixed(normals(1, LABELS_ALIKE), normals(18, LABELS_ALIKE), FINDINGS_ALIKE)
    labels, common = (health < norm.ppf(RATES)).astype(np.int8), normals(18, SCORES_ALIKE)
    scores = [DISTANCE * (labels - 0.5) + _mixed(common, normals(18, SCORES_ALIKE), PREDICTIONS_ALIKE)
              for _ in range(predictions)]
    return Simulated(who, labels, [expit(SLOPE * (DISTANCE * score + logit(RATES)) + OFFSET) for score in scores])


def _mixed(common: np.ndarray, own: np.ndarray, alike: float) -> np.ndarray:
    return np.sqrt(alike) * common + np.sqrt(1 - alike) * own


@cache
def population() -> tuple[Simulated, dict[str, float], dict[str, np.ndarray]]:
    """Patients that stand for all there are, with what no fit changes: of all labels together, of each."""
    everyone = simulate(np.random.default_rng(0), POPULATION)
    ranking, columns = metrics.resampled_ranking(
        everyone.labels, everyone.predictions[0], metrics.drawn_once(everyone.labels), clinical.SPECIFICITIES)
    tuned = thresholds.tune_label_thresholds(everyone.labels, everyone.predictions[0])
    return everyone, ranking, columns | {"threshold_range": tuned[None]}


def truths(fits: Sequence[calibration.Calibration]) -> tuple[dict[str, dict], dict[str, dict]]:
    """({way: {metric: value}}, {way: {metric: (18,)}}) of the population, each of whose patients meets one of `fits`,
    all of them equally often."""
    everyone, ranking, ranked = population()
    y, p = everyone.labels, everyone.predictions[0]
    calibrated, cuts, common = np.empty((3, *p.shape))
    for k, fit in enumerate(fits):
        own = everyone.patients % len(fits) == k
        calibrated[own], cuts[own], common[own] = fit.apply(p[own]), fit.thresholds, fit.global_threshold
    once = metrics.drawn_once(y)
    decisions = dict(zip(WAYS, (p >= 0.5, calibrated >= 0.5, p >= cuts, p >= common), strict=True))
    values, columns = {}, {}
    for way, decided in decisions.items():
        own, columns[way] = metrics.resampled_decisions(y, decided, once)
        values[way] = ranking | own
        columns[way] |= ranked
    values["calibrated"] = values["calibrated"] | {"auroc_micro": metrics.pooled_auroc(y, calibrated, once)}
    sums = once.sums(metrics.confusion_counts(y, decisions["tuned"]))
    counts, columns["clinical"] = clinical.resampled_columns(y, p, calibrated, ranked, sums, once)
    values["clinical"] = clinical.resampled_summary(counts, columns["clinical"])
    columns["clinical"] |= in_one(clinical.net_benefits(y, calibrated, once)[0])
    columns["clinical"]["threshold_range"] = ranked["threshold_range"]
    for when, numbers in (("before", p), ("after", calibrated)):
        columns[when] = {"brier": metrics.calibration_columns(y, numbers)["brier"][None]}
        values[when] = {"brier": columns[when]["brier"].mean(axis=1)}
    return values, columns


def in_one(benefits: Mapping[str, object]) -> dict:
    return {f"net_benefit_at_{threshold}": benefits[threshold] for threshold in BENEFITS}


def table(numbers: np.ndarray, patients: np.ndarray, split: str) -> VolumeTable:
    place = pd.Series(patients).groupby(patients).cumcount() + 1
    names = [f"{split}_{patient}_a_{k}.nii.gz" for patient, k in zip(patients, place, strict=True)]
    return VolumeTable(pd.DataFrame(numbers, pd.Index(names, name="VolumeName"), list(ABNORMALITIES)))


def one_cohort(resamples: int, patients: int, seed: int) -> list[Found]:
    rng = np.random.default_rng((seed, patients))
    settings = Settings(calibration="platt", resamples=resamples, seed=seed)
    tuning, reported = simulate(rng, TUNING_PATIENTS), simulate(rng, patients, 2)
    labels = table(reported.labels, reported.patients, "valid")
    first, second = (table(numbers, reported.patients, "valid") for numbers in reported.predictions)
    other = tuple(table(numbers, tuning.patients, "train") for numbers in (tuning.predictions[0], tuning.labels))
    men = rng.permutation(np.arange(patients) % 2 == 0)[reported.patients]
    metadata = {name: {"PatientSex": "M" if man else "F"} for name, man in zip(first.frame.index, men, strict=True)}
    found = []
    for kind, fitted_on, baseline in (("tuning patients", other, None), ("cross-fitted", None, second)):
        fits: list[calibration.Calibration] = []
        with mock.patch.object(calibration, "fit_calibration", partial(_kept, fits, calibration.fit_calibration)):
            inputs = EvaluationInputs(first, labels, fitted_on)
            evaluation = evaluate_tables(inputs, settings, baseline, metadata).metrics
        # of the cross-fitted, the first is for new patients, then come the folds'; those of the baseline follow
        values, columns = truths(fits[:1] if fitted_on else fits[1:6])
        found += held(patients, kind, evaluation, values, columns)
        found += held_in_groups(patients, kind, evaluation["subgroups"]["Sex"], reported, men, values["tuned"])
    return found + list(told_apart(patients, evaluation["baseline"]["differences"]))


def _kept(fits: list, fit: Callable, *args: object, **kwargs: object) -> calibration.Calibration:
    fits.append(fit(*args, **kwargs))
    return fits[-1]


def held(patients: int, kind: str, evaluation: Mapping, values: Mapping, columns: Mapping) -> Iterator[Found]:
    intervals, of_clinical = evaluation["intervals"], evaluation["clinical"]["intervals"]

    def compared(way: str, metric: str, bounds: Sequence[float] | None, truth: float, what: str = "") -> Found:
        right = bounds is not None and bounds[0] <= truth <= bounds[1]
        return Found(patients, f"{what}{kind}", way, metric, bounds is not None, right)

    for way in WAYS:
        for metric, bounds in intervals[way].items():
            yield compared(way, metric, bounds, values[way][metric][0])
    for metric, bounds in of_clinical["summary"].items():
        yield compared("clinical", metric, bounds, values["clinical"][metric][0])
    for j, (name, own) in enumerate(of_clinical["per_label"].items()):
        spread = {"threshold_range": evaluation["clinical"]["per_label"][name]["threshold_range"]}
        benefits = in_one(own["net_benefit"] or dict.fromkeys(BENEFITS))
        others = {metric: bounds for metric, bounds in own.items() if metric != "net_benefit"}
        for metric, bounds in (others | benefits | spread).items():
            yield compared("clinical", metric, bounds, columns["clinical"][metric][0, j], "each label, ")
    for when in ("before", "after"):
        yield compared(when, "brier", intervals["calibration"][when]["brier"], values[when]["brier"][0])
    for j, own in enumerate(intervals["per_label"].values()):
        for way, of_way in (("tuned", own), ("at_0.5", own["at_0.5"])):
            for metric, bounds in of_way.items():
                if metric in columns[way]:
                    yield compared(way, metric, bounds, columns[way][metric][0, j], "each label, ")
        for when in ("before", "after"):
            yield compared(when, "brier", own[f"brier_{when}"], columns[when]["brier"][0, j], "each label, ")


def held_in_groups(
    patients: int, kind: str, groups: Sequence[Mapping], reported: Simulated, men: np.ndarray, values: Mapping
) -> Iterator[Found]:
    """`men` (N,): whose rows are men's; `values`: the population's, tuned."""
    aurocs = population()[2]["auroc"][0]
    for group in groups:
        own = men == (group["group"] == "male")
        counted = bootstrap.enough_cases(reported.labels[own], reported.patients[own])
        truth = {key: value[0] for key, value in values.items()} | {"auroc_macro": metrics.nanmean(aurocs[counted])}
        intervals = dict(group["intervals"])
        if "auroc_difference" in group:
            truth["auroc_difference"], intervals["auroc_difference"] = 0.0, group["auroc_difference"]["interval"]
        for metric, bounds in intervals.items():
            right = bounds is not None and bounds[0] <= truth[metric] <= bounds[1]
            yield Found(patients, f"half the patients, {kind}", "tuned", metric, bounds is not None, right)


def told_apart(patients: int, differences: Mapping) -> Iterator[Found]:
    for way, rows in differences.items():
        if way == "per_label":
            for metric, by_label in rows.items():
                for row in by_label.values():
                    yield _false_positive(patients, "p < 0.05, each label", "tuned", metric, row["p"])
                corrected = [row["p_corrected"] for row in by_label.values() if row["p_corrected"] is not None]
                yield _false_positive(patients, "p < 0.05, any label, corrected", "tuned", metric,
                                      min(corrected, default=None))
        else:
            for metric, row in rows.items():
                if metric != "label_rate":
                    yield _false_positive(patients, "p < 0.05", way, metric, row["p"])


def _false_positive(patients: int, kind: str, way: str, metric: str, p: float | None) -> Found:
    return Found(patients, kind, way, metric, p is not None, p is not None and p >= 0.05)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--patients", type=int, nargs="+", default=[80, 300])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    print(machine())
    started = time.perf_counter()
    population()  # before the processes are forked
    jobs = [(args.resamples, patients, seed) for seed in range(args.cohorts) for patients in args.patients]
    groups: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    with Pool(args.processes) as pool:
        for cohort in pool.starmap(one_cohort, jobs, chunksize=1):
            for found in cohort:
                groups[found[1:4]].append(found)
    print(f"{args.cohorts} cohorts; of each number of patients: how often it holds, how often it is given\n{'':64}"
          + "".join(f"{patients:>20}" for patients in args.patients))
    failed = 0
    for names, rows in sorted(groups.items()):
        cells = [_cell([row for row in rows if row.patients == patients], args.cohorts) for patients in args.patients]
        failed += sum(cell.endswith("FAIL") for cell in cells)
        print(f"{', '.join(names):64}{''.join(f'{cell:>20}' for cell in cells)}")
    print(f"{failed} do not hold; took {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


def _cell(rows: Sequence[Found], cohorts: int) -> str:
    right = [row.right for row in rows if row.given]
    if not right:
        return "never given"
    p_value, share, measured = rows[0].kind.startswith("p < 0.05"), len(right) / len(rows), float(np.mean(right))
    low, high = (1 - MOST_FALSE, 1) if p_value else (LOWEST, HIGHEST)
    error = 2 * np.sqrt(0.05 * 0.95 / (cohorts * share))  # a cohort's labels are not independent: they count once
    if cohorts * share < FEWEST:
        return f"{len(right)} times"
    verdict = "" if low - error <= measured <= high + error else " FAIL"
    return f"{1 - measured if p_value else measured:.1%} ({share:.0%}){verdict}"


if __name__ == "__main__":
    sys.exit(main())
