"""A run's files -> its model card: model_card.md filled in, with front matter that the Hugging Face hub reads.

Every number in a card comes from run.json, log.jsonl, metrics.json or calibration.json; what they do not say is said to
be not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import timm
from huggingface_hub import EvalResult, ModelCardData

from ctclip.card_file import MARK
from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.hounsfield import HU_MAX, HU_MIN
from ctclip.evaluation.render import markdown
from ctclip.evaluation.report import Paragraph, decision_table, report_sections
from ctclip.evaluation.run_folder import encoder_note
from ctclip.formatting import decimal
from ctclip.hub.client import REPOSITORY
from ctclip.hub.published import CardError, Facts
from ctclip_model import CTCLIPMultiAbnormalityModel, published_name

CT_CLIP_LICENCE = "cc-by-nc-sa-4.0"
HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", CT_CLIP_LICENCE)  # its names for them
BINDING = "CC-BY-NC-SA-4.0: not for commercial use, to be shared under the same terms, with attribution."
DEMO = "ctclip_demo"
UNSAID = "not recorded"

_TEMPLATES = jinja2.Environment(  # of Markdown: nothing is escaped
    loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_TEMPLATES.filters["thousands"] = "{:,}".format


# ---- licence and origin


class Licence(NamedTuple):
    """`name`: the hub's, "unknown" where nothing is known; `says`: sentences."""

    name: str
    says: str


def origin(model: CTCLIPMultiAbnormalityModel, record: Mapping | None = None) -> str | None:
    """Name of the CT-CLIP file that training started from, without its ending, or "other"; of a slice backbone
    "imagenet", of a video ResNet "kinetics400", or "other" for the user's own file; None where it is unknown. Where
    record, config.json and file differ, the more restrictive one wins."""
    record = record or {}
    config = record.get("config") or {}
    said = [model.derived_from] if isinstance(model.derived_from, str) else []
    if not model.is_ctclip:
        if "other" in said or config.get("backbone_weights"):
            return "other"
        return ("kinetics400" if model.is_video else "imagenet") if said or config.get("pretrained") else None
    if config.get("model") == "ctclip":
        said.append(config.get("ctclip_path") or (DEMO if record.get("phantom") else "ctclip_classfine"))
    names = [published_name(path) for path in said]
    return next((name for name in names if name != DEMO), DEMO if names else None)


def licence_of(model: CTCLIPMultiAbnormalityModel, facts: Facts, cohort: str | None = None) -> Licence:
    """Of the weights: what they derive from, and the data that moved them."""
    name, says = _base_licence(model, facts)
    if name in (CT_CLIP_LICENCE, "unknown"):
        return Licence(name, says)
    if facts.phantom:
        return Licence(name, f"{says} They were trained on this project's phantoms alone, which are free of terms.")
    if _is_ct_rate(cohort):
        return Licence(CT_CLIP_LICENCE, f"{says} They were trained on CT-RATE, which is {BINDING}")
    return Licence("unknown", f"{says} They were then trained on data whose terms are {UNSAID} here and may bind you; "
                              "CT-RATE's are CC-BY-NC-SA-4.0.")


def _is_ct_rate(cohort: str | None) -> bool:
    return "ct-rate" in (cohort or "").lower()


def _base_licence(model: CTCLIPMultiAbnormalityModel, facts: Facts) -> tuple[str, str]:
    started = origin(model, facts.record)
    if model.is_ctclip:
        if started is None:
            whence = f"Where these weights started from is {UNSAID}."
            return "unknown", f"{whence} If they derive from CT-CLIP, they are CC-BY-NC-SA-4.0."
        if started == DEMO:
            return "apache-2.0", "The weights derive from this project's own small demo model, Apache-2.0."
        which = f"`{started}`" if started != "other" else "a file in CT-CLIP's layout, taken to be derived from them"
        return CT_CLIP_LICENCE, f"The weights derive from CT-CLIP's ({which}), {BINDING}"
    name = model._hub_mixin_config["backbone"]
    library = "torchvision" if model.is_video else "timm"
    if started == "other":
        return "unknown", f"The backbone is {library}'s `{name}`, started from a weights file whose terms are {UNSAID}."
    pretrained = started is not None or (facts.record.get("config") or {}).get("pretrained")
    if pretrained is None:
        which = "Kinetics-400" if model.is_video else "ImageNet"
        return "unknown", f"Whether the backbone `{name}` started from {which} weights is {UNSAID}."
    if not pretrained:
        return "apache-2.0", f"The backbone `{name}` ({library}) started from random weights; the code is Apache-2.0."
    if model.is_video:
        which = "Kinetics-400 weights, whose licence torchvision does not state: unknown"
        return "unknown", f"The backbone is torchvision's `{name}` with {which}."
    tag = backbone_weights(name)
    stated, where = (tag.license, tag.hf_hub_id) if tag else (None, None)
    known = f"which timm states to be {stated}" if stated else "whose licence timm does not state: unknown"
    which = f" (`{where}`)" if where else ""
    return stated or "unknown", f"The backbone is timm's `{name}` with ImageNet weights{which}, {known}."


