"""What of a run may be published, by name: no folders, no patients, no volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import timm

from ctclip.config import CALIBRATION_FILE
from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration, load_calibration
from ctclip.evaluation.run_folder import read_history, run_record
from ctclip.fileio import read_json
from ctclip_model import (
    HUB_SOURCES,
    VIDEO_MODELS,
    CTCLIPMultiAbnormalityModel,
    check_written,
    has_tensors_of,
    published_name,
)


class CardError(UserError):
    """A card that cannot be written. One line: what was found, what was expected, what to do."""


PUBLIC = ("status", "phantom", "phantom_encoder", "labels", "device", "processes", "precision", "micro_batch",
          "gradient_checkpointing", "volumes", "patients", "read_as", "versions", "average", "history")
PUBLIC_WORDS = ("mode", "model", "head", "tokens", "init_head", "use_attention", "windows", "adapt", "lora_targets",
                "loss_type")  # texts; numbers all are
PUBLIC_METRICS = ("at_0.5", "calibrated", "tuned", "tuned_global", "calibration", "per_label", "thresholds",
                  "optimism", "undefined_auroc", "rarely_called", "unit", "n_rows", "n_volumes", "n_patients",
                  "volumes_without_patient", "left_out", "unknown_labels", "probabilities", "scale", "threshold_table",
                  "intervals", "subgroups", "baseline", "phantom", "note", "settings", "versions", "success_criteria",
                  "clinical", "encoder_note", "reference_standard")


def published_record(record: Mapping, history: list[dict] | None = None) -> dict:
    """What of a run.json may be seen by anybody: named fields only, so that a new one stays private until it is named.

    Not in it: folders (they hold user names and projects), the tuning patients and volumes that were not read (in a
    private cohort their names may be people's), texts of the configuration other than PUBLIC_WORDS. Of the weights'
    path, the name of a published file is kept. With log.jsonl's epochs: how many there were, and the best.
    """
    kept = {key: record[key] for key in PUBLIC if key in record}
    config = dict(record.get("config") or {})
    kept["config"] = {key: value for key, value in config.items()
                      if value is None or isinstance(value, (bool, int, float)) or key in PUBLIC_WORDS}
    if path := config.get("ctclip_path"):  # takes both kinds of separator
        kept["config"]["ctclip_path"] = "other" if published_name(path) == "other" else PureWindowsPath(str(path)).name
    if config.get("backbone_weights"):
        kept["config"]["backbone_weights"] = "other"
    model = str(config.get("model", "ctclip"))
    named = model in ("ctclip", *VIDEO_MODELS) or model.startswith(HUB_SOURCES) or timm.is_model(model.split(".")[0])
    if not named:  # a folder
        kept["config"]["model"] = "other"
    left_out = record.get("left_out", 0)
    kept["left_out"] = left_out if isinstance(left_out, int) else len(left_out)
    if history:
        best = next((line for line in reversed(history) if line.get("best")), history[-1])
        kept["history"] = {"epochs": len(history), "best_epoch": best.get("epoch"),
                           "tuning_auroc_macro": best.get("tuning_auroc_macro"),
                           "seconds": sum(line.get("seconds") or 0 for line in history)}
    kept["published"] = True
    return {key: kept[key] for key in (*PUBLIC, "config", "left_out", "published") if key in kept}


def published_metrics(metrics: Mapping) -> dict:
    """PUBLIC_METRICS of a metrics.json, without a baseline's folder and groups too small to hide a patient in."""
    metrics = {key: value for key, value in metrics.items() if key in PUBLIC_METRICS}
    if metrics.get("baseline"):
        metrics["baseline"] = metrics["baseline"] | {"source": PureWindowsPath(metrics["baseline"]["source"]).name}
    if metrics.get("subgroups"):
        metrics["subgroups"] = {attribute: [group for group in groups if not group["too_small"]]
                                for attribute, groups in metrics["subgroups"].items()}
    return metrics


@dataclass(frozen=True)
class Facts:
    """What is known of a model; all from files. `changed`: its weights are no longer those of the folder, so that only
    the origin of the record still holds."""

    record: Mapping = field(default_factory=dict)
    metrics: Mapping | None = None
    calibration: Calibration | None = None
    changed: bool = False

    @classmethod
    def of(cls, model: CTCLIPMultiAbnormalityModel, folder: Path | None) -> Facts:
        if folder is None or not (folder / "model.safetensors").is_file():  # it may have gone meanwhile
            return cls()
        record = run_record(folder)
        record = published_record(record, read_history(folder / "log.jsonl")) if record else {}
        if not unchanged(model, folder):
            return cls(record, changed=True)
        path, metrics, calibration = folder / "metrics.json", None, folder / CALIBRATION_FILE
        check_written(path)
        try:
            metrics = published_metrics(read_json(path)) if path.is_file() else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            found = f"{path}: found no JSON object ({error}), expected an evaluation's metrics"
            raise CardError(f"{found}; evaluate again") from error
        return cls(record, metrics, load_calibration(calibration) if calibration.is_file() else None)

    def files(self) -> dict[str, str]:
        """Name -> content of what goes with the weights."""
        if self.changed:
            return {}
        contents = {"run.json": self.record or None, "metrics.json": self.metrics,
                    CALIBRATION_FILE: self.calibration and self.calibration.content()}
        return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items() if content}

    @property
    def phantom(self) -> bool | None:
        """Whether the training cohort is known to be phantoms; None where that is unknown."""
        return None if self.changed or "phantom" not in self.record else bool(self.record["phantom"])


def unchanged(model: CTCLIPMultiAbnormalityModel, folder: Path) -> bool:
    """Whether the model's tensors are those of the folder's model.safetensors, to the bit."""
    return has_tensors_of(model, folder / "model.safetensors")
