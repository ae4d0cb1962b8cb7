"""Predictions of several models -> one table, evaluated like one: the mean of their logits, a mean weighted for each
finding, or folds, each of which predicts patients of its own, put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from ctclip.data.patients import StatedIds, id_columns, merge_ids
from ctclip.data.tables import NAME_COLUMN, UNCALIBRATED, shown
from ctclip.evaluation.calibration import COMMON_SLOPE_PRIOR_SD, compressed_logit
from ctclip.evaluation.metrics import EvaluationError, lacks_a_class, masked_mean
from ctclip.evaluation.tables import (
    EvaluationInputs,
    VolumeTable,
    check_no_overlap,
    common_volumes,
    joined,
    row_keys,
)
from ctclip.fileio import read_json
from ctclip_model import UNKNOWN

WEIGHT_PRIOR_SD = 1.0  # how far weights lie apart, standard deviation of the logarithm (LOG.md)
COMPARED_WITH_MEMBERS = (("at_0.5", "auroc_macro"), ("tuned", "f1_macro"), ("tuned", "positive_rate"), ("tuned", "crg"))


def combine(probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(K, N, L) probabilities of K members -> (N, L): the sigmoid of the mean of their logits.

    `weights` (K, L), which sum to 1 over the members; without them all count alike. Logits are compressed_logit's: a 0
    or 1 counts as a logit of 8, so that no member outvotes all others, and what rises in one of the members rises.
    """
    logits = compressed_logit(probabilities)
    return expit(logits.mean(axis=0) if weights is None else np.einsum("knl,kl->nl", logits, weights))


def fit_weights(
    labels: np.ndarray, probabilities: np.ndarray, patients: Sequence[str] | np.ndarray,
    prior_sd: float = WEIGHT_PRIOR_SD,
) -> np.ndarray:
    """Weights (K, L) above 0, which sum to 1 over the members, from labels (N, L) (UNKNOWN: left out) and the members'
    probabilities (K, N, L) of tuning patients.

    They minimise the log loss of the weighted sum of logits, whose scale and offset are free, so that no member loses
    weight because it is badly calibrated; both are dropped, as calibration fits them again. Logarithms of weights are
    taken as spread by `prior_sd`, those of all findings together around equal ones, those of each finding around these:
    a finding with a handful of positives follows the others, one with a single class entirely. A patient's volumes
    are not independent: all rows together weigh as much as there are patients.
    """
    labels, known = np.asarray(labels), np.asarray(labels) != UNKNOWN
    members, fitted = len(probabilities), ~lacks_a_class(labels)
    prior = np.full(members, -np.log(members))
    if not fitted.any():
        return np.full((members, labels.shape[1]), 1 / members)
    logits = compressed_logit(probabilities)
    logits = logits - np.nan_to_num([masked_mean(each, known) for each in logits])[:, None]  # offset and scale separate
    mass = known * (len(np.unique(np.asarray(patients))) / len(labels))
    common = _minimise_log_loss(logits[..., fitted], labels[:, fitted], mass[:, fitted], prior, prior_sd)
    log_weights = np.tile(common[:, None], labels.shape[1])
    for j in np.flatnonzero(fitted):
        own = known[:, j]
        one = logits[:, own, j, None], labels[own, j, None], mass[own, j, None]
        log_weights[:, j] = _minimise_log_loss(*one, common, prior_sd)
    weights = np.exp(log_weights - log_weights.max(axis=0))
    return weights / weights.sum(axis=0)


