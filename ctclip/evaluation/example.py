"""A simulated classifier that says "positive" 97 % of the time, to show what calibration and thresholds do to it.

No CT and no model: 18 findings at CT-RATE's rates, a score that ranks each with an AUROC of 0.75, and probabilities
that are all far too high.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctclip.data.ct_rate import PREVALENCE
from ctclip.evaluation.tables import VolumeTable, read_labels, read_predictions, write_table
from ctclip_model import ABNORMALITIES

EXAMPLE_NOTE = "Simulated predictions, neither patients nor a model: AUROC 0.75, and 97 % of all decisions positive."
DISTANCE = 0.954  # of two unit normals whose AUROC is 0.75: sqrt(2) * 0.6745
OVERCONFIDENCE = 1.79  # added to the scores, as logits: 97 % of them lie above 0


def over_predictor(n_patients: int, seed: int, prefix: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names, labels (N, 18), probabilities (N, 18)); a patient's two volumes have one label and nearly one score."""
    rng = np.random.default_rng(seed)
    shape = n_patients, len(ABNORMALITIES)
    labels = np.repeat(rng.random(shape) < list(PREVALENCE.values()), 2, axis=0).astype(np.int8)
    score = DISTANCE * labels + np.repeat(rng.normal(size=shape), 2, axis=0) + 0.05 * rng.normal(size=labels.shape)
    names = [f"{prefix}_{patient}_a_{k}.nii.gz" for patient in range(1, 1 + n_patients) for k in (1, 2)]
    return names, labels, 1 / (1 + np.exp(-(score + OVERCONFIDENCE)))


def write_example(folder: Path, n_patients: int = 1000, n_tuning: int = 300) -> list[tuple[VolumeTable, VolumeTable]]:
    """(predictions, labels) of an over-predictor on reported and on tuning patients, written under a run's names."""
    for prefix, n, seed in (("", n_patients, 0), ("tuning_", n_tuning, 1)):
        names, labels, probabilities = over_predictor(n, seed, f"simulated{prefix.rstrip('_')}")
        write_table(folder / f"{prefix}labels.csv", names, labels)
        write_table(folder / f"{prefix}predictions.csv", names, probabilities)
    return [
        (read_predictions(folder / f"{prefix}predictions.csv"), read_labels(folder / f"{prefix}labels.csv"))
        for prefix in ("", "tuning_")
    ]
