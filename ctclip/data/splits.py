"""Hold-out by patient, with label rates kept alike on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctclip.data.cohort import Volume
from ctclip.data.tables import CohortError
from ctclip.formatting import plural


def split_by_patient(volumes: Sequence[Volume], fraction: float, seed: int) -> tuple[list[Volume], list[Volume]]:
    """(rest, held out): about `fraction` of the patients held out, label rates kept alike on both sides.

    Same volumes and seed, same split. Raises CohortError with fewer than two patients.
    """
    groups: dict[str, list[Volume]] = {}
    for volume in volumes:
        groups.setdefault(volume.patient, []).append(volume)
    if len(groups) < 2 or not 0 < fraction < 1:
        found = f"{plural(len(groups), 'patient')} and fraction {fraction}"
        raise CohortError(f"found {found}, expected at least 2 patients and a fraction in (0, 1); change either")
    patients = sorted(groups)
    # Per patient: positives per label, volumes, and 1, each scaled so that all of them weigh alike.
    rows = np.array([[*np.sum([v.labels for v in groups[p]], axis=0), len(groups[p]), 1] for p in patients])
    rows = rows / np.sqrt(np.maximum((rows**2).sum(axis=0), 1))
    count = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    generator = np.random.default_rng(seed)
    tries = [_assign(rows, count, generator.permutation(len(patients))) for _ in range(max(1, 2000 // len(patients)))]
    _, chosen = min(tries, key=lambda imbalance_and_rows: imbalance_and_rows[0])
    held_out = {patients[i] for i in chosen}
    return [v for v in volumes if v.patient not in held_out], [v for v in volumes if v.patient in held_out]


def _assign(rows: np.ndarray, count: int, order: np.ndarray) -> tuple[float, list[int]]:
    """(imbalance, `count` rows held out): rows are assigned in the order given, each to the side that keeps every
    column closest to its share."""
    share, balance = count / len(rows), np.zeros(rows.shape[1])
    held_out: list[int] = []
    for place, i in enumerate(order):
        if_held, if_not = balance + (1 - share) * rows[i], balance - share * rows[i]
        remaining, missing = len(order) - place, count - len(held_out)
        hold = missing == remaining or (missing > 0 and if_held @ if_held < if_not @ if_not)
        balance = if_held if hold else if_not
        if hold:
            held_out.append(int(i))
    return float(balance @ balance), held_out