def _minimise_log_loss(
    logits: np.ndarray, labels: np.ndarray, mass: np.ndarray, prior: np.ndarray, prior_sd: float
) -> np.ndarray:
    """Log weights u (K,), the same for all columns of logits (K, N, C), that minimise the cross entropy of
    sigmoid(sum of exp(u) * logits + offset (C,)), rows weighing `mass` (N, C), plus |d - mean(d)|^2 / (2 prior_sd^2)
    for d = u - prior, and next to nothing for mean(d), the scale."""
    y, n_members = labels == 1, len(logits)

    def loss_and_gradient(unknowns: np.ndarray) -> tuple[float, np.ndarray]:
        u, offset = unknowns[:n_members], unknowns[n_members:]
        scaled = np.exp(u)[:, None, None] * logits
        z = scaled.sum(axis=0) + offset
        error = mass * (expit(z) - y)
        scale = (u - prior).mean()
        apart = u - prior - scale
        loss = -(mass * (log_expit(-z) + y * z)).sum()
        loss += (apart**2).sum() / (2 * prior_sd**2) + scale**2 / (2 * COMMON_SLOPE_PRIOR_SD**2)
        by_weight = (error * scaled).sum(axis=(1, 2)) + apart / prior_sd**2
        by_weight += scale / COMMON_SLOPE_PRIOR_SD**2 / n_members
        return loss, np.append(by_weight, error.sum(axis=0))

    first = np.append(prior, logit((mass * y).sum(axis=0) / mass.sum(axis=0)))
    found = minimize(loss_and_gradient, first, jac=True, method="BFGS", options={"gtol": 1e-7 * mass.sum()})
    return found.x[:n_members]


def combined_inputs(
    members: Sequence[EvaluationInputs], method: str, allow_partial: bool = False, of_runs: bool = False
) -> EvaluationInputs:
    """The members' inputs as those of one evaluation; `method` is a key of config.ENSEMBLES.

    Members that are averaged need the same volumes and labels. Those of runs have tuning patients of their own: weights
    are fitted on the patients who are that in all of them; thresholds and calibration too, if all have the same ones.
    Pooled members need other patients each, and everything is cross-fitted, as each member's tuning patients may be
    unseen in another. Raises EvaluationError for members that do not go together.
    """
    findings = members[0].labels.findings
    for member in members:
        if set(member.labels.findings) != set(findings):
            raise EvaluationError(f"{member.labels.source}: found other findings than in {members[0].labels.source}, "
                                  "expected the same; name those that are in all with --findings")
    tables = [table for member in members for table in (member.predictions, *(member.tuning or ())[:1])]
    check_uncalibrated(tables)
    paths = [Path(member.predictions.source).resolve() for member in members]
    if twice := [path for place, path in enumerate(paths) if path in paths[:place]]:
        raise EvaluationError(f"found {twice[0]} twice, expected predictions of different models; name it once")
    ids = _merged_ids(members)
    members = [_selected(member, findings, ids) for member in members]
    result = _pooled(members, ids) if method == "pooled" else _averaged(members, method, ids, allow_partial, of_runs)
    data_dirs = {member.data_dir for member in members}
    return replace(
        result, phantom=any(member.phantom for member in members), patients=ids,
        data_dir=data_dirs.pop() if len(data_dirs) == 1 else None,
    )


def _merged_ids(members: Sequence[EvaluationInputs]) -> dict[str, tuple[str, str]]:
    """What all tables of all members state of patients and scans."""
    tables = [table for member in members for table in (member.predictions, member.labels, *(member.tuning or ()))]
    sources = [(table.source, table.ids) for table in tables]
    return merge_ids([*sources, *(("--patients", member.patients) for member in members)],
                     dict.fromkeys(name for table in tables for name in table.frame.index))


def _selected(member: EvaluationInputs, findings: Sequence[str], ids: StatedIds) -> EvaluationInputs:
    """The member with these findings, in one order in all tables."""
    tuning = member.tuning and (member.tuning[0].select(findings), member.tuning[1].select(findings))
    return replace(member, predictions=member.predictions.select(findings), labels=member.labels.select(findings),
                   tuning=tuning, patients=ids)


