"""The same metrics for parts of a cohort: by sex, age, manufacturer and slice thickness, from the metadata table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ctclip.evaluation.bootstrap import Resamples, enough_cases, interval, resampled_decisions
from ctclip.evaluation.metrics import decision_metrics, nanmean, none_if_nan, ranking_columns, resampled_auroc_and_ap
from ctclip.evaluation.tables import Rows

MIN_PATIENTS = 20  # too few for a metric below
UNKNOWN = "not stated"
AGE_BANDS = ((40, "under 40"), (60, "40 to 59"), (75, "60 to 74"), (np.inf, "75 and older"))  # years, below
THICKNESS_BANDS = ((1, "up to 1 mm"), (2, "over 1 to 2 mm"), (4, "over 2 to 4 mm"), (np.inf, "over 4 mm"))
BANDS = [name for _, name in (*AGE_BANDS, *THICKNESS_BANDS)]
SEXES = {"F": "female", "M": "male"}
AGE = re.compile(r"(\d+)([YMWD]?)")  # DICOM's age string, or years
PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
MEASURES = ("positive_rate", "label_rate", "hamming_accuracy", "f1_macro")  # of M, beside the AUROC


def attributes(row: Mapping[str, str]) -> dict[str, str]:
    """{attribute: group} of one volume's metadata row (text cells); UNKNOWN where a cell is empty or unreadable."""
    return {
        "Sex": SEXES.get(row.get("PatientSex", "").upper(), UNKNOWN),
        "Age": _age_band(row.get("PatientAge", "")),
        "Manufacturer": row.get("Manufacturer", "") or UNKNOWN,
        "Slice thickness": _thickness_band(row.get("SliceThickness") or row.get("ZSpacing", "")),
    }


def _age_band(text: str) -> str:
    match = AGE.fullmatch(text.strip().upper())
    if not match:
        return UNKNOWN
    years = int(match[1]) / PER_YEAR[match[2]]
    return next(name for limit, name in AGE_BANDS if years < limit)


def _thickness_band(text: str) -> str:
    try:
        millimetres = float(text)
    except ValueError:
        return UNKNOWN
    if not 0 < millimetres < np.inf:
        return UNKNOWN
    return next(name for limit, name in THICKNESS_BANDS if millimetres <= limit)


def groups_of(names: Sequence[str], metadata: Mapping[str, Mapping[str, str]]) -> list[dict[str, str]]:
    """Attributes of each volume; those without a metadata row are UNKNOWN throughout."""
    return [attributes(metadata.get(name, {})) for name in names]


def subgroup_metrics(
    rows: Rows, decisions: np.ndarray, groups: Sequence[Mapping[str, str]], resamples: Resamples
) -> dict[str, list[dict]]:
    """{attribute: [{group, n_rows, n_patients, n_positives, too_small, metrics...}]}, bands in order, others by size.

    `groups` gives each row's attributes. A group's macro AUROC counts the findings with enough_cases in it,
    `auroc_labels` of them; groups differ in which, so `auroc_everyone` is the whole cohort's over the same findings.
    Below MIN_PATIENTS patients nothing is computed. Attributes that no row states are skipped.
    """
    overall, _ = ranking_columns(rows.labels, rows.probabilities)
    result: dict[str, list[dict]] = {}
    for attribute in groups[0]:
        member = np.array([row[attribute] for row in groups])
        known, sizes = np.unique(member, return_counts=True)
        if list(known) == [UNKNOWN]:
            continue
        size = dict(zip(known.tolist(), sizes.tolist(), strict=True))
        result[attribute] = [
            {"group": group} | _one_group(rows, decisions, member == group, resamples, overall)
            for group in sorted(size, key=lambda group: (BANDS.index(group) if group in BANDS else -1, -size[group]))
        ]
    return result


def _one_group(
    rows: Rows, decisions: np.ndarray, chosen: np.ndarray, resamples: Resamples, overall: np.ndarray
) -> dict:
    labels, probabilities = rows.labels[chosen], rows.probabilities[chosen]
    patients = rows.patients[chosen]
    count = {"n_rows": len(labels), "n_patients": len(np.unique(patients)), "n_positives": int(labels.sum())}
    if count["n_patients"] < MIN_PATIENTS:
        return count | {"too_small": True}
    own = resamples.only(chosen)
    counted = enough_cases(labels, patients)
    auroc, _ = ranking_columns(labels, probabilities)
    resampled, _ = resampled_auroc_and_ap(labels, probabilities, own.group, own.counts)
    summary, _ = resampled_decisions(labels, decisions[chosen], own)
    point = decision_metrics(labels, decisions[chosen])
    return count | {
        "too_small": False,
        "auroc_labels": int(counted.sum()),
        "auroc_macro": none_if_nan(nanmean(auroc[counted])),
        "auroc_everyone": none_if_nan(nanmean(overall[counted])),
        **{key: point[key] for key in MEASURES},
        "intervals": {"auroc_macro": interval(nanmean(resampled[:, counted]))}
        | {key: interval(summary[key]) for key in MEASURES},
    }
