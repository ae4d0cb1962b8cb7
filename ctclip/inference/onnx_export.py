"""A model -> one ONNX graph, encoder and head: volume (B, 1, D, H, W) float32 -> logits (B, 18), any batch size.

    from ctclip.inference.onnx_export import export_onnx, export_run

CT-CLIP variants also give `code_ids` (B, T, h, w), and `latents` (B, L) where the head takes them: with the attention
head they would cost the projection, 0.6 GB of a file of 0.7 GB. What an answer means travels in the file's metadata:
labels, the input's contract and, from a run with a calibration, thresholds and the calibration itself.

Needs onnx and onnxscript; with onnxruntime the file is compared with the model before it gets its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.hounsfield import HU_MAX, HU_MIN
from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.run_folder import run_calibration
from ctclip.fileio import check_replaceable, check_writable, replacing
from ctclip.formatting import size_text
from ctclip.inference.predictor import load_model
from ctclip.phantoms.reference import fixed_phantom
from ctclip_model import CTCLIPMultiAbnormalityModel

NEEDED = ("onnx", "onnxscript")
OLDEST_TORCH = (2, 8)  # the first whose exporter takes these models; all else runs with requirements.txt's
LOGIT_TOLERANCE = 1e-3  # of a logit: a thousandth moves no probability by more than 0.00025
TIE = 1e-4  # cosines nearer than this may be told apart either way: what float32 in another order amounts to
OPSET = 18
PRODUCER = "ctclip.inference.onnx_export"  # at the beginning of every file that is written


class ExportError(UserError):
    """A model that could not be exported. One line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Parity:
    """The file against the model. `difference`: the largest of a logit; `same_codes`: share of equal code ids, None for
    a slice variant; `flips`: codes that differ, every one a near tie, which explains a difference above
    LOGIT_TOLERANCE."""

    volumes: int
    difference: float
    same_codes: float | None
    flips: int
    torch_seconds: float  # per volume
    onnx_seconds: float


@dataclass(frozen=True)
class Export:
    path: Path
    input_shape: tuple[int, int, int]
    outputs: tuple[str, ...]
    calibrated: bool  # thresholds and calibration are in the file's metadata
    seconds: float
    parity: Parity | None  # None: onnxruntime is not there, nothing was checked


