"""`--label-map`: labels of another data set, and a model's predictions, brought to findings that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.data.tables import NAME_COLUMN, CohortError, is_known_column, some
from ctclip.errors import UserError
from ctclip.fileio import read_json
from ctclip_model import UNKNOWN

SHIPPED = Path(__file__).with_name("label_maps")  # NAME.json
KEYS = {"source", "name_column", "findings"}
FORM = ('{"source": "...", "name_column": "...", "findings": {"Lung nodule": {"labels": ["nodule_*"], "predictions": '
        '["Lung nodule"]}}}')


@dataclass(frozen=True)
class LabelMap:
    """Of each finding, `labels`: the columns of the label table that make it, names or shell patterns; `predictions`:
    the findings of a model that make it. `name_column` holds the volumes' names in the label table."""

    name: str
    source: str
    name_column: str
    labels: dict[str, tuple[str, ...]]
    predictions: dict[str, tuple[str, ...]]

    def chosen(self, findings: Sequence[str] | None, error: type[UserError]) -> list[str]:
        """The findings that are asked for, by default all. Raises `error` for one that the map lacks."""
        if missing := [name for name in findings or () if name not in self.labels]:
            raise error(f"found no {some(missing)} in the label map {self.name}, expected some of "
                        f"{', '.join(self.labels)}; correct --findings")
        return list(findings or self.labels)

    def label_columns(
        self, header: Sequence[str], findings: Sequence[str], path: str | Path, error: type[UserError]
    ) -> list[list[str]]:
        """The columns of a header that make each finding. Raises `error` for a name or pattern that finds none."""
        groups = []
        for finding in findings:
            found = {entry: [column for column in header if column == entry or fnmatchcase(column, entry)]
                     for entry in self.labels[finding]}
            if missing := [entry for entry, columns in found.items() if not columns]:
                raise error(f"{path}: found no column {some(missing)} for {finding}, expected those that the label map "
                            f"{self.name} names; check that the table is of its data set")
            groups.append(list(dict.fromkeys(column for columns in found.values() for column in columns)))
        return groups

    def content(self, findings: Sequence[str]) -> dict[str, Any]:
        """For metrics.json: where the map is from, and how these findings are made."""
        return {"name": self.name, "source": self.source, "findings": {
            name: {"labels": list(self.labels[name]), "predictions": list(self.predictions[name])}
            for name in findings}}


def any_label(labels: np.ndarray) -> np.ndarray:
    """(N, K) labels, 0, 1 or UNKNOWN -> (N,) int8: 1 where any is 1, 0 where all are 0, else UNKNOWN."""
    return np.select([(labels == 1).any(axis=1), (labels == 0).all(axis=1)], [1, 0], UNKNOWN).astype(np.int8)


def read_label_map(text: str) -> LabelMap:
    """A map of this package by its name, or one in a JSON file (FORM). Raises CohortError where it is neither."""
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    path = SHIPPED / f"{text}.json" if text in shipped else Path(text)
    try:
        return _checked(text, read_json(path))
    except (OSError, ValueError) as fault:
        found = f"no readable file ({fault.strerror})" if isinstance(fault, OSError) else f"no label map ({fault})"
        raise CohortError(f"--label-map {text}: found {found}, expected {' or '.join(shipped)} or a JSON file like "
                          f"{FORM}; correct it") from fault


def _checked(name: str, content: Any) -> LabelMap:
    """Raises ValueError, in a few words, where content read from a file is no label map."""
    if not isinstance(content, dict) or not isinstance(content.get("findings"), dict) or not content["findings"]:
        raise ValueError("it names no findings")
    if other := [key for key in content if key not in KEYS]:
        raise ValueError(f"unknown key {other[0]!r}")
    source, column = content.get("source", ""), content.get("name_column", NAME_COLUMN)
    if not isinstance(source, str) or not isinstance(column, str) or not column.strip():
        raise ValueError("source or name_column is no text")
    labels, predictions = {}, {}
    for finding, entry in content["findings"].items():
        if is_known_column(finding):
            raise ValueError(f"{finding!r} cannot be a finding")
        if not isinstance(entry, dict) or "labels" not in entry or entry.keys() - {"labels", "predictions"}:
            raise ValueError(f"{finding!r} has not labels, and predictions where they are named otherwise")
        labels[finding] = _names(finding, entry["labels"])
        predictions[finding] = _names(finding, entry.get("predictions", [finding]))
    return LabelMap(name, source, column.strip(), labels, predictions)


def _names(finding: str, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"labels or predictions of {finding!r} are no list of names")
    return tuple(names)