def backbone_weights(name: str) -> timm.models.PretrainedCfg | None:
    """timm's entry for the pretrained weights of that name, or None."""
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
    return card_text(model, Facts.of(model, None if folder is None else Path(folder)), repo_id, cohort)


def card_text(model: CTCLIPMultiAbnormalityModel, facts: Facts, repo_id: str | None, cohort: str | None) -> str:
    """`model_card` of facts that have been read."""
    licence = licence_of(model, facts, cohort)
    history, c = facts.record.get("history"), facts.calibration
    try:
        return _TEMPLATES.get_template("model_card.md").render(
            model=model,
            facts=facts,
            encoder_note=encoder_note(facts.record),
            licence=licence,
            repo_id=repo_id,
            cohort=cohort,
            front_matter=_front_matter(model, facts, licence, repo_id, cohort),
            results=_results(facts.metrics) if facts.metrics else None,
            decisions=markdown([decision_table(c.findings, c.thresholds, c.calibrated_thresholds)]) if c else None,
            best_auroc=decimal(history["tuning_auroc_macro"], 3) if history else None,
            backbone_parameters=sum(p.numel() for p in model.backbone_parameters()),
            head_parameters=sum(p.numel() for p in model.head_parameters()),
            field_of_view=f"{FIELD_OF_VIEW_MM:g}",
            spacing=" x ".join(f"{FIELD_OF_VIEW_MM / n:.4g}" for n in model.input_shape),
            hu_window=(HU_MIN, HU_MAX),
            synthetic_note=SYNTHETIC_NOTE,
            unsaid=UNSAID,
            mark=MARK,
        )
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        raise CardError(f"metrics.json or run.json: found no {error}, expected what this version writes; evaluate "
                        "again") from error


def _front_matter(
    model: CTCLIPMultiAbnormalityModel, facts: Facts, licence: Licence, repo_id: str | None, cohort: str | None
) -> str:
    tags = ["chest-ct", "medical-imaging", "radiology", "multi-label-classification", "pytorch_model_hub_mixin",
            "model_hub_mixin", "ct-clip" if model.is_ctclip else "torchvision" if model.is_video else "timm",
            *(["phantoms"] if facts.phantom else [])]
    fields: dict[str, Any] = {"library_name": "pytorch", "pipeline_tag": "image-classification", "tags": sorted(tags)}
    if licence.name in HUB_LICENCES or licence.name == "unknown":
        fields["license"] = licence.name
    else:
        fields |= {"license": "other", "license_name": licence.name}
    if origin(model, facts.record) == "imagenet" and (facts.record.get("config") or {}).get("pretrained"):
        tag = backbone_weights(model._hub_mixin_config["backbone"])
        if tag is not None and tag.hf_hub_id:
            fields["base_model"] = tag.hf_hub_id
    if _is_ct_rate(cohort):
        fields["datasets"] = [REPOSITORY]
    metrics = facts.metrics
    if metrics and not metrics["phantom"] and not metrics["note"]:  # of patients
        tuned, half = metrics["tuned"], metrics["at_0.5"]
        figures = [("roc_auc", "AUROC macro", half["auroc_macro"]),
                   ("f1", "F1 macro, tuned thresholds", tuned["f1_macro"]),
                   ("accuracy", "Hamming accuracy, tuned thresholds", tuned["hamming_accuracy"])]
        fields["model_name"] = (repo_id or "model").rsplit("/", 1)[-1]
        fields["eval_results"] = [
            EvalResult(task_type="image-classification", task_name="Multi-label classification of chest CT",
                       dataset_type="chest-ct", dataset_name=f"{cohort or 'the training cohort'}, unseen patients",
                       metric_type=kind, metric_name=name, metric_value=round(value, 4))
            for kind, name, value in figures if value is not None
        ]
    return ModelCardData(**fields).to_yaml().strip()


def _results(metrics: Mapping) -> str:
    """The note, and the report's sections that a card takes."""
    sections = report_sections(metrics)
    chosen = [sections[key] for key in ("comparison", "per_label", "clinical", "calibration") if key in sections]
    note = [markdown([Paragraph(metrics["note"], warning=True)])] if metrics["note"] else []
    return "\n\n".join([*note, *(f"### {part.title}\n\n{markdown(part.blocks)}" for part in chosen)])
