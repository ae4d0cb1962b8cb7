"""ONNX files against the models they come from: logits and code ids through onnxruntime, metadata, refusals.

Reference: the model's own `forward`. Skipped where onnx, onnxscript or onnxruntime is absent; what is said then is
tested all the same.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_model import OTHER_SIZES
from torch import nn

from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.errors import UserError
from ctclip.evaluation.calibration import fit_calibration
from ctclip.inference import onnx_export
from ctclip.inference.onnx_export import ExportError, check_volumes, export_lines, export_onnx, export_run
from ctclip.phantoms.reference import fixed_phantom
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel, asdict

SUITE = Path(__file__).resolve().parents[2]
cached_phantom = functools.cache(fixed_phantom)


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    monkeypatch.setattr(onnx_export, "fixed_phantom", cached_phantom)


@pytest.fixture
def onnx_is_here():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    pytest.importorskip("torch", minversion=".".join(map(str, onnx_export.OLDEST_TORCH)))


def ctclip(head="linear", **arguments):
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(None, sizes=asdict(OTHER_SIZES), head=head, **arguments)
    for parameter in model.head_parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def run(path, volume):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"volume": volume.numpy()}), strict=True)), session


def calibration():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 18)) < 0.3).astype(int)
    probabilities = np.clip(0.3 * labels + 0.5 * rng.random((60, 18)), 0, 1)
    return fit_calibration(labels, probabilities, [f"p{i}" for i in range(60)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, its calibration, its export): with the linear head."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model, fitted = ctclip(), calibration()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "fixed_phantom", cached_phantom)
        return model, fitted, export_onnx(model, tmp_path_factory.mktemp("exported") / "model.onnx", fitted)


@pytest.fixture
def copied(exported, monkeypatch):
    """In place of an export of the linear head, the file that one has written."""
    monkeypatch.setattr(onnx_export, "_write", lambda graph, path, metadata: shutil.copy(exported[2].path, path))


@pytest.mark.parametrize("head", ["linear", "mlp", "attention", "prompts"])
def test_every_head_answers_alike_for_any_batch(onnx_is_here, tmp_path, head, request):
    """And no folder of this machine is in the file."""
    if head == "linear":
        model, _, export = request.getfixturevalue("exported")
    else:
        model = ctclip(head)
        export = export_onnx(model, tmp_path / "model.onnx")
    assert list(export.path.parent.iterdir()) == [export.path]
    assert export.parity.difference < 1e-4 and export.parity.same_codes == 1 and export.parity.volumes == 3
    content = export.path.read_bytes()
    private = (str(SUITE), str(Path(torch.__file__).resolve().parents[1]), str(Path.home()) + "/", "stack_trace")
    assert b"not a medical device" in content  # our own metadata
    assert [place for place in private if place.encode() in content] == []
    for count in (1, 3):
        volume = torch.cat(check_volumes(model.input_shape))[:count]
        found, _ = run(export.path, volume)
        with torch.inference_mode():
            assert np.abs(found["logits"] - model(volume).numpy()).max() < 1e-4
            assert found["logits"].shape == (count, 18) and found["logits"].std() > 0.05
            assert (found["code_ids"] == model.code_ids(volume).numpy()).all()
            assert ("latents" in found) == (head != "attention")
            if "latents" in found:
                assert np.abs(found["latents"] - model.encode(volume).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("resnet18", {"attention": "cbam"}), ("test_vit", {"head": "attention"}),
     ("test_efficientnet", {"head": "attention", "tokens": "patch", "feature_stride": 16}),
     ("test_efficientnet", {"head": "max", "tokens": "patch"})],
)  # fmt: skip
def test_a_slice_variant_answers_alike(onnx_is_here, tmp_path, name, options, monkeypatch):
    monkeypatch.setattr("ctclip_model.SLICE_INPUT_SHAPE", (12, 64, 64))
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(None, name, pretrained=False, n_slices=2, **options)
    for parameter in model.classifier.parameters():
        nn.init.normal_(parameter)
    export = export_onnx(model, tmp_path / "model.onnx")
    assert export.outputs == ("logits",) and export.parity.same_codes is None
    volume = torch.cat(check_volumes(model.input_shape))
    with torch.inference_mode():
        expected = model.eval()(volume).numpy()
    assert np.abs(run(export.path, volume)[0]["logits"] - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_labels_contract_and_thresholds_travel_in_the_file(exported):
    model, fitted, export = exported
    _, session = run(export.path, check_volumes(model.input_shape)[0])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == list(ABNORMALITIES)
    contract = json.loads(metadata["input"])
    assert contract["shape"] == ["batch", 1, *model.input_shape] and "[-1000, 1000]" in contract["values"]
    assert json.loads(metadata["thresholds"]) == dict(zip(ABNORMALITIES, fitted.thresholds.tolist(), strict=True))
    after = dict(zip(ABNORMALITIES, fitted.calibrated_thresholds.tolist(), strict=True))
    assert json.loads(metadata["thresholds_calibrated"]) == after != json.loads(metadata["thresholds"])
    assert contract["extent_mm"] == FIELD_OF_VIEW_MM
    assert json.loads(metadata["calibration"]) == fitted.content() and "not a medical device" in metadata["use"]
    assert session.get_inputs()[0].shape == ["batch", 1, *model.input_shape]
    assert "thresholds" not in onnx_export._metadata(model, None)


def test_only_files_that_end_in_onnx_are_written(tmp_path):
    """Before anything is computed: no package is needed, and the run's weights are as they were."""
    run_folder = tmp_path / "run"
    ctclip().save_pretrained(run_folder)
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    line = r"found the ending '\.safetensors', expected a file that ends in \.onnx; say .*model\.onnx$"
    with pytest.raises(ExportError, match=line):
        export_run(run_folder, run_folder / "model.safetensors")
    with pytest.raises(ExportError, match="found the ending"):
        export_onnx(None, run_folder / "model.safetensors")
    with pytest.raises(ExportError, match="found no ending"):
        export_run("no such run", tmp_path / "model")
    (tmp_path / "mine.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(UserError, match="mine.onnx: found a file that this command did not write"):
        export_run(run_folder, tmp_path / "mine.onnx")
    assert (tmp_path / "mine.onnx").read_bytes() == b"\x08\x0a\x12\x07pytorch"
    assert {path.name: path.read_bytes() for path in run_folder.iterdir()} == before


def test_a_file_that_answers_otherwise_is_refused_and_removed(copied, tmp_path, monkeypatch):
    expected = onnx_export._expected

    def other(model, batch):
        answer = expected(model, batch)
        return answer | {"logits": answer["logits"] + 0.002}

    monkeypatch.setattr(onnx_export, "_expected", other)
    with pytest.raises(ExportError, match=r"differ from the model's by 0\.002, expected at most 0\.001; no file"):
        export_onnx(ctclip(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("near", [True, False])
def test_only_near_ties_explain_codes_that_differ(near):
    """A file that took another code: an explanation where the two codes are as near to the token, else none."""
    model = ctclip()
    volume = check_volumes(model.input_shape)[0]
    own = onnx_export._expected(model, volume)
    codes = own["code_ids"].clone()
    index = (0, 0, 0, 0)
    other = (int(codes[index]) + 1) % OTHER_SIZES.codes
    codes[index] = other
    if near:
        both = nn.functional.normalize(model.codebook[[int(own["code_ids"][index]), other]], dim=-1)
        own["tokens"] = own["tokens"].clone()
        own["tokens"][index] = both.sum(0)
    with torch.inference_mode():
        answer = {"code_ids": codes, "logits": model.head(model.features_from_cache(codes))}
    assert onnx_export._explained(model, own, answer) is near
    wrong = answer | {"logits": answer["logits"] + 0.01}
    assert not onnx_export._explained(model, own, wrong)


def test_a_run_is_exported_with_its_thresholds_and_without_noise(onnx_is_here, tmp_path):
    """In a process of its own: nothing but the lines may reach the terminal."""
    folder = tmp_path / "run"
    ctclip().save_pretrained(folder)
    calibration().save(folder / "calibration.json")
    output = tmp_path / "out" / "model.onnx"
    program = (
        "import sys; from ctclip.inference.onnx_export import export_lines, export_run\n"
        "print('\\n'.join(export_lines(export_run(*sys.argv[1:]), sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(output)], cwd=SUITE, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"Wrote {output}: ") and "thresholds and calibration too" in lines[1]
    assert "checked with onnxruntime on 3 volumes" in lines[2] and "100.000 % of the code ids equal" in lines[2]


def without(monkeypatch, *names):
    find = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None if name in names else find(name))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    without(monkeypatch, "onnx", "onnxscript")
    with pytest.raises(ExportError) as caught:
        export_onnx(ctclip(), tmp_path / "model.onnx")
    assert str(caught.value) == (
        "found no onnx and no onnxscript, which exporting needs; pip install onnx onnxscript onnxruntime (the last to "
        "have the file checked)"
    )


@pytest.mark.parametrize("missing", ["packages", "folder"])
def test_what_an_export_needs_is_missed_before_a_model_is_loaded(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "load_model", None)
    if missing == "packages":
        without(monkeypatch, "onnx")
    (tmp_path / "file").touch()
    folder = "file" if missing == "folder" else "new"
    said = "found a place that cannot be written" if missing == "folder" else "found no onnx, which exporting needs"
    with pytest.raises(UserError, match=said):
        export_run(tmp_path, tmp_path / folder / "model.onnx")
    assert not (tmp_path / "new").exists()


def test_an_older_torch_is_named(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(ExportError, match=r"^found torch 2\.7\.1\+cpu, expected 2\.8 or newer to export"):
        export_onnx(ctclip(), tmp_path / "model.onnx")


def test_without_onnxruntime_it_says_that_nothing_was_checked(copied, tmp_path, monkeypatch):
    without(monkeypatch, "onnxruntime")
    ctclip().save_pretrained(tmp_path / "run")
    lines = export_lines(export_run(tmp_path / "run", tmp_path / "model.onnx"), "run")
    assert "not checked against the model: onnxruntime is not installed" in lines[-1]
    assert "not calibrated" in lines[-2] and (tmp_path / "model.onnx").stat().st_size > 100_000
    onnx_export.check_onnx_path(tmp_path / "model.onnx")  # an export may be made again


def test_a_failing_exporter_is_one_line(onnx_is_here, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("\nno such operator\nmuch more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = ctclip().train()
    with pytest.raises(ExportError, match=r"^torch \S+ could not export .* \(RuntimeError: no such operator\);"):
        export_onnx(model, tmp_path / "model.onnx")
    assert model.training and list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match="found a folder"):
        export_onnx(model, tmp_path)