def _averaged(
    members: Sequence[EvaluationInputs], method: str, ids: StatedIds, allow_partial: bool, of_runs: bool
) -> EvaluationInputs:
    findings = members[0].labels.findings
    predictions = joined({member.predictions.source: member.predictions for member in members})
    if not set.intersection(*(set(table.frame.index) for table in predictions.values())):
        raise EvaluationError(f"{' and '.join(predictions)}: found no volume that all of them predict, expected the "
                              "same volumes; for folds, each of which predicts patients of its own, add --ensemble "
                              "pooled")
    volumes, skipped = common_volumes(predictions, allow_partial)
    labels = _agreeing([member.labels for member in members])
    reported = row_keys(volumes, "patient", ids)
    for member in members:
        if member.tuning:
            check_no_overlap(reported, row_keys(member.tuning[0].frame.index, "patient", ids), member.tuning[0].source)
    fit = fit_on_tuning([member.tuning for member in members], findings, method, ids, allow_partial or of_runs)
    evaluated = [replace(member, predictions=table, labels=labels, tuning=fit.tunings[place] if fit.tunings else None)
                 for place, (member, table) in enumerate(zip(members, predictions.values(), strict=True))]

    content = {
        "method": method, "sources": list(predictions), "weights": fit.by_finding(findings),
        "tuning_patients": fit.n_common, "tuning_patients_of_some": fit.n_others, "left_out": skipped,
    }
    combined = combined_table(list(predictions.values()), volumes, findings, fit.weights, ids)
    return EvaluationInputs(combined, labels, fit.fused, members=evaluated, ensemble=content)


class TuningFit(NamedTuple):
    """What is fitted on the patients who are tuning patients of all members: `weights` (K, L), None of a plain mean.
    Where all members have the same ones, `tunings` are their tables and `fused` those of the ensemble, both as
    (predictions, labels). `n_common` patients are tuning patients of all, `n_others` of some only."""

    weights: np.ndarray | None
    tunings: list[tuple[VolumeTable, VolumeTable]] | None
    fused: tuple[VolumeTable, VolumeTable] | None
    n_common: int
    n_others: int

    def by_finding(self, findings: Sequence[str]) -> dict[str, list[float]] | None:
        return None if self.weights is None else dict(zip(findings, self.weights.T.tolist(), strict=True))


def fit_on_tuning(
    tunings: Sequence[tuple[VolumeTable, VolumeTable] | None], findings: Sequence[str], method: str, ids: StatedIds,
    allow_partial: bool = False,
) -> TuningFit:
    """Of the members' tuning tables, (predictions, labels) each; `method` is "mean" or "stacked". Raises
    EvaluationError where weights are to be fitted and there is nobody to fit them on."""
    tuning, n_common, n_others = _common_tuning(tunings, ids, allow_partial)
    weights = None
    if method == "stacked":
        if tuning is None:
            raise EvaluationError(
                "found --ensemble stacked without patients who are tuning patients of all members, expected some, as "
                "weights are fitted on them; give --tuning-predictions and --tuning-labels, train with one --seed, or "
                "choose --ensemble mean"
            )
        names, truth = tuning[1].frame.index, tuning[1].frame[list(findings)].to_numpy()
        weights = fit_weights(truth, _probabilities(tuning[0], names, findings), row_keys(names, "patient", ids))
    if tuning is None or n_others:
        return TuningFit(weights, None, None, n_common, n_others)
    fused = combined_table(tuning[0], tuning[1].frame.index, findings, weights, ids), tuning[1]
    return TuningFit(weights, [(table, tuning[1]) for table in tuning[0]], fused, n_common, n_others)


def combined_table(
    tables: Sequence[VolumeTable], names: Sequence[str], findings: Sequence[str], weights: np.ndarray | None,
    ids: StatedIds,
) -> VolumeTable:
    """`combine` of tables that have these names of volumes."""
    values = combine(_probabilities(tables, names, findings), weights)
    frame = pd.DataFrame(values, pd.Index(names, name=NAME_COLUMN), list(findings))
    return VolumeTable(frame.assign(**id_columns(names, ids)), _together(tables))


def check_uncalibrated(tables: Sequence[VolumeTable]) -> None:
    """Raises EvaluationError for predictions that say that they are calibrated or mapped: their logits have scales of
    their own."""
    if others := [table for table in tables if table.scale != UNCALIBRATED]:
        raise EvaluationError(f"{others[0].source}: found predictions that are {others[0].scale}, expected "
                              "uncalibrated ones to combine; predict with --uncalibrated")


def _probabilities(tables: Sequence[VolumeTable], names: Sequence[str], findings: Sequence[str]) -> np.ndarray:
    """(K, N, L)."""
    return np.stack([table.frame.loc[names, list(findings)].to_numpy() for table in tables])


def _together(tables: Sequence[VolumeTable]) -> str:
    return " and ".join(table.source for table in tables)


