"""Predictions as one JSON document for other systems: NAME.answers.json, described in docs/predict.md and, for
machines, in docs/answers.schema.json. The challenge's results.json is another file (ResultsFile)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ctclip
from ctclip.data.loading import NOTE_SEPARATOR
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.saved_ensemble import WEIGHTS_FILE, answer_digests, saved_ensemble
from ctclip.fileio import check_replaceable, replacing
from ctclip.inference.decisions import Decision, summary
from ctclip.inference.predictions import Predictions, check_place

FORMAT, VERSION = "ctclip-answers", 1  # VERSION rises where a reader of the one before would be wrong
USE = "Research use only; not a medical device."
LICENCE = ("CT-CLIP's weights, and models trained from them, are CC-BY-NC-SA-4.0: not for commercial use; the run's "
           "model card says what holds for it.")  # fmt: skip
AT_THRESHOLD = ("Sensitivity and specificity are those on the tuning patients, who chose the thresholds: on others "
                "they are a little lower. Intervals are Wilson's, 95 %.")  # fmt: skip


def is_answers(path: Path) -> bool:
    """Whether a file is called answers.json, or so that it ends in .answers.json."""
    return path.name == "answers.json" or path.name.endswith(".answers.json")


def check_answers_output(path: Path) -> None:
    """As `check_output` of a table, before anything is computed."""
    check_place(path)
    check_replaceable(path, _is_ours, "name another output, or remove it")


def _is_ours(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"format":"{FORMAT}"' in "".join(file.read(200).split())


def write_answers(path: Path, predictions: Predictions, checkpoint: Path) -> None:
    content = answers_content(predictions, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def answers_content(predictions: Predictions, checkpoint: Path) -> dict[str, Any]:
    """What the file holds. No folder of this machine: names of scans are those of the table."""
    series = {scan.name: scan.series or None for scan in predictions.scans}
    findings = list(predictions.table.columns)
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "software": {"name": "ctclip", "version": ctclip.__version__},
        "use": USE,
        "licence": LICENCE,
        "note": predictions.note,
        "model": _model_content(checkpoint),
        "scale": predictions.scale,
        "calibration": _calibration_content(predictions.calibration),
        "at_threshold": AT_THRESHOLD,
        "findings": _findings_content(findings, next(iter(predictions.decisions.values()), ())),
        "scans": [
            {
                "name": name,
                "series_instance_uid": series[name],
                "summary": summary(decisions) or None,
                "warnings": [note for note in predictions.warnings.get(name, "").split(NOTE_SEPARATOR) if note],
                "answers": [{"finding": each.finding, "probability": each.probability, "threshold": each.threshold,
                             "call": each.positive} for each in decisions],
            }
            for name, decisions in predictions.decisions.items()
        ],
        "failures": [{"name": name if name in series else Path(name).name, "reason": reason}
                     for name, reason in predictions.failures],
    }  # fmt: skip


def _model_content(checkpoint: Path) -> dict[str, Any]:
    """The run's or the file's name, and SHA-256 of its weights; of an ensemble those of its partners."""
    name, digests = checkpoint.resolve().name, answer_digests(checkpoint)
    if (ensemble := saved_ensemble(checkpoint)) is not None:
        partners = [
            {"name": partner.name, "weights_sha256": each[WEIGHTS_FILE]}
            for partner, each in zip(ensemble.partners, digests["partners"], strict=True)
        ]
        return {"name": name, "weights_sha256": None, "partners": partners}
    return {"name": name, "weights_sha256": digests[WEIGHTS_FILE], "partners": []}


def _calibration_content(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "method": calibration.method,
        "objective": calibration.objective,
        "prevalence": None if calibration.prevalence is None else dict(calibration.prevalence),
        "tuning_volumes": calibration.n_rows,
        "tuning_patients": calibration.n_patients,
    }


def _findings_content(findings: Sequence[str], decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """What is the same in all scans: the threshold on the scale of the probabilities, and how it divided the tuning
    patients."""
    by_name = {each.finding: each for each in decisions}
    content = []
    for name in findings:
        decision = by_name.get(name)
        point = decision.point if decision else None
        at = point.content() if point else {"sensitivity": None, "specificity": None}
        content.append({"name": name, "threshold": decision.threshold if decision else None} | at)
    return content
