"""A run's files -> its model card, and the run on the Hugging Face hub.

    python -m ctclip.hub card results/RUN                        writes results/RUN/README.md, the card
    python -m ctclip.hub card results/RUN --push USER/NAME       uploads weights, card, thresholds, metrics; private
    python -m ctclip.hub card results/RUN --push USER/NAME --public

Every number in a card comes from run.json, log.jsonl, metrics.json or calibration.json; what they do not say is said to
be not measured. What leaves this machine of run.json and metrics.json is what `published_record` and
`published_metrics` name: no folders, no patients, no volumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from ctclip.config import CALIBRATION_FILE, SYNTHETIC_NOTE
from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration, load_calibration
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import read_history, run_record
from ctclip.evaluation.text_report import decimal, fitted_on, percent
from ctclip.fileio import replacing
from ctclip.formatting import size_text
from ctclip.hub.client import (
    AGAIN,
    TOKENS_PAGE,
    HubError,
    check_endpoint,
    endpoint,
    find_token,
    hub_host,
    is_hub_url,
    to_hub_error,
    unwrapped,
)
from ctclip.inference.predictor import load_model
from ctclip_model import ABNORMALITIES, CheckpointError, CTCLIPMultiAbnormalityModel, has_tensors_of, published_name

CARD = "README.md"
CARRIED = ("run.json", "metrics.json", CALIBRATION_FILE)  # beside the weights, for whoever downloads them
ON_THE_HUB = ("model.safetensors", "config.json", CARD, *CARRIED)
OURS = "<!-- written by ctclip_card.py, and again each time the model is saved; take this line out to keep your own -->"
MIXINS = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"  # the card of huggingface_hub itself

CT_CLIP_LICENCE = "cc-by-nc-sa-4.0"
HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", CT_CLIP_LICENCE)  # its names for them
DEMO = "ctclip_demo"
UNSAID = "not recorded"
NOT_MEASURED = "Not measured"


class CardError(UserError):
    """A card that cannot be written. One line: what was found, what was expected, what to do."""


# ---- what leaves this machine

PUBLIC = ("status", "phantom", "labels", "device", "processes", "precision", "micro_batch", "gradient_checkpointing",
          "volumes", "patients", "read_as", "versions", "history")
PUBLIC_WORDS = ("mode", "model", "head", "init_head", "use_attention", "loss_type")  # texts; numbers all are
PUBLIC_METRICS = ("at_0.5", "calibrated", "tuned", "tuned_global", "calibration", "per_label", "thresholds", "optimism",
                  "undefined_auroc", "unit", "n_rows", "n_volumes", "n_patients", "volumes_without_patient", "left_out",
                  "probabilities", "threshold_table", "intervals", "subgroups", "baseline", "phantom", "note",
                  "settings", "versions", "success_criteria")


def published_record(record: Mapping, history: list[dict] | None = None) -> dict:
    """What of a run.json may be seen by anybody: named fields only, so that a new one stays at home until it is named.

    Left out: folders (they hold user names and projects), the tuning patients and volumes that were not read (in a
    private cohort their names may be people's), texts of the configuration other than PUBLIC_WORDS. Of the weights'
    path, the name of a published file is kept. With log.jsonl's epochs: how many there were, and the best.
    """
    kept = {key: record[key] for key in PUBLIC if key in record}
    config = dict(record.get("config") or {})
    kept["config"] = {key: value for key, value in config.items()
                      if value is None or isinstance(value, (bool, int, float)) or key in PUBLIC_WORDS}
    if "ctclip_path" in config:
        kept["config"]["ctclip_path"] = None if config["ctclip_path"] is None else _known_file(config["ctclip_path"])
    left_out = record.get("left_out", 0)
    kept["left_out"] = left_out if isinstance(left_out, int) else len(left_out)
    if history:
        best = next((line for line in reversed(history) if line.get("best")), history[-1])
        kept["history"] = {"epochs": len(history), "best_epoch": best.get("epoch"),
                           "tuning_auroc_macro": best.get("tuning_auroc_macro"),
                           "seconds": sum(line.get("seconds", 0) for line in history)}
    kept["published"] = True
    return {key: kept[key] for key in (*PUBLIC, "config", "left_out", "published") if key in kept}


def _known_file(path: str) -> str:
    """Name of a weights file, if it is one of those that everybody knows; else "other"."""
    name = PureWindowsPath(str(path)).name  # takes both kinds of separator
    return "other" if published_name(path) == "other" else name


def published_metrics(metrics: Mapping) -> dict:
    """PUBLIC_METRICS of a metrics.json, without a baseline's folder and groups too small to hide a patient in."""
    metrics = {key: value for key, value in metrics.items() if key in PUBLIC_METRICS}
    if metrics.get("baseline"):
        metrics["baseline"] = metrics["baseline"] | {"source": PureWindowsPath(metrics["baseline"]["source"]).name}
    if metrics.get("subgroups"):
        metrics["subgroups"] = {attribute: [group for group in groups if not group["too_small"]]
                                for attribute, groups in metrics["subgroups"].items()}
    return metrics


# ---- the facts


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
        metrics = folder / "metrics.json"
        calibration = folder / CALIBRATION_FILE
        return cls(
            record,
            published_metrics(_json(metrics)) if metrics.is_file() else None,
            load_calibration(calibration) if calibration.is_file() else None,
        )

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


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CardError(f"{path}: found no JSON object ({error}), expected an evaluation's metrics; evaluate again") \
            from error


def unchanged(model: CTCLIPMultiAbnormalityModel, folder: Path) -> bool:
    """Whether the model's tensors are those of the folder's model.safetensors, to the bit."""
    return has_tensors_of(model, folder / "model.safetensors")


# ---- licence and origin


@dataclass(frozen=True)
class Licence:
    """`name`: the hub's, "unknown" where nothing is known; `says`: sentences."""

    name: str
    says: str


def origin(model: CTCLIPMultiAbnormalityModel, record: Mapping | None = None) -> str | None:
    """Name of the CT-CLIP file that training started from, without its ending, or "other"; of a slice backbone
    "imagenet"; None where nobody knows. Where record, config.json and file differ, the one that binds more."""
    said = [model.derived_from] if isinstance(model.derived_from, str) else []
    if not model.is_ctclip:
        return "imagenet" if said or ((record or {}).get("config") or {}).get("pretrained") else None
    config = (record or {}).get("config") or {}
    if config.get("model") == "ctclip":
        said.append(config.get("ctclip_path") or (DEMO if record.get("phantom") else "ctclip_classfine"))
    names = [published_name(path) for path in said]
    return next((name for name in names if name != DEMO), DEMO if names else None)


def licence_of(model: CTCLIPMultiAbnormalityModel, facts: Facts, cohort: str | None = None) -> Licence:
    """Of the weights: what they derive from, and the data that moved them."""
    base, says = _base_licence(model, facts)
    if base == CT_CLIP_LICENCE or base == "unknown":
        return Licence(base, says)
    if facts.phantom:
        return Licence(base, f"{says} They were trained on this project's phantoms alone, which are free of terms.")
    if cohort and "ct-rate" in cohort.lower():
        return Licence(CT_CLIP_LICENCE, f"{says} They were trained on CT-RATE, which is CC-BY-NC-SA-4.0: not for "
                                        "commercial use, to be shared under the same terms, with attribution.")
    return Licence("unknown", f"{says} They were then trained on data whose terms are {UNSAID} here and may bind you; "
                              "CT-RATE's are CC-BY-NC-SA-4.0.")


def _base_licence(model: CTCLIPMultiAbnormalityModel, facts: Facts) -> tuple[str, str]:
    if model.is_ctclip:
        started = origin(model, facts.record)
        if started is None:
            return "unknown", (f"Where these weights started from is {UNSAID}. If they derive from CT-CLIP, they are "
                               "CC-BY-NC-SA-4.0.")
        if started == DEMO:
            return "apache-2.0", "The weights derive from this project's own small demo model, Apache-2.0."
        which = f"`{started}`" if started != "other" else "a file in CT-CLIP's layout, taken to be derived from them"
        return CT_CLIP_LICENCE, (f"The weights derive from CT-CLIP's ({which}), CC-BY-NC-SA-4.0: not for commercial "
                                 "use, to be shared under the same terms, with attribution.")
    name, config = model._hub_mixin_config["backbone"], facts.record.get("config") or {}
    pretrained = origin(model, facts.record) is not None or config.get("pretrained")
    if pretrained is None:
        return "unknown", f"Whether the backbone `{name}` started from ImageNet weights is {UNSAID}."
    if not pretrained:
        return "apache-2.0", f"The backbone `{name}` (timm) started from random weights; the code is Apache-2.0."
    tag = backbone_weights(name)
    stated = tag.license if tag is not None else None
    known = f"which timm states to be {stated}" if stated else "whose licence timm does not state: unknown"
    return stated or "unknown", (f"The backbone is timm's `{name}` with ImageNet weights"
                                 f"{f' (`{tag.hf_hub_id}`)' if tag is not None and tag.hf_hub_id else ''}, {known}.")


def backbone_weights(name: str):
    """timm's entry for the pretrained weights of that name, or None."""
    import timm

    return timm.get_pretrained_cfg(name, allow_unregistered=True)


# ---- the card


def model_card(
    model: CTCLIPMultiAbnormalityModel,
    folder: str | Path | None = None,
    repo_id: str | None = None,
    cohort: str | None = None,
) -> str:
    """README.md of the model: YAML front matter and Markdown. Reads the folder's files, changes nothing.

    Args:
        folder: the run, or a copy of it from the hub; None: nothing is known of these weights.
        repo_id: where it will be, for the snippet.
        cohort: what the training cohort is called, from whoever publishes it: no file says it.

    Raises CardError or EvaluationError where a file in the folder cannot be read.
    """
    return _card(model, Facts.of(model, None if folder is None else Path(folder)), repo_id, cohort)


def _card(model: CTCLIPMultiAbnormalityModel, facts: Facts, repo_id: str | None, cohort: str | None) -> str:
    licence = licence_of(model, facts, cohort)
    try:
        sections = [
            ("", _opening(model, facts)),
            ("Intended use", _INTENDED),
            ("Input and architecture", _architecture(model)),
            ("Training data", _training(facts, cohort)),
            ("Results", _results(facts)),
            ("Thresholds and calibration", _decisions(model, facts)),
            ("How to use", _usage(model, facts, repo_id)),
            ("Licence", f"{_licence_title(licence.name)} {licence.says}\n\nThe code is Apache-2.0."),
            ("Citations", _citations(model)),
        ]
        front = _front_matter(model, facts, licence, repo_id, cohort)
    except (KeyError, TypeError) as error:
        raise CardError(f"metrics.json or run.json: found no {error}, expected what this version writes; evaluate "
                        "again") from error
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections)
    return f"---\n{front}\n---\n\n{body}\n\n{OURS}\n"


