"""answers.json, for other systems: against the predictions it is made of, and against its published schema."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_data import affine_of, chest
from helpers_dicom import write_series
from helpers_scans import write_mha

import run_task2
from ctclip.evaluation.run_folder import run_calibration
from ctclip.evaluation.tables import write_table
from ctclip.inference.answers import is_answers
from ctclip.inference.predictions import predict_scans
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel, sha256_of

SUITE = Path(__file__).resolve().parents[2]
MODEL = SUITE / "tests" / "fixtures" / "tiny_a_classfine.pt"
SPACING = (7.5, 7.9, 12.25)
TYPES = {"object": dict, "array": list, "string": str, "number": int | float, "integer": int, "boolean": bool,
         "null": type(None)}  # fmt: skip


def faults(value, schema, where="$"):
    """What contradicts a JSON Schema, of the words that ours uses."""
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r}"]
    wanted = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(
        isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in wanted
    ):
        return [f"{where}: {value!r} is no {wanted}"]
    found = []
    if isinstance(value, dict) and "properties" in schema:
        found += [f"{where}.{key}" for key in {*schema["required"]} ^ {*value}]
        common = value.keys() & schema["properties"].keys()
        found += [fault for key in common for fault in faults(value[key], schema["properties"][key], f"{where}.{key}")]
    if isinstance(value, list):
        found += [fault for i, item in enumerate(value) for fault in faults(item, schema["items"], f"{where}[{i}]")]
        found += [] if schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) else [where]
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        found.append(where)
    return found


@pytest.fixture(scope="module")
def schema():
    return json.loads((SUITE / "docs" / "answers.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that can decide, and scans: a whole one, a series whose upper lungs are missing, one that is cut off."""
    folder = tmp_path_factory.mktemp("answers")
    run, rng = folder / "run", np.random.default_rng(0)
    CTCLIPMultiAbnormalityModel(str(MODEL)).save_pretrained(run)
    names, labels = [f"train_{i}_a_1.nii.gz" for i in range(60)], (rng.random((60, 18)) < 0.4).astype(int)
    write_table(run / "tuning_labels.csv", names, labels)
    write_table(run / "tuning_predictions.csv", names, np.clip(0.5 + 0.2 * labels + rng.normal(0, 0.2, (60, 18)), 0, 1))
    write_mha(folder / "in" / "whole.mha", chest(), affine_of(SPACING))
    write_series(folder / "in" / "series", chest()[:, :, :14], affine_of(SPACING))
    (folder / "in" / "cut.mha").write_bytes((folder / "in" / "whole.mha").read_bytes()[:9000])
    return folder


def written(folder, output, checkpoint, *flags):
    argv = ["--mode", "predict", "--checkpoint", checkpoint, "--input", folder / "in", "--device", "cpu"]
    code = run_task2.main(list(map(str, [*argv, "--output", output, *flags])))
    return code, json.loads(output.read_text()) if output.is_file() else None


def test_answers_are_the_predictions_with_their_thresholds(folder, tmp_path, schema, capsys):
    code, content = written(folder, tmp_path / "ct.answers.json", folder / "run")
    assert code == 2 and "cut.mha" in capsys.readouterr().err, "one scan could not be read"
    assert faults(content, schema) == [] and list(tmp_path.iterdir()) == [tmp_path / "ct.answers.json"]
    expected, calibration = predict_scans(folder / "in", folder / "run", device="cpu"), run_calibration(folder / "run")
    assert [scan["name"] for scan in content["scans"]] == ["whole.mha", "series"] == list(expected.table.index)
    for scan in content["scans"]:
        given = {each["finding"]: each for each in scan["answers"]}
        assert list(given) == list(ABNORMALITIES)
        row = expected.table.loc[scan["name"]]
        for name, cut in zip(ABNORMALITIES, calibration.calibrated_thresholds, strict=True):
            assert given[name]["probability"] == row[name] and given[name]["threshold"] == cut
            assert given[name]["call"] is bool(row[name] >= cut)
    whole, series = content["scans"]
    assert series["series_instance_uid"].replace(".", "").isdigit() and whole["series_instance_uid"] is None
    assert series["warnings"][0].startswith("the upper lungs are not in the scan") and whole["warnings"] == []
    assert [each["name"] for each in content["failures"]] == ["cut.mha"]
    assert content["model"] == {"name": "run", "partners": [],
                                "weights_sha256": sha256_of(folder / "run" / "model.safetensors")}  # fmt: skip
    for finding, counts in zip(content["findings"], calibration.counts.tolist(), strict=True):
        shares = finding["sensitivity"], finding["specificity"]
        assert [share[key] for share in shares for key in ("number", "of")] == counts
        assert all(share["interval"][0] <= share["value"] <= share["interval"][1] for share in shares)
    assert content["calibration"]["tuning_patients"] == 60
    assert str(folder) not in json.dumps(content), "no folder of this machine"
    assert written(folder, tmp_path / "ct.answers.json", folder / "run")[0] == 2, "an earlier one is replaced"


def test_without_tuning_patients_nothing_is_called(folder, tmp_path, schema, capsys):
    _, content = written(folder, tmp_path / "answers.json", MODEL)
    assert faults(content, schema) == [] and content["calibration"] is None
    assert "No finding is called yes or no" in capsys.readouterr().out
    assert all(each["threshold"] is each["call"] is None for scan in content["scans"] for each in scan["answers"])
    assert all(finding["sensitivity"] is None for finding in content["findings"])


def test_what_is_no_probability_and_a_file_of_the_user_are_refused_in_a_line(folder, tmp_path, capsys):
    code, content = written(folder, tmp_path / "x.answers.json", folder / "run", "--map-thresholds")
    assert code == 2 and content is None and "--map-thresholds" in (err := capsys.readouterr().err)
    assert len(err.splitlines()) == 1 and "an answers.json have the cuts" in err
    (tmp_path / "x.answers.json").write_text('{"mine": 1}')
    assert written(folder, tmp_path / "x.answers.json", folder / "run") == (2, {"mine": 1})
    assert "found a file that this command did not write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("answers.json", True), ("ct.answers.json", True), ("results.json", False), ("myanswers.json", False),
     ("answers.csv", False)],
)  # fmt: skip
def test_the_challenge_s_file_keeps_its_name(name, expected):
    assert is_answers(Path("answers", name)) is expected


def test_the_schema_refuses_what_is_not_described(folder, tmp_path, schema):
    _, content = written(folder, tmp_path / "answers.json", folder / "run")
    for spoil in (
        lambda: content.pop("use"),
        lambda: content["scans"][0].update(path="/home/me"),
        lambda: content["scans"][0]["answers"][0].update(probability=1.5),
        lambda: content["findings"][0]["sensitivity"].update(interval=[0.5]),
        lambda: content["scans"][1]["answers"][0].update(call=1),
        lambda: content.update(version=2),
    ):
        before = len(faults(content, schema))
        spoil()
        assert len(faults(content, schema)) == before + 1