def _common_tuning(
    given: Sequence[tuple[VolumeTable, VolumeTable] | None], ids: StatedIds, allow_partial: bool
) -> tuple[tuple[list[VolumeTable], VolumeTable] | None, int, int]:
    """((tables of predictions, labels) of the tuning volumes of all members, None where there are none; the number of
    their patients; the number of patients who are tuning patients of some members only)."""
    tunings = [tuning for tuning in given if tuning]
    patients = [set(row_keys(table.frame.index, "patient", ids)) for table, _ in tunings]
    if len(tunings) < len(given):
        return None, 0, len(set().union(*patients))
    everyone, common = set.union(*patients), set.intersection(*patients)
    if not common:
        return None, 0, len(everyone)
    labels = _agreeing([labels for _, labels in tunings])
    tables = joined({"labels": labels} | {table.source: table for table, _ in tunings})
    volumes, _ = common_volumes(tables, allow_partial)
    of_all = [replace(table, frame=table.frame.loc[volumes], lines=()) for table in tables.values()]
    return (of_all[1:], of_all[0]), len(common), len(everyone - common)


def _agreeing(tables: Sequence[VolumeTable]) -> VolumeTable:
    """The first of the tables of labels; EvaluationError where another has other labels for a volume of both."""
    first = tables[0]
    for other in joined({str(place): table for place, table in enumerate(tables)}).values():
        names = first.frame.index.intersection(other.frame.index, sort=False)
        columns = list(first.findings)
        differ = (first.frame.loc[names, columns].to_numpy() != other.frame.loc[names, columns].to_numpy()).any(axis=1)
        if differ.any():
            raise EvaluationError(
                f"{other.source}: found other labels than in {first.source} for {differ.sum()} of {len(names)} "
                f"volumes, first {shown(names[differ][0])}, expected the same; evaluate all members on one cohort"
            )
    return first


def _pooled(members: Sequence[EvaluationInputs], ids: StatedIds) -> EvaluationInputs:
    findings, predictions = members[0].labels.findings, [member.predictions for member in members]
    patients: dict[str, str] = {}
    for table in predictions:
        for patient in np.unique(row_keys(table.frame.index, "patient", ids)).tolist():
            if patient in patients:
                raise EvaluationError(
                    f"{table.source}: found patient {patient}, whom {patients[patient]} predicts too, expected other "
                    "patients in each pooled table; for predictions of the same volumes choose --ensemble mean"
                )
            patients[patient] = table.source
    labels = list({member.labels.source: member.labels for member in members}.values())
    if len(labels) > 1:
        labels = [VolumeTable(pd.concat([table.frame[list(findings)] for table in labels]), _together(labels))]
    frame = pd.concat([table.frame[list(findings)] for table in predictions])
    frame = frame.assign(**id_columns(frame.index, ids))
    content: dict[str, Any] = {"method": "pooled", "sources": [table.source for table in predictions], "weights": None,
               "tuning_patients": 0, "tuning_patients_of_some": 0, "left_out": {}}
    return EvaluationInputs(VolumeTable(frame, _together(predictions)), labels[0],
                            members=[replace(member, tuning=None) for member in members], ensemble=content)


def mean_and_spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """{"mean", "sd"} (n - 1) of a metric of at least two members; None where it is undefined in one."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": float(np.mean(known)), "sd": float(np.std(known, ddof=1))}


def stored_ensemble(path: Path, findings: Sequence[str]) -> tuple[list[str], np.ndarray | None]:
    """(sources, weights (K, L) of the findings, None where they are alike) of a metrics.json whose evaluation averaged
    several predictions; ([], None) of any other, and where there is no such file."""
    if not path.is_file():
        return [], None
    try:
        content = read_json(path).get("ensemble") or {}
        if content.get("method") not in ("mean", "stacked"):
            return [], None
        sources, weights = [str(source) for source in content["sources"]], content["weights"]
        if weights is None:
            return sources, None
        found = np.array([weights[name] for name in findings], float).T
        if len(found) != len(sources) or not (found >= 0).all() or not np.allclose(found.sum(axis=0), 1):
            raise ValueError("weights that do not sum to 1")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(f"{path}: found no readable ensemble ({error}), expected metrics.json as an evaluation "
                              "writes it; evaluate again to have it written") from error
    return sources, found