def _licence_title(name: str) -> str:
    return "Licence of the weights: **unknown**." if name == "unknown" else f"Licence of the weights: **{name}**."


def _front_matter(
    model: CTCLIPMultiAbnormalityModel, facts: Facts, licence: Licence, repo_id: str | None, cohort: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["chest-ct", "medical-imaging", "radiology", "multi-label-classification", "pytorch_model_hub_mixin",
            "model_hub_mixin", "ct-clip" if model.is_ctclip else "timm", *(["phantoms"] if facts.phantom else [])]
    fields = {"library_name": "pytorch", "pipeline_tag": "image-classification", "tags": sorted(tags)}
    if licence.name in HUB_LICENCES or licence.name == "unknown":
        fields["license"] = licence.name
    else:
        fields |= {"license": "other", "license_name": licence.name}
    if not model.is_ctclip and (facts.record.get("config") or {}).get("pretrained"):
        tag = backbone_weights(model._hub_mixin_config["backbone"])
        if tag is not None and tag.hf_hub_id:
            fields["base_model"] = tag.hf_hub_id
    if cohort and "ct-rate" in cohort.lower():
        fields["datasets"] = ["ibrahimhamamci/CT-RATE"]
    metrics = facts.metrics
    if metrics and not metrics["phantom"] and not metrics["note"]:  # of patients
        tuned, half = metrics["tuned"], metrics["at_0.5"]
        figures = [("roc_auc", "AUROC macro", half["auroc_macro"]), ("f1", "F1 macro, tuned cuts", tuned["f1_macro"]),
                   ("accuracy", "Hamming accuracy, tuned cuts", tuned["hamming_accuracy"])]
        fields["model_name"] = (repo_id or "model").rsplit("/", 1)[-1]
        fields["eval_results"] = [
            EvalResult(task_type="image-classification", task_name="Multi-label classification of chest CT",
                       dataset_type="chest-ct", dataset_name=f"{cohort or 'the training cohort'}, unseen patients",
                       metric_type=kind, metric_name=name, metric_value=round(value, 4))
            for kind, name, value in figures if value is not None
        ]
    return ModelCardData(**fields).to_yaml().strip()


def _opening(model: CTCLIPMultiAbnormalityModel, facts: Facts) -> str:
    what = f"CT-CLIP with a {model.head_name} head" if model.is_ctclip else _slice_name(model)
    lines = [f"# {what}: {len(model.labels)} findings in chest CT",
             "Gives each finding a probability from one chest CT volume. **Research use only: not a medical device, "
             "not for diagnosis.**"]
    if facts.changed:
        lines.append("**The weights were changed after they were loaded from a run. Nothing is known about these: no "
                     "metric, threshold or calibration of that run is theirs.**")
    elif facts.phantom:
        lines.append(f"**Trained on phantoms (synthetic chests). {SYNTHETIC_NOTE}**")
    return "\n\n".join(lines)


def _slice_name(model: CTCLIPMultiAbnormalityModel) -> str:
    config = model._hub_mixin_config
    return f"Slice triplets through {config['backbone']}" + (f" with {config['attention']}" * bool(config["attention"]))


_INTENDED = (
    "Research on multi-label classification of chest CT: reproducing, comparing, fine-tuning further. Not a medical "
    "device and not for diagnosis, triage or any decision about a patient. Not for anything but chest CT like that of "
    "the training cohort. CT-RATE's labels come from a text classifier over reports and hold errors; a model trained "
    "on them learns these, too. Probabilities, thresholds and calibration hold for a cohort like the tuning patients': "
    "elsewhere, evaluate and tune anew."
)


def _architecture(model: CTCLIPMultiAbnormalityModel) -> str:
    from ctclip.data.preprocessing import FIELD_OF_VIEW_MM

    depth, height, width = model.input_shape
    spacing = " x ".join(f"{FIELD_OF_VIEW_MM / n:.4g}" for n in (depth, height, width))
    backbone, head = (sum(p.numel() for p in parameters) for parameters in
                      (model.backbone_parameters(), model.head_parameters()))
    if model.is_ctclip:
        s = model.sizes
        how = (f"CT-CLIP's image tower: patches of {s.temporal_patch} x {s.patch} x {s.patch} voxels, "
               f"{s.spatial_depth} spatial and {s.temporal_depth} temporal transformer layers of width {s.dim}, a "
               f"codebook of {s.codes:,} entries, a latent of {s.latent}; head `{model.head_name}`.")
    else:
        how = (f"{_slice_name(model)} (timm): {model.n_slices} evenly spaced triplets of adjacent axial slices, "
               "features averaged, one linear layer.")
    return "\n".join([
        f"{how} {backbone:,} parameters in the backbone, {head:,} in the head.",
        "",
        f"- Input: one volume `(B, 1, {depth}, {height}, {width})` float32: a cube of {FIELD_OF_VIEW_MM:g} mm "
        f"at {spacing} mm (depth, x, y; in plane the transpose of the usual image), LPS.",
        "- Values: Hounsfield units clipped to [-1000, 1000] *before* resampling (trilinear), divided by 1000; outside "
        "the scan -1.",
        "- `preprocess_volume(path, shape=model.input_shape)` makes exactly that from a file whose header is right.",
        f"- Output: logits `(B, {len(model.labels)})`; their sigmoid is the probability as given, before calibration.",
    ])


def _training(facts: Facts, cohort: str | None) -> str:
    record = facts.record
    if facts.changed:
        return f"Started from a run's weights; what they were trained on since is {UNSAID}."
    if not record:
        return f"{UNSAID.capitalize()}: there is no run.json beside these weights."
    volumes, patients, config = record["volumes"], record["patients"], record["config"]
    if record["phantom"]:
        what = "This project's built-in cohort of synthetic chests (phantoms): no patient's data."
    else:
        what = f"Chest CT of patients: {cohort}." if cohort else f"Chest CT of patients; the cohort's name is {UNSAID}."
    lines = [what, "", "| | volumes | patients |", "|---|---|---|"]
    for name, use in (("train", "training"), ("tuning", "tuning (choice of epoch, calibration, thresholds)")):
        lines.append(f"| {use} | {volumes[name]:,} | {patients[name]:,} |")
    lines += ["", f"Split by patient. Left out (unreadable, not a chest): {record['left_out']:,} volumes."]
    if config.get("init_head") == "prompts":
        lines.append("The head started from zero-shot prompts: from the sentences that the text tower was asked.")
    lines.append(f"Loss {config.get('loss_type', UNSAID)}; seed {config.get('seed', UNSAID)}; status of the run: "
                 f"{record.get('status', UNSAID)}.")
    if version := record.get("versions", {}).get("ctclip"):
        lines.append(f"Trained with ctclip {version}.")
    if history := record.get("history"):
        auroc = history["tuning_auroc_macro"]
        lines.append(f"{history['epochs']} epochs in {history['seconds']:.0f} s on {record['device']}; the best, "
                     f"{history['best_epoch']}, has macro AUROC {decimal(auroc, 3)} on the tuning patients, who "
                     "chose it.")
    if not record["phantom"]:
        lines.append("The names of the tuning patients stay with whoever trained this model.")
    return "\n".join(lines)


def _results(facts: Facts) -> str:
    m = facts.metrics
    if m is None:
        return f"{NOT_MEASURED}: there is no evaluation of these weights on unseen patients."
    found, unit = m["intervals"], m["unit"]["name"]
    whose = "phantoms" if m["phantom"] else "patients"
    lines = [
        f"On {m['n_volumes']:,} volumes of {m['n_patients']:,} unseen {whose} (one row per {unit}), 95 % intervals "
        f"from {m['settings']['resamples']:,} bootstrap resamples of the {whose}. Thresholds and calibration: "
        f"{fitted_on(m['thresholds'])}."
    ]
    if m["note"]:
        lines += ["", f"**{m['note']}**"]
    sets = ("at_0.5", "calibrated", "tuned")
    lines += ["", "| | as given, cut at 0.5 | calibrated, cut at 0.5 | tuned cuts |", "|---|---|---|---|"]
    for title, key in (("AUROC macro (no cut)", "auroc_macro"), ("Positive rate", "positive_rate"),
                       ("Label rate", "label_rate"), ("Hamming accuracy", "hamming_accuracy"), ("F1 macro", "f1_macro"),
                       ("CRG", "crg")):
        cells = [_with_interval(m[name][key], found[name][key], key.endswith("_rate")) for name in sets]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    before, after = (m["calibration"][when] for when in ("before", "after"))
    brier = [_with_interval(m["calibration"][when]["brier"], found["calibration"][when]["brier"])
             for when in ("before", "after")]
    lines += [
        "",
        "| Mean over labels | as given | calibrated |", "|---|---|---|",
        f"| Brier score | {' | '.join(brier)} |",
        f"| Expected calibration error (no interval) | {before['ece']:.4f} | {after['ece']:.4f} |",
        f"| the same, if the probabilities were right | {before['ece_if_calibrated']:.4f} | "
        f"{after['ece_if_calibrated']:.4f} |",
        "",
        "| Label | positives | label rate | positive rate, tuned | F1, tuned | AUROC |", "|---|---|---|---|---|---|",
    ]
    for name, row in m["per_label"].items():
        auroc = _with_interval(row["auroc"], found["per_label"][name]["auroc"], digits=3)
        rates = f"{percent(row['label_rate'])} | {percent(row['positive_rate'])}"
        lines.append(f"| {name} | {row['positives']:,} | {rates} | {row['f1']:.3f} | {auroc} |")
    if m["undefined_auroc"]:
        lines += ["", f"No AUROC, one class only: {', '.join(m['undefined_auroc'])}."]
    return "\n".join(lines)


def _with_interval(value: float | None, bounds, rate: bool = False, digits: int = 4) -> str:
    if value is None:
        return "undefined"
    if rate:
        text, ends = percent(value), [f"{100 * bound:.1f}" for bound in bounds or ()]
    else:
        text, ends = f"{value:.{digits}f}", [f"{bound:.{digits}f}" for bound in bounds or ()]
    return f"{text} ({' to '.join(ends)})" if ends else f"{text} (too few cases for an interval)"


def _decisions(model: CTCLIPMultiAbnormalityModel, facts: Facts) -> str:
    calibration = facts.calibration
    if calibration is None:
        order = ", ".join(f"{number} {name}" for number, name in enumerate(model.labels))
        return (f"{NOT_MEASURED}: no calibration and no thresholds belong to these weights; 0.5 is nobody's choice.\n\n"
                f"Order of the labels: {order}.")
    unit = "" if calibration.unit == "volume" else f", fitted per {calibration.unit}"
    lines = [
        f"Calibration: {calibration.method}; thresholds for `{calibration.objective}`, one per label, and one for all: "
        f"{calibration.global_threshold:.4f}. Fitted on {calibration.n_rows:,} rows of {calibration.n_patients:,} "
        f"patients{unit}. A case is positive at or above the threshold: on the probability as given, or equally on the "
        "calibrated one. Labels in the order of the logits:",
        "", "| | Label | threshold, as given | threshold, calibrated |", "|---|---|---|---|",
    ]
    for number, (name, cut, after) in enumerate(
        zip(ABNORMALITIES, calibration.thresholds, calibration.calibrated_thresholds, strict=True)
    ):
        lines.append(f"| {number} | {name} | {_cut(cut)} | {_cut(after)} |")
    return "\n".join(lines)


def _cut(value: float) -> str:
    return "nothing is positive" if value > 1 else f"{value:.4f}"


def _usage(model: CTCLIPMultiAbnormalityModel, facts: Facts, repo_id: str | None) -> str:
    lines = [
        "import torch",
        *(["from ctclip.evaluation.calibration import load_calibration"] if facts.calibration is not None else []),
        "from ctclip.data.preprocessing import preprocess_volume",
        "from ctclip_model import CTCLIPMultiAbnormalityModel",
        "",
        f'model = CTCLIPMultiAbnormalityModel.from_pretrained("{repo_id or "USER/NAME"}")',
        'volume = preprocess_volume("scan.nii.gz", shape=model.input_shape)  # (1, D, H, W)',
        "with torch.inference_mode():",
        f"    given = model(volume[None]).sigmoid().numpy()  # (1, {len(model.labels)})",
    ]
    if facts.calibration is not None:
        lines += [
            'calibration = load_calibration(model.folder / "calibration.json")',
            "probabilities, positive = calibration.apply(given)[0], (given >= calibration.thresholds)[0]",
            "for name, probability, found in zip(model.labels, probabilities, positive):",
            "    print(f\"{name:<36} {probability:.3f} {'positive' if found else ''}\")",
        ]
    else:
        lines += ["for name, probability in zip(model.labels, given[0]):", '    print(f"{name:<36} {probability:.3f}")']
    where = "" if repo_id else " `USER/NAME` is this repository, or a folder with its files."
    code = "\n".join(lines)
    return f"With this project installed, or in its folder.{where}\n\n```python\n{code}\n```"


def _citations(model: CTCLIPMultiAbnormalityModel) -> str:
    lines = [
        "- Hamamci et al., *Developing Generalist Foundation Models from a Multimodal Dataset for 3D Computed "
        "Tomography*, [arXiv:2403.17834](https://arxiv.org/abs/2403.17834) (CT-RATE, CT-CLIP)."
    ]
    if not model.is_ctclip:
        lines.append("- Wightman, *PyTorch Image Models* (timm), "
                     "[doi:10.5281/zenodo.4414861](https://doi.org/10.5281/zenodo.4414861).")
    return "\n".join(lines)


# ---- beside the weights


def save_with_card(
    model: CTCLIPMultiAbnormalityModel, target: str | Path, repo_id: str | None = None, cohort: str | None = None
) -> None:
    """`save_pretrained` with the card and what of CARRIED belongs to these weights.

    First what spoke of other weights goes, then the weights come, then what speaks of them: a full disk leaves nothing
    beside weights that are not its own. A README.md of somebody's own stays, and one of the run's goes along. In the
    run's own folder only the card is written. Raises CardError where the folder is a run of other weights, which would
    be lost.
    """
    target, facts = Path(target), Facts.of(model, model.folder)
    model.derived_from = origin(model, facts.record)
    files, card = {}, None if facts.changed else own_card(model.folder)
    card = card or _card(model, facts, repo_id, cohort)
    own = not facts.changed and model.folder is not None and target.is_dir() and model.folder.samefile(target)
    if not own:
        if (target / "run.json").is_file() and not run_record(target).get("published"):
            raise CardError(f"{target}: found a run of other weights, whose results and record would be lost, expected "
                            "another folder; choose one")
        target.mkdir(parents=True, exist_ok=True)
        files = facts.files()
        for name in CARRIED:
            path = target / name
            if path.is_file() and path.read_bytes() != files.get(name, "").encode():
                path.unlink()
    if _text(target / CARD) != card:
        discard_card(target)
    model._save_pretrained(target)
    for name, content in files.items():
        with replacing(target / name) as path:
            path.write_text(content, encoding="utf-8", newline="\n")
    write_card(target, card)


def write_card(folder: Path, card: str) -> bool:
    """README.md in the folder, unless there is one that somebody wrote; -> whether it was written."""
    if own_card(folder) is not None:
        return False
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return True


def discard_card(folder: Path) -> None:
    """Removes a card of ours: its weights are about to be replaced."""
    if OURS in (_text(folder / CARD) or ""):
        (folder / CARD).unlink()


def own_card(folder: Path | None) -> str | None:
    """The folder's README.md where somebody wrote it, not a program."""
    text = None if folder is None else _text(folder / CARD)
    return None if text is None or OURS in text or MIXINS in text else text


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


# ---- the hub


def push_run(run: str | Path, repo_id: str, private: bool = True, cohort: str | None = None) -> str:
    """Uploads ON_THE_HUB's files of a run in one commit; -> the commit's address.

    Raises HubError (one line, the token in none) for whatever the hub or the way to it does not do. A public
    repository is not written to with `private`.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, logging, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("no user")
    except HFValidationError:
        raise HubError(f"found {repo_id!r}, expected USER/NAME as the hub has it, such as jane/ct-findings",
                         "correct it", kind="access") from None
    check_endpoint()
    if not get_token():
        make = f"make one with write access ({TOKENS_PAGE}), set HF_TOKEN to it, {AGAIN}"
        raise HubError("no Hugging Face token found", make, kind="access")
    token = find_token()
    model = load_model(run, "cpu")
    logging.set_verbosity_error()
    try:
        if private and is_public(repo_id, token):
            raise HubError(f"{repo_id} is there already, and public", "push to another name, or say --public",
                             kind="access")
        return push_with_card(model, repo_id, token, private, cohort)
    except (CardError, EvaluationError):
        raise
    except Exception as error:
        raise explain_push(error, repo_id, token) from error


def push_with_card(
    model: CTCLIPMultiAbnormalityModel, repo_id: str, token: str, private: bool, cohort: str | None = None
) -> str:
    """`save_with_card`, to the hub in one commit; -> its address.

    What is there of other weights goes. A card that somebody wrote there is replaced by one that somebody wrote in the
    run's folder, never by ours.
    """
    from huggingface_hub import HfApi

    ours = own_card(model.folder) is None or not unchanged(model, model.folder)
    keep_theirs = ours and card_on_the_hub(repo_id, token)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_with_card(model, folder, repo_id, cohort)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Model, card and thresholds",
            ignore_patterns=[CARD] if keep_theirs else None, delete_patterns=list(CARRIED),
        )
    return str(commit)


def card_on_the_hub(repo_id: str, token: str) -> str | None:
    """The repository's README.md where somebody wrote it, not a program; None also where there is none to see."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with tempfile.TemporaryDirectory() as folder:
        try:
            hf_hub_download(repo_id, CARD, token=token, local_dir=folder)
        except LocalEntryNotFoundError:  # no connection: not known
            raise
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return own_card(Path(folder))


def is_public(repo_id: str, token: str) -> bool:
    """Whether the repository exists and everybody can see it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RepositoryNotFoundError

    try:
        return not HfApi(token=token).model_info(repo_id).private
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 404:
            return False
        raise


def explain_push(error: Exception, repo_id: str, token: str) -> HubError:
    """`explain`, in the words of somebody who uploads."""
    for link in (unwrapped(error),):
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if status is None or not is_hub_url(str(getattr(response, "url", endpoint()))):
            continue
        if status == 401:
            return HubError(
                "the hub refused the token (401): mistyped, expired or revoked",
                f"make a new one with write access ({TOKENS_PAGE}), set HF_TOKEN to it, {AGAIN}", kind="access",
            )
        if status == 403:
            return HubError(
                f"the hub lets this token write nothing to {repo_id} (403): it is somebody else's, or the token may "
                "only read",
                f"name a repository of your own, or take a token with write access ({TOKENS_PAGE}), {AGAIN}",
                kind="access",
            )
        if status == 404:
            return HubError(f"{hub_host()} has no {repo_id} that this token may see (404)",
                              f"check its name and HF_ENDPOINT, {AGAIN}", kind="access")
        if status in (400, 409, 412, 422):
            said = str(getattr(link, "server_message", None) or "no reason given").replace(token, "***").splitlines()[0]
            return HubError(f"the hub did not take the files ({status}): {said[:200]}", "run this again", kind="hub")
    return to_hub_error(error, repo_id, token)


# ---- script


def run(args: argparse.Namespace) -> int:
    """`python -m ctclip.hub card`."""
    run = Path(args.run)
    try:
        if run.is_file():
            raise CardError(f"{run}: found a file, expected a run folder, whose record the card needs; name that")
        if not run.is_dir():
            raise CardError(f"{run}: found no such folder, expected a run; list results/ for its name")
        if args.push:
            print(f"Uploading {run} to {args.push} ({'public' if args.public else 'private, if it is new'})")
            print(f"Done: {push_run(run, args.push, not args.public, args.cohort)}")
            return 0
        card = model_card(load_model(run, "cpu"), run, cohort=args.cohort)
        if args.print:
            print(card, end="")
        elif write_card(run, card):
            print(f"Wrote {run / CARD}: {size_text(len(card.encode()))}")
        else:
            raise CardError(f"{run / CARD}: found a card that somebody wrote, expected none or one of ours; --print "
                            "shows the new one")
    except HubError as trouble:
        print(f"error: {str(trouble)}", file=sys.stderr)
        return 2
    except (CardError, EvaluationError, CheckpointError, OSError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0

