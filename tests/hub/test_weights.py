"""ctclip.hub.weights: fingerprints and slim copies, on the golden checkpoints.

Reference: the logits and latents of the file itself, pinned values of the fixed phantom, and the bytes on the disk.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctclip import paths
from ctclip.hub import weights as weights_module
from ctclip.hub.__main__ import main
from ctclip.hub.client import read_record
from ctclip.hub.weights import Fingerprint, fingerprint, make_slim
from ctclip.phantoms.reference import fixed_phantom
from ctclip_model import (
    CLASSFINE_PATH,
    SLIM_OF,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    existing_weights,
    read_checkpoint,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EXPECTED = np.load(FIXTURES / "tiny_a_expected.npz")


@pytest.fixture(params=["classfine", "clip"])
def weights(request, tmp_path) -> Path:
    path = tmp_path / f"ctclip_{request.param}.pt"
    path.write_bytes((FIXTURES / f"tiny_a_{request.param}.pt").read_bytes())
    return path


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    monkeypatch.setattr(weights_module, "fixed_phantom", cached_phantom)


cached_phantom = functools.cache(fixed_phantom)


def test_the_fixed_phantom_is_fixed():
    """Fingerprints of two versions of this suite must be of one volume: when this fails, they are not."""
    volume = fixed_phantom((20, 40, 40))
    assert volume.shape == (1, 1, 20, 40, 40) and volume.min() == -1
    assert volume.mean().item() == pytest.approx(-0.516878, abs=1e-4)
    assert volume.std().item() == pytest.approx(0.465000, abs=1e-4)
    assert (volume > 0.3).sum().item() == pytest.approx(262, abs=3)


def test_a_fingerprint_is_what_the_model_makes_of_the_phantom(tiny_classfine):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine).eval()
    found = fingerprint(model)
    with torch.no_grad():
        expected = model(fixed_phantom(model.input_shape))[0]
    assert found.kind == "logits" and found.values == tuple(expected.tolist())
    assert str(found).startswith(f"fingerprint {found.digest[:12]}; logits of the fixed phantom: {expected[0]:.3f} ")
    assert fingerprint(model) == found


def test_a_file_without_a_head_has_the_latents(weights):
    found = fingerprint(CTCLIPMultiAbnormalityModel(str(weights)))
    if "classfine" in weights.name:
        assert found.kind == "logits" and len(found.values) == 18
    else:
        assert found.kind == "latent" and np.linalg.norm(found.values) == pytest.approx(1, abs=1e-5)  # L = 16


def test_one_number_of_one_tensor_gives_another_digest(tiny_classfine):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    before = fingerprint(model)
    with torch.no_grad():
        model.classifier.bias[17] += 1e-6
    after = fingerprint(model)
    assert after.digest != before.digest
    assert after.difference(before) == f"other tensors: {after.digest[:12]} where {before.digest[:12]} was kept"


def test_the_same_tensors_with_other_numbers_are_told():
    kept = Fingerprint("ab" * 32, "logits", (0.1, 0.2), "x86_64, torch 2.6.0")
    assert Fingerprint("ab" * 32, "logits", (0.1, 0.219), "arm64, torch 2.7.0").difference(kept) is None
    found = Fingerprint("ab" * 32, "logits", (0.1, 0.3), "arm64, torch 2.7.0").difference(kept)
    assert found == "the same tensors give numbers up to 0.100 off those computed on x86_64, torch 2.6.0"


def test_slim_keeps_what_is_in_use_and_computes_the_same(weights):
    state, size = read_checkpoint(weights), weights.stat().st_size
    whole = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    before = fingerprint(whole)
    target, found = make_slim(weights)
    assert target == weights.with_suffix(".safetensors") and not weights.exists()
    assert [path.name for path in weights.parent.iterdir()] == [target.name] and target.stat().st_size < 0.75 * size
    assert found == before
    slim = CTCLIPMultiAbnormalityModel(str(target)).eval()
    volume = torch.from_numpy(EXPECTED["volume"])
    with torch.no_grad():
        assert torch.equal(slim.encode(volume), whole.encode(volume))
        np.testing.assert_allclose(slim.encode(volume), EXPECTED["image_latents"], atol=1e-5)
        if "classfine" in weights.name:
            np.testing.assert_allclose(slim(volume), EXPECTED["classfine_logits"], atol=1e-5)
    kept = load_file(target)
    assert all(torch.equal(value, state[key]) for key, value in kept.items())
    assert "to_visual_latent_extra.weight" in state and "to_visual_latent_extra.weight" not in kept
    has_text = [key for key in kept if key.startswith("text_transformer.")]
    assert bool(has_text) == ("classfine" not in weights.name)  # what a file without a head classifies with


def test_the_slim_copy_is_found_under_the_name_of_the_file_it_replaced(weights):
    target, _ = make_slim(weights)
    report = CTCLIPMultiAbnormalityModel(str(weights)).load_report
    assert report.path == str(target)
    other = weights.with_name("other.pt")
    target.rename(other.with_suffix(".safetensors"))
    with pytest.raises(FileNotFoundError, match="CT-CLIP model not found"):  # made from a file of another name
        CTCLIPMultiAbnormalityModel(str(other))


def test_a_copy_that_computes_otherwise_is_not_kept(weights, monkeypatch):
    save = weights_module.save_file
    monkeypatch.setattr(
        weights_module,
        "save_file",
        lambda tensors, path, metadata: save({key: value + 1e-3 for key, value in tensors.items()}, path, metadata),
    )
    content = weights.read_bytes()
    with pytest.raises(CheckpointError, match=r"the slim copy gives fingerprint .*, expected .*; it was not kept"):
        make_slim(weights)
    assert weights.read_bytes() == content and list(weights.parent.iterdir()) == [weights]


def test_no_room_for_a_slim_copy_beside_the_file(weights, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"found No space left .* expected room for a copy"):
        make_slim(weights)
    assert list(weights.parent.iterdir()) == [weights]


def test_command_line_keeps_the_fingerprint_and_compares(weights, capsys):
    assert main(["weights", str(weights)]) == 0
    first = capsys.readouterr().out
    assert main(["weights", str(weights), "--slim"]) == 0
    out = capsys.readouterr().out
    slim = weights.with_suffix(".safetensors")
    assert f"slim: {slim}, 0." in out and out.endswith(first.split(", kept now")[0] + ", as kept\n")
    record = read_record(slim)
    assert first.startswith(f"fingerprint {record['fingerprint']['digest'][:12]}; ")
    record["fingerprint"]["values"][0] += 0.5
    slim.with_suffix(".json").write_text(json.dumps(record | {"sha256": "kept as well"}))
    assert main(["weights", str(slim)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {slim}: found the same tensors give numbers up to 0.500 off")
    assert captured.err.count("\n") == 1
    slim.with_suffix(".json").unlink()
    assert main(["weights", str(slim)]) == 0


def test_only_a_pt_file_has_a_slim_copy_made(weights, capsys):
    """Of a .safetensors file, and of a .pt file that a slim copy has replaced: refused, and nothing is recorded."""
    slim, _ = make_slim(weights)
    content = slim.read_bytes()
    for path in (slim, weights):
        assert main(["weights", str(path), "--slim"]) == 2
        expected = f"error: {slim}: found a .safetensors file, expected the .pt file that a slim copy is made of; leave"
        assert capsys.readouterr().err == f"{expected} --slim out\n"
    assert [path.name for path in weights.parent.iterdir()] == [slim.name] and slim.read_bytes() == content


def test_paths_of_the_model_file_are_those_of_the_package(tmp_path):
    """ctclip_model.py, which imports nothing of ours, types them again."""
    assert CLASSFINE_PATH == paths.CLASSFINE_PATH == paths.weights_path("classfine").as_posix()
    made = paths.slim_path(tmp_path / "ctclip_classfine.pt")
    save_file({"a": torch.zeros(1)}, made, metadata={SLIM_OF: "ctclip_classfine.pt"})
    assert existing_weights(tmp_path / "ctclip_classfine.pt") == made


def test_bad_files_are_one_line(tmp_path, capsys):
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 no")
    for name, said in (("nowhere.pt", "CT-CLIP model not found"), ("damaged.pt", "is not a readable weights file")):
        for flags in ([], ["--slim"]):
            assert main(["weights", str(tmp_path / name), *flags]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and said in error and error.count("\n") == 1
