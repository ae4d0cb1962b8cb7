"""The same metrics for parts of a cohort: by sex, age, manufacturer and slice thickness, from the metadata table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ctclip.data.tables import join
from ctclip.evaluation.bootstrap import difference, enough_cases, interval, jackknife_interval, left_out_decisions
from ctclip.evaluation.metrics import Resamples, drawn_once, nanmean, plain, ranking_columns, resampled_decisions
from ctclip.evaluation.tables import Rows, row_keys
from ctclip.formatting import parse_number

MIN_PATIENTS = 20  # too few for a metric below
UNKNOWN = "not stated"
AGE_BANDS = ((40, "under 40"), (60, "40 to 59"), (75, "60 to 74"), (np.inf, "75 and older"))  # years, below
THICKNESS_BANDS = ((1, "up to 1 mm"), (2, "over 1 to 2 mm"), (4, "over 2 to 4 mm"), (np.inf, "over 4 mm"))
BANDS = [name for _, name in (*AGE_BANDS, *THICKNESS_BANDS)]
SEXES = {"F": "female", "FEMALE": "female", "M": "male", "MALE": "male"}
AGE = re.compile(r"(\d+(?:\.\d+)?) ?([YMWD]?)", re.ASCII)  # DICOM's age string, or years
OLDEST, TOO_OLD = 120, "not stated (above 120 years given)"  # 999Y stands for an unknown age; so do dates of 1900
PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
GROUP_METRICS = ("positive_rate", "label_rate", "hamming_accuracy", "f1_macro")  # of M, beside the AUROC


def attributes(row: Mapping[str, str]) -> dict[str, str]:
    """{attribute: group} of one volume's metadata row (text cells); UNKNOWN where a cell is empty or unreadable."""
    age, thickness = AGE.fullmatch(row.get("PatientAge", "").strip().upper()), UNKNOWN
    years = float(age[1]) / PER_YEAR[age[2]] if age else None
    try:
        millimetres = parse_number(row.get("SliceThickness") or row.get("ZSpacing", ""))
        if millimetres > 0:
            thickness = next(name for limit, name in THICKNESS_BANDS if millimetres <= limit)
    except ValueError:
        pass  # no number: not stated
    return {
        "Sex": SEXES.get(row.get("PatientSex", "").strip().upper(), UNKNOWN),
        "Age": UNKNOWN if years is None else TOO_OLD if years > OLDEST else next(
            name for limit, name in AGE_BANDS if years < limit),
        "Manufacturer": row.get("Manufacturer", "") or UNKNOWN,
        "Slice thickness": thickness,
    }


def row_attributes(
    rows: Rows, volumes: Sequence[str], metadata: Mapping[str, Mapping[str, str]]
) -> list[dict[str, str]]:
    """Attributes of each row, UNKNOWN for volumes without metadata; of merged volumes that differ, "several"."""
    merged: dict[str, dict[str, str]] = {}
    there = join(volumes, metadata)
    of_volumes = [attributes(metadata.get(there.get(volume, ""), {})) for volume in volumes]
    spelled: dict[str, str] = {}  # SIEMENS and Siemens are one manufacturer, by the spelling that most volumes have
    for maker, _ in Counter(groups["Manufacturer"] for groups in of_volumes).most_common():
        spelled.setdefault(_spelling(maker), maker)
    for key, groups in zip(row_keys(volumes, rows.unit, rows.ids), of_volumes, strict=True):
        groups["Manufacturer"] = spelled[_spelling(groups["Manufacturer"])]
        known = merged.setdefault(key, groups)
        known |= {attribute: "several" for attribute, group in groups.items() if known[attribute] != group}
    return [merged[str(name)] for name in rows.names]


def _spelling(maker: str) -> str:
    return " ".join(maker.casefold().split())


def subgroup_metrics(
    rows: Rows, decisions: np.ndarray, groups: Sequence[Mapping[str, str]], resamples: Resamples
) -> dict[str, list[dict]]:
    """{attribute: [{group, n_rows, n_patients, n_positives, too_small, metrics...}]}, bands in order, others by size.

    `groups` gives each row's attributes. A group's macro AUROC counts the findings with enough_cases in it,
    `auroc_labels` of them; groups differ in which, so `auroc_everyone` is the whole cohort's over the same findings.
    Below MIN_PATIENTS patients nothing is computed. Attributes that no row states are skipped. `auroc_difference` is a
    group's macro AUROC minus that of the attribute's largest group, over the findings counted in both, on the same
    resamples.
    """
    overall = ranking_columns(rows.labels, rows.probabilities, drawn_once(rows.labels))["auroc"]
    result: dict[str, list[dict]] = {}
    for attribute in groups[0]:
        member = np.array([row[attribute] for row in groups])
        known, sizes = np.unique(member, return_counts=True)
        if list(known) == [UNKNOWN]:
            continue
        size = dict(zip(known.tolist(), sizes.tolist(), strict=True))
        ordered = sorted(size, key=lambda group: (BANDS.index(group) if group in BANDS else -1, -size[group]))
        found = [_one_group(rows, decisions, member == group, resamples, overall) for group in ordered]
        largest = max(range(len(ordered)), key=lambda at: found[at][0]["n_patients"])
        for at, (values, auroc) in enumerate(found):
            if at != largest and auroc is not None and (reference := found[largest][1]) is not None:
                values["auroc_difference"] = difference(nanmean(auroc - reference)) | {"from": ordered[largest]}
        result[attribute] = [{"group": group} | values for group, (values, _) in zip(ordered, found, strict=True)]
    return result


def _one_group(
    rows: Rows, decisions: np.ndarray, chosen: np.ndarray, resamples: Resamples, overall: np.ndarray
) -> tuple[dict, np.ndarray | None]:
    """(its metrics, AUROCs (1 + B, L) of the findings that are counted, NaN for the others)"""
    labels, patients = rows.labels[chosen], rows.patients[chosen]
    count = {"n_rows": len(labels), "n_patients": len(np.unique(patients)), "n_positives": int((labels == 1).sum())}
    if count["n_patients"] < MIN_PATIENTS:
        return count | {"too_small": True}, None
    own, counted = resamples.of(chosen), enough_cases(labels, patients)
    of_counted = labels[:, counted], rows.probabilities[chosen][:, counted]
    columns = np.full((len(own.counts), len(counted)), np.nan)
    columns[:, counted] = ranking_columns(*of_counted, own, ap=False)["auroc"]
    auroc = nanmean(columns)
    values, _ = resampled_decisions(labels, decisions[chosen], own)
    values = {key: values[key] for key in GROUP_METRICS}
    left_out = left_out_decisions(labels, decisions[chosen], own)
    point = {"auroc_macro": auroc[:1], "auroc_everyone": nanmean(overall[:, counted])} | values
    return count | {"too_small": False, "auroc_labels": int(counted.sum()), **plain(point),
                    "intervals": {"auroc_macro": interval(auroc)} | {
                        key: jackknife_interval(value[0], left_out[key]) for key, value in values.items()}}, columns