class _Graph(nn.Module):
    """`model` on a whole volume, every output a function of the code ids that are given."""

    def __init__(self, model: CTCLIPMultiAbnormalityModel):
        super().__init__()
        self.model = model

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.model.cache_format != "codes":
            return ("logits",)
        return ("logits", "code_ids") if self.model.head_name == "attention" else ("logits", "code_ids", "latents")

    def forward(self, volume: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        if model.cache_format != "codes":
            return (model.head(model.features(volume)),)
        tokens, quantizer = model.visual_transformer(volume), model.visual_transformer.vq
        # The quantiser chooses its method by the number of tokens, so by the batch: here, one depth at a time.
        codes = F.normalize(model.codebook, dim=-1).T
        ids = torch.stack([(F.normalize(part, dim=-1) @ codes).argmax(-1) for part in tokens.unbind(1)], dim=1)
        if model.head_name == "attention":
            return model.head(ids), ids
        latents = model.project(quantizer.lookup(ids))
        return model.head(latents), ids, latents


def export_onnx(model: CTCLIPMultiAbnormalityModel, path: str | Path, calibration: Calibration | None = None) -> Export:
    """Writes `model` to `path`, whole or not at all, and compares the two where onnxruntime is installed.

    `calibration`: of the run, for the metadata; the graph's logits are the model's own, not calibrated.

    Raises ExportError: `path` does not end in .onnx, a package is missing or too old, the exporter fails, or the file's
    logits differ from the model's by more than LOGIT_TOLERANCE while no flip between nearly equal codes explains it.
    Then no file is left.
    """
    path, started = Path(path), time.perf_counter()
    check_export(path)
    training, graph = model.training, _Graph(model.eval())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            _write(graph, temporary, _metadata(model, calibration))
            parity = _compare(graph, temporary)
    finally:
        model.train(training)
    seconds = time.perf_counter() - started
    return Export(path, model.input_shape, graph.outputs, calibration is not None, seconds, parity)


def check_export(path: Path) -> None:
    """Raises UserError, before a model is loaded, for a place that cannot be written, a name that is none of an ONNX
    file, and packages that are missing or too old."""
    check_onnx_path(path)
    check_writable(path.parent, "name another --output")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"found no {' and no '.join(missing)}, which exporting needs; pip install {' '.join(NEEDED)} onnxruntime "
            "(the last to have the file checked)"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        newer = ".".join(map(str, OLDEST_TORCH))
        raise ExportError(f"found torch {torch.__version__}, expected {newer} or newer to export; update torch")


def check_onnx_path(path: Path) -> None:
    """Raises ExportError for a folder, and for any ending but .onnx: the file there could be a run's weights. Raises
    UserError for a file there that was not exported."""
    if path.is_dir():
        raise ExportError(f"{path}: found a folder, expected a file to write, such as {path / 'model.onnx'}")
    if path.suffix.lower() != ".onnx":
        found = f"the ending '{path.suffix}'" if path.suffix else "no ending"
        raise ExportError(f"{path}: found {found}, expected a file that ends in .onnx; say {path.with_suffix('.onnx')}")
    check_replaceable(path, _is_exported, "name another --output, or remove it")


def _is_exported(path: Path) -> bool:
    with path.open("rb") as file:
        return PRODUCER.encode() in file.read(256)


def export_run(checkpoint: str | Path, output: str | Path, device: str | None = None) -> Export:
    """A run folder, or a CT-CLIP file with a head, to ONNX. Raises what load_model raises, too."""
    checkpoint = Path(checkpoint)
    check_export(Path(output))
    model = load_model(checkpoint, device or "cpu")
    return export_onnx(model, output, run_calibration(checkpoint) if checkpoint.is_dir() else None)


def export_lines(export: Export, checkpoint: str | Path) -> list[str]:
    """Lines to print."""
    size, shape = size_text(export.path.stat().st_size), ", ".join(map(str, export.input_shape))
    too = ", thresholds and calibration too" if export.calibrated else ""
    lines = [
        f"Wrote {export.path}: {size}, {export.seconds:.0f} s; model {checkpoint}",
        f"  volume (batch, 1, {shape}) float32 -> {', '.join(export.outputs)}; labels and input contract are in the "
        f"file's metadata{too}",
    ]
    if not export.calibrated:
        lines.append("  no tuning patients: no thresholds in the file; sigmoid of the logits is not calibrated")
    parity = export.parity
    if parity is None:
        return [*lines, "  not checked against the model: onnxruntime is not installed (pip install onnxruntime)"]
    codes = "" if parity.same_codes is None else f", {100 * parity.same_codes:.3f} % of the code ids equal"
    flips = f"; {parity.flips} near ties between codes went the other way" if parity.flips else ""
    return [
        *lines,
        f"  checked with onnxruntime on {parity.volumes} volumes: logits differ by {parity.difference:.1e} at most"
        f"{codes}{flips}; {parity.onnx_seconds:.2f} s a volume, torch {parity.torch_seconds:.2f} s",
    ]


# ---- the graph


def _write(graph: _Graph, path: Path, metadata: dict[str, str]) -> None:
    model = graph.model
    example = torch.zeros(2, 1, *model.input_shape, device=next(model.parameters()).device)  # 1 would fix the batch
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                graph, (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["volume"], output_names=list(graph.outputs),
                dynamic_shapes={"volume": {0: torch.export.Dim("batch")}},
            )
            _strip_exporter_notes(program.model)
            program.model.metadata_props.update(metadata)
            program.model.producer_name = PRODUCER
            program.save(str(path), external_data=False)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the exporter's own classes differ between versions of torch
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
        raise ExportError(
            f"torch {torch.__version__} could not export this model ({type(error).__name__}: {reason}); the versions "
            "in requirements.txt are those that it was tried with: run python ctclip_setup.py --dev"
        ) from error


def _strip_exporter_notes(graph_model: Any) -> None:
    """Removes the exporter's notes from an onnx_ir model: stack traces, which name folders of this machine."""
    functions = graph_model.functions.values()
    graph_model.metadata_props.clear()
    for graph in (graph_model.graph, *functions):
        values = [*graph.inputs, *graph.outputs, *getattr(graph, "initializers", {}).values()]
        nodes = list(graph.all_nodes())
        for part in (graph, *nodes, *values, *(value for node in nodes for value in node.outputs)):
            part.metadata_props.clear()
            part.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's prints, warnings and log messages."""
    level, sink = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _metadata(model: CTCLIPMultiAbnormalityModel, calibration: Calibration | None) -> dict[str, str]:
    """Name -> JSON, but for plain sentences."""
    metadata = {
        "labels": json.dumps(model.labels),
        "input": json.dumps({
            "name": "volume",
            "shape": ["batch", 1, *model.input_shape],
            "axes": "batch, channel, depth (upwards), x, y: in plane the transpose of the usual image; LPS",
            "values": f"HU clipped to [{HU_MIN}, {HU_MAX}], then / {HU_MAX}; padding -1",
            "extent_mm": FIELD_OF_VIEW_MM,
            "made_by": f"ctclip.data.preprocessing.preprocess_volume(path, shape={model.input_shape})",
        }),
        "output": f"logits (batch, {len(model.labels)}): their sigmoid is the uncalibrated probability",
        "model": json.dumps({key: value for key, value in model._hub_mixin_config.items() if key != "labels"}),
        "use": "research only; not a medical device, not for diagnosis",
    }
    if calibration is not None:
        calibration = calibration.select(model.labels)
        for name, values in (("", calibration.thresholds), ("_calibrated", calibration.calibrated_thresholds)):
            metadata[f"thresholds{name}"] = json.dumps(dict(zip(model.labels, values.tolist(), strict=True)))
        metadata["calibration"] = json.dumps(calibration.content())
    return metadata


# ---- the file against the model


def check_volumes(shape: tuple[int, int, int]) -> list[Tensor]:
    """The fixed phantom (1, 1, D, H, W), then two volumes at once: it mirrored with noise, and noise alone."""
    chest = fixed_phantom(shape)
    noise = torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [chest, torch.cat([(chest.flip(4) + 0.1 * noise).clamp(-1, 1), noise])]


def _compare(graph: _Graph, path: Path) -> Parity | None:
    """None without onnxruntime. Raises ExportError where the two differ by more than rounding explains."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model, outputs, volumes = graph.model, list(graph.outputs), check_volumes(graph.model.input_shape)
    largest, flips, codes, torch_seconds, onnx_seconds = 0.0, 0, 0, 0.0, 0.0
    for batch in volumes:
        start = time.perf_counter()
        own = _expected(model, batch)
        middle = time.perf_counter()
        found = session.run(outputs, {"volume": batch.numpy()})
        torch_seconds, onnx_seconds = torch_seconds + middle - start, onnx_seconds + time.perf_counter() - middle
        answer = dict(zip(outputs, map(torch.from_numpy, found), strict=True))
        if not bool(torch.isfinite(answer["logits"]).all()):
            raise ExportError("the exported file gives logits that are not finite; no file was kept: report this")
        difference = float((answer["logits"] - own["logits"]).abs().max())
        flipped = int((answer["code_ids"] != own["code_ids"]).sum()) if "code_ids" in own else 0
        codes += own["code_ids"].numel() if "code_ids" in own else 0
        largest, flips = max(largest, difference), flips + flipped
        if difference > LOGIT_TOLERANCE and not (flipped and _explained(model, own, answer)):
            unexplained = f" ({flipped} code ids differ, which does not explain it)" if flipped else ""
            raise ExportError(
                f"the exported file's logits differ from the model's by {difference:.2g}, expected at most "
                f"{LOGIT_TOLERANCE:g}{unexplained}; no file was kept: export with the torch and onnx versions in "
                "requirements.txt"
            )
    count = sum(map(len, volumes))
    same_codes = 1 - flips / codes if codes else None
    return Parity(count, largest, same_codes, flips, torch_seconds / count, onnx_seconds / count)


@torch.inference_mode()
def _expected(model: CTCLIPMultiAbnormalityModel, batch: Tensor) -> dict[str, Tensor]:
    """The model's logits, one volume at a time, as `forward` gives them; for CT-CLIP from the codes, kept as well."""
    rows = []
    for volume in batch.to(next(model.parameters()).device).split(1):
        if model.cache_format == "codes":
            tokens = model.visual_transformer(volume)
            ids = model.visual_transformer.vq.code_ids(tokens)
            row = {"tokens": tokens, "code_ids": ids, "logits": model.head(model.features_from_cache(ids))}
        else:
            row = {"logits": model(volume)}
        rows.append({name: value.cpu() for name, value in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.inference_mode()
def _explained(model: CTCLIPMultiAbnormalityModel, own: dict[str, Tensor], answer: dict[str, Tensor]) -> bool:
    """Whether codes that differ are near ties, and the file's logits are those that the model gives to its codes."""
    device = model.codebook.device
    differ = answer["code_ids"] != own["code_ids"]
    tokens = F.normalize(own["tokens"][differ].to(device), dim=-1)
    rows = F.normalize(model.codebook, dim=-1)
    ours, theirs = ((tokens * rows[codes["code_ids"][differ].to(device)]).sum(-1) for codes in (own, answer))
    if float((ours - theirs).abs().max()) > TIE:
        return False
    logits = model.head(model.features_from_cache(answer["code_ids"].to(device))).cpu()
    return float((logits - answer["logits"]).abs().max()) <= LOGIT_TOLERANCE
