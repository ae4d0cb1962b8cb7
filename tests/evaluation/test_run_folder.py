"""A run's calibration.json, run.json, log.jsonl and metrics.json, edited by hand: each fault is one line that names the
file, through whatever reads it."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_model import OTHER_SIZES

from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration, load_calibration, read_prevalence
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import RunError, newest_run, read_history, run_record, writing
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

EPOCH = {"epoch": 1, "stage": "frozen", "open_layers": 0, "train_loss": 0.5, "tuning_auroc_macro": None, "best": True,
         "seconds": 2.5}  # fmt: skip
DEEP = [b"[" * 200_000, b'{"a":' * 200_000 + b"1" + b"}" * 200_000, b"[" * 900 + b"]" * 900, b"\xff\xfe", b"[1, 2]",
        b"null", b"7", b'"text"', b""]  # fmt: skip


@pytest.fixture
def calibration(tmp_path):
    column = np.full(len(ABNORMALITIES), 0.5)
    path = tmp_path / "calibration.json"
    columns = [column] * 4
    Calibration(ABNORMALITIES, "platt", *columns, 0.5, "prevalence", {"platt": 0.4}, 8, 4).save(path)
    return path


def one_line(error, path):
    text = str(error.value)
    assert "\n" not in text and str(path) in text and "expected" in text and len(text) < 500
    return text


EDITS = {
    "a number as text": lambda c: c["per_label"]["Emphysema"].update(slope="1.5"),
    "a number with an underscore": lambda c: c["per_label"]["Emphysema"].update(slope="1_0"),
    "true": lambda c: c["per_label"]["Emphysema"].update(intercept=True),
    "NaN": lambda c: c["per_label"]["Emphysema"].update(shift=float("nan")),
    "an integer beyond every float": lambda c: c["per_label"]["Emphysema"].update(shift=10**400),
    "a slope of 1e300": lambda c: c["per_label"]["Emphysema"].update(slope=1e300),
    "a list of labels": lambda c: c.update(per_label=list(ABNORMALITIES)),
    "a label that is a number": lambda c: c["per_label"].update(Emphysema=1),
    "another order": lambda c: c.update(per_label=dict(reversed(c["per_label"].items()))),
    "an unknown method": lambda c: c.update(method="isotonic"),
    "a method that is a list": lambda c: c.update(method=["platt"]),
    "an unknown unit": lambda c: c.update(unit="lesion"),
    "an objective that is null": lambda c: c.update(objective=None),
    "losses that are a list": lambda c: c.update(cross_validated_log_loss=[1]),
    "infinitely many rows": lambda c: c.update(n_rows=float("inf")),
    "no patients": lambda c: c.update(n_patients=0),
    "half a patient": lambda c: c.update(n_patients=3.5),
    "no threshold": lambda c: c["per_label"]["Emphysema"].pop("threshold_uncalibrated"),
    "no calibrated threshold": lambda c: c["per_label"]["Emphysema"].pop("threshold_calibrated"),
    "a calibrated threshold of another calibration": lambda c: c["per_label"]["Emphysema"].update(
        threshold_calibrated=0.6),
    "a global threshold of text": lambda c: c.update(global_threshold_uncalibrated="0.5"),
    "a prevalence that is a number": lambda c: c.update(prevalence=0.5),
    "a scale that is none": lambda c: c.update(scale="percent"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_calibration_is_one_line(calibration, edit):
    content = json.loads(calibration.read_text())
    EDITS[edit](content)
    calibration.write_text(json.dumps(content))
    with pytest.raises(EvaluationError) as error:
        load_calibration(calibration)
    one_line(error, calibration)


@pytest.mark.parametrize("content", DEEP)
def test_what_is_no_calibration_no_record_and_no_rates_is_one_line(tmp_path, content):
    start = time.monotonic()
    (tmp_path / "run.json").write_bytes(content)
    for read, of in ((load_calibration, tmp_path / "run.json"), (run_record, tmp_path),
                     (lambda path: read_prevalence(str(path)), tmp_path / "run.json")):  # fmt: skip
        with pytest.raises(UserError) as error:
            read(of)
        one_line(error, tmp_path / "run.json")
    assert time.monotonic() - start < 5


def test_a_byte_order_mark_is_no_fault(calibration):
    calibration.write_bytes(b"\xef\xbb\xbf" + calibration.read_bytes())
    assert load_calibration(calibration).method == "platt"


RECORDS = [
    {"config": [1]}, {"config": None}, {"data_dir": 7}, {"phantom": "yes"}, {"volumes": 40}, {"versions": "0.7"},
    {"left_out": True}, {"left_out": "none"}, {"config": {"epochs": "3"}}, {"config": {"epochs": 3.0}},
    {"config": {"cache_dir": None}}, {"config": {"alpha": True}}, {"config": {"ctclip_path": ["a.pt"]}},
    {"config": {"limit": "all"}}, {"config": {"pretrained": 1}},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_a_record_with_values_of_other_types_is_one_line(tmp_path, record):
    from ctclip_training import main

    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"} | record))
    with pytest.raises(RunError, match="found a value of another kind for ") as error:
        run_record(tmp_path)
    one_line(error, tmp_path / "run.json")
    assert main(["--resume", str(tmp_path)]) == 2


def test_a_record_of_yesterday_or_tomorrow_is_read(tmp_path):
    record = {"config": {"epochs": 3, "alpha": 1, "limit": None, "of_tomorrow": [1]}, "of_tomorrow": 7}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert run_record(tmp_path) == record


def test_another_program_s_record_makes_no_run(tmp_path, monkeypatch, capsys):
    """Passed over where the newest run is looked for; one line where it is named."""
    from run_task2 import main

    monkeypatch.chdir(tmp_path)
    records = {"other": '{"id": "x1", "config": {"lr": 1}}', "torn": '{"config"', "named": '{"id": "x1"}'}
    ours = {"config": {"epochs": 3}, "phantom": True}
    for name, content in {"before_lists": json.dumps(ours), **records}.items():
        Path("results", name).mkdir(parents=True)
        Path("results", name, "run.json").write_text(content)
    Path("results/logs").mkdir()
    Path("results/logs/log.jsonl").write_text("{}")
    assert newest_run() == Path("results/before_lists")
    with writing(Path("results/torn"), "run.json"):  # ours by its list, whatever became of it
        pass
    os.utime("results/torn/run.json", (2e9, 2e9))
    assert newest_run() == Path("results/torn")
    assert main(["--mode", "evaluate", "--checkpoint", "results/named"]) == 2
    err = capsys.readouterr().err
    assert "results/named/run.json: found another program's record, expected a run's; name" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", [
    b"[" * 200_000, b"7", b"null", b'["epoch"]', b'{"epoch": "1"}', b'{"epoch": 1e999}', b'{"epoch": 0}',
    b'{"train_loss": "0.5"}', b'{"seconds": [1]}', b'{"seconds": 1' + b"0" * 400 + b"}", b'{"best": "yes"}', b"{",
    b"\xff", b'{"stage": 3}',
])  # fmt: skip
def test_a_line_that_is_no_epoch_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([json.dumps(EPOCH).encode(), line, json.dumps(EPOCH | {"epoch": 3}).encode()]))
    said = r"log.jsonl(, line 2)?: found .*, expected (one epoch|a line for each epoch)"
    with pytest.raises(RunError, match=said) as error:
        read_history(path)
    one_line(error, path)


def test_epochs_with_gaps_are_read(tmp_path):
    lines = [EPOCH, EPOCH | {"epoch": 2, "train_loss": float("nan")}, {"epoch": 4, "of_tomorrow": 1.5}]
    (tmp_path / "log.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + '\n{"epoch": 5, "st')
    assert [line["epoch"] for line in read_history(tmp_path / "log.jsonl")] == [1, 2, 4]


@pytest.mark.parametrize("edit", [
    lambda r: r.update(volumes={"train": "many", "tuning": 8}), lambda r: r.update(patients={}),
    lambda r: r.update(volumes={"train": [1], "tuning": 8}), lambda r: r.update(versions={"ctclip": {}}),
])  # fmt: skip
def test_a_model_card_of_an_edited_record_is_written_or_one_line(tmp_path, capsys, edit):
    from ctclip.hub.__main__ import main

    CTCLIPMultiAbnormalityModel(sizes=vars(OTHER_SIZES)).save_pretrained(tmp_path)
    sides = {"volumes": {"train": 32, "tuning": 8}, "patients": {"train": 16, "tuning": 4}}
    record = {"status": "finished", "config": {"model": "ctclip"}, "phantom": True, "device": "cpu", **sides}
    edit(record)
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "log.jsonl").write_text(json.dumps(EPOCH) + "\n")
    code, err = main(["card", str(tmp_path), "--print"]), capsys.readouterr().err
    assert code == 0 or (code == 2 and err.startswith("error: ") and err.count("\n") == 1)


@pytest.mark.parametrize("config, line", [
    ({"learning_rate": float("inf")}, "--learning-rate is inf, expected above 0, and finite"),
    ({"learning_rate": float("nan")}, "--learning-rate is nan"), ({"weight_decay": 1e999}, "--weight-decay is inf"),
    ({"loss_type": "dice"}, "--loss-type is dice, expected focal or bce or asl"), ({"head": "cnn"}, "--head is cnn"),
    ({"gamma": float("nan")}, "--gamma is nan"),
])  # fmt: skip
def test_values_that_make_no_run_are_refused_also_from_a_record(config, line):
    from ctclip.config import TrainingConfig, TrainingError

    with pytest.raises(TrainingError, match=line):
        TrainingConfig(**config).check()
