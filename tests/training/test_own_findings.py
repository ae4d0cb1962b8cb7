"""Runs on other findings than the 18, and on labels that are partly unknown, from the command line: trained, evaluated,
predicted and explained. References: the file's own head, a loss of the known labels alone, another run.
"""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_training import history, one_line, weights

import ctclip_evaluation
import ctclip_training
import run_task2
from ctclip.data.cohort import load_cohort
from ctclip.data.ct_rate import SPLITS, labels_path
from ctclip.evaluation.calibration import load_calibration
from ctclip.evaluation.tables import read_labels, read_predictions, write_table
from ctclip.inference.run_predictions import run_inputs
from ctclip.training import steps
from ctclip_model import (
    ABNORMALITIES,
    UNKNOWN,
    CTCLIPMultiAbnormalityModel,
    Prompts,
    balanced_label_weights,
    create_loss,
)

pytestmark = pytest.mark.usefixtures("fast", "undrawn")
QUICK = ["--resamples", "100", "--pictures", "0"]
SIXTEEN = [name for name in ABNORMALITIES if name not in ("Mosaic attenuation pattern", "Medical material")]
OWN = {"Emphysema": "Emphysema", "Lung nodule": "Nodule or mass", "Cardiomegaly": "Large heart",
       "Pleural effusion": "Effusion, any", "Consolidation": "Airspace disease"}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def cohort_of(phantoms: Path, folder: Path, change) -> Path:
    """The phantoms under other label tables: `change` is given each split's, and returns it."""
    shutil.copytree(phantoms, folder, copy_function=os.link)
    for split in SPLITS:
        table = folder / labels_path(split)
        labels = pd.read_csv(table, index_col=0)
        table.unlink()
        change(labels).to_csv(table)
    return folder


def with_holes(labels: pd.DataFrame, share: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """The table with empty cells."""
    hidden = np.random.default_rng(seed).random(labels.shape) < share
    return labels.astype(object).mask(hidden, "")


def train(data_dir: Path, folder: Path, weights_file: str, cache: str, *more: str) -> int:
    flags = ["--data-dir", str(data_dir), "--ctclip-path", weights_file, "--cache-dir", cache, "--batch-size", "8",
             "--epochs", "2", "--freeze-epochs", "1", "--unfreeze-layers", "1", "--output-dir", str(folder)]
    return ctclip_training.main([*flags, *more])


@pytest.fixture(scope="module")
def partly_known(fast, phantoms, tiny_classfine, tmp_path_factory, cache) -> tuple[Path, Path, str]:
    """(cohort with empty cells, a run on it, what that printed). Read-only, but for evaluations."""
    folder = tmp_path_factory.mktemp("partly_known")
    data_dir = cohort_of(phantoms, folder / "cohort", with_holes)
    with redirect_stdout(io.StringIO()) as out:
        assert train(data_dir, folder / "run", tiny_classfine, cache) == 0
    return data_dir, folder / "run", out.getvalue()


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["focal", "bce", "asl"])
def test_a_loss_of_partly_known_labels_is_that_of_the_known_ones(kind, weighted):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), (torch.rand(6, 4) < 0.4).float()
    known = torch.rand(6, 4) < 0.6
    weight = torch.tensor([0.5, 1.0, 1.5, 2.0]) if weighted else None
    values = []
    for i, j in known.nonzero().tolist():  # one by one
        own = None if weight is None else weight[[j]]
        values.append(create_loss(kind, 0.7, 2.0, own)(logits[i, [j]][None], labels[i, [j]][None]))
    asked = logits.clone().requires_grad_()
    loss = create_loss(kind, 0.7, 2.0, weight)(asked, labels.where(known, torch.tensor(float(UNKNOWN))))
    loss.backward()
    torch.testing.assert_close(loss, torch.stack(values).mean())
    assert (asked.grad[~known] == 0).all() and (asked.grad[known] != 0).any()


@pytest.mark.parametrize("kind", ["focal", "bce", "asl"])
def test_where_nothing_is_known_the_loss_and_its_gradients_are_0(kind):
    logits = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    loss = create_loss(kind)(logits, torch.full((1, 3), float(UNKNOWN)))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_label_weights_count_known_labels():
    labels = torch.tensor([[1, 1], [0, 0], [0, UNKNOWN], [0, UNKNOWN]]).float()  # rates 1/4 and 1/2
    torch.testing.assert_close(balanced_label_weights(labels), torch.tensor([4 / 3, 2 / 3]))


# ------------------------------------------------------------------ the head


@pytest.mark.parametrize("head", ["linear", "mlp", "attention"])
def test_a_head_keeps_the_rows_of_the_labels_that_it_has(head, tiny_classfine):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine, head=head).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.normal_()
    volume = torch.rand(2, 1, *model.input_shape) * 2 - 1
    with torch.no_grad():
        before = model(volume)
        new = model.select_labels(["Lung nodule", "Mass", "Emphysema"])
        after = model(volume)
    chosen = [ABNORMALITIES.index("Lung nodule"), ABNORMALITIES.index("Emphysema")]
    assert new == ["Mass"] and model.labels == ("Lung nodule", "Mass", "Emphysema")
    torch.testing.assert_close(after[:, [0, 2]], before[:, chosen])
    assert (after[:, 1] == 0).all()


def test_a_prompt_head_has_the_labels_of_its_prompts(tiny_classfine):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    model.head_name = "prompts"
    with pytest.raises(ValueError, match="found no prompt for Mass, expected labels of the prompts"):
        model.select_labels(["Mass"])
    assert Prompts.from_names(["Mass"]).names == ("Mass",)


# ------------------------------------------------------------------ runs


def test_sixteen_of_the_18_train_from_the_files_head(phantoms, tiny_classfine, tmp_path, cache, capsys):
    data_dir = cohort_of(phantoms, tmp_path / "cohort", lambda labels: labels[SIXTEEN[::-1]])
    assert train(data_dir, tmp_path / "run", tiny_classfine, cache) == 0
    out = capsys.readouterr().out
    assert "findings: 16 (" in out and "16 of 16 labels" in out
    model = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run")
    assert list(model.labels) == SIXTEEN  # in CT-RATE's order, whatever the table's
    assert ctclip_evaluation.main(["--checkpoint", str(tmp_path / "run"), *QUICK]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["per_label"]) == SIXTEEN
    assert load_calibration(tmp_path / "run" / "calibration.json").findings == tuple(SIXTEEN)


def test_findings_of_ones_own_from_training_to_a_heat_map(phantoms, tiny_classfine, tmp_path, cache, capsys):
    data_dir = cohort_of(phantoms, tmp_path / "cohort", lambda labels: labels[list(OWN)].rename(columns=OWN))
    run, names = tmp_path / "run", ["Emphysema", *[name for name in OWN.values() if name != "Emphysema"]]
    assert train(data_dir, run, tiny_classfine, cache) == 0
    out = capsys.readouterr().out
    assert f"findings: 5 ({', '.join(names)})" in out and "1 of 5 labels" in out
    assert json.loads((run / "run.json").read_text())["labels"] == names
    assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 0
    assert list(json.loads((run / "metrics.json").read_text())["per_label"]) == names
    scan = next(volume.path for volume in load_cohort(data_dir, "valid").volumes if "valid_fixed" in str(volume.path))
    flags = ["--mode", "predict", "--checkpoint", str(run), "--input", str(scan), "--assume-hu"]
    assert run_task2.main([*flags, "--output", str(tmp_path / "p.csv"), "--explain", "Large heart"]) == 0
    assert read_predictions(tmp_path / "p.csv").findings == tuple(names)
    assert list((tmp_path / "p_explain").glob("*/*.nii.gz"))
    capsys.readouterr()
    assert run_task2.main([*flags, "--output", str(tmp_path / "results.json")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "expected the challenge's 18" in err and not (tmp_path / "results.json").exists()


def test_a_run_on_partly_known_labels_goes_on_as_if_nothing_had_stopped_it(
    partly_known, tiny_classfine, tmp_path, cache
):
    (data_dir, whole, out), parts = partly_known, tmp_path / "parts"
    assert "unknown labels: " in out and "left out of loss and metrics" in out
    assert train(data_dir, parts, tiny_classfine, cache, "--micro-batch", "2") == 0
    first, second = weights(whole), weights(parts)  # a step's gradient does not depend on how it is cut
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-5)
    assert [line["train_loss"] for line in history(whole)] == pytest.approx(
        [line["train_loss"] for line in history(parts)], abs=1e-5)
    stored = read_labels(whole / "tuning_labels.csv", list(ABNORMALITIES)).frame
    assert (stored[list(ABNORMALITIES)] == UNKNOWN).to_numpy().mean() == pytest.approx(0.3, abs=0.1)
    assert ctclip_evaluation.main(["--checkpoint", str(whole), *QUICK]) == 0
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["unknown_labels"]["decisions"] > 0


def test_an_interrupted_run_keeps_its_findings_and_ends_as_an_undisturbed_one(
    phantoms, tiny_classfine, tmp_path, cache, monkeypatch, capsys
):
    own = partial(pd.DataFrame.rename, columns=OWN)
    data_dir = cohort_of(phantoms, tmp_path / "cohort", lambda labels: with_holes(own(labels[list(OWN)])))
    assert train(data_dir, tmp_path / "whole", tiny_classfine, cache) == 0
    run, calls, accumulate = tmp_path / "run", iter(range(100)), steps.accumulate_gradients

    def killed(*args):
        if next(calls) == 5:  # a step of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "accumulate_gradients", killed)
        assert train(data_dir, run, tiny_classfine, cache) == 128 + signal.SIGTERM
    table = data_dir / labels_path("train")
    text = table.read_text()
    table.write_text(text.replace("Large heart", "Small heart", 1))
    capsys.readouterr()
    assert ctclip_training.main(["--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found no column 'Large heart'" in err
    pd.read_csv(io.StringIO(text), index_col=0).assign(Later=1).to_csv(table)  # a column that the run knows nothing of
    assert ctclip_training.main(["--resume", str(run)]) == 0
    first, second = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_whole_task_wants_its_findings_of_the_unseen_split_before_it_trains(
    phantoms, tiny_classfine, tmp_path, cache, capsys
):
    data_dir = cohort_of(phantoms, tmp_path / "cohort", lambda labels: labels[list(OWN)].rename(columns=OWN))
    table = data_dir / labels_path("valid")
    table.write_text(table.read_text().replace("Large heart", "Big heart", 1))
    flags = ["--data-dir", str(data_dir), "--ctclip-path", tiny_classfine, "--cache-dir", cache, "--epochs", "1",
             "--freeze-epochs", "1", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    assert run_task2.main(flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found no column 'Large heart'" in err and not (tmp_path / "run").exists()
    table.write_text(table.read_text().replace("Emphysema", "Emphysem", 1))  # not wanted: named are others
    assert run_task2.main([*flags, *QUICK, "--findings", "Nodule or mass,Airspace disease"]) == 0
    assert list(json.loads((tmp_path / "run" / "metrics.json").read_text())["per_label"])[0] == "Nodule or mass"


def test_labels_hidden_from_a_run_change_nothing_in_it(partly_known, phantoms, tiny_classfine, tmp_path, cache):
    """What is hidden, a 0 or a 1, by an empty cell or -1, is in no weight and no number of the log."""
    data_dir = cohort_of(phantoms, tmp_path / "cohort", lambda labels: with_holes(labels).replace("", "-1"))
    assert train(data_dir, tmp_path / "run", tiny_classfine, cache, "--minus-one-is-unknown") == 0
    first, second = weights(partly_known[1]), weights(tmp_path / "run")
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_findings_can_be_named_and_a_wrong_name_is_one_line(phantoms, tiny_classfine, tmp_path, cache, capsys):
    both = cohort_of(phantoms, tmp_path / "cohort",
                     lambda labels: labels.assign(**{"Nodule, solid": labels["Lung nodule"]}))  # fmt: skip
    flags = (both, tmp_path / "run", tiny_classfine, cache)
    assert train(*flags, "--findings", "Emphysem") == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found no column 'Emphysem'" in err and not (tmp_path / "run").exists()
    assert train(*flags, "--findings", '"Nodule, solid", Emphysema') == 0
    model = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run")
    assert model.labels == ("Nodule, solid", "Emphysema")
    evaluate = ["--checkpoint", str(tmp_path / "run"), *QUICK]
    assert ctclip_evaluation.main(evaluate) == 0
    # the run's findings decide, also in another cohort whose table has the 18 and one more; or only some of the run's
    for data_dir, findings in ((both, ["Nodule, solid", "Emphysema"]), (phantoms, ["Emphysema"])):
        folder = tmp_path / f"on_{data_dir.name}"
        assert ctclip_evaluation.main([*evaluate, "--data-dir", str(data_dir), "--output-dir", str(folder)]) == 0
        assert list(json.loads((folder / "metrics.json").read_text())["per_label"]) == findings
    table = both / labels_path("valid")
    table.write_text(table.read_text().replace("Nodule, solid", "Nodules, solid", 1))
    capsys.readouterr()
    assert ctclip_evaluation.main([*evaluate, "--data-dir", str(both)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found column 'Nodules, solid', expected 'Nodule, solid'" in err


def test_the_18_and_one_more_are_all_evaluated(tmp_path):
    findings = [*ABNORMALITIES, "Rib fracture"]
    (tmp_path / "run.json").write_text(json.dumps({"labels": findings, "phantom": True}))
    names = [f"valid_{i}_a_1.nii.gz" for i in range(4)]
    for prefix in ("", "tuning_"):
        write_table(tmp_path / f"{prefix}predictions.csv", names, np.full((4, 19), 0.25), findings=findings)
        write_table(tmp_path / f"{prefix}labels.csv", names, np.eye(4, 19, dtype=int), findings=findings)
    inputs = run_inputs(tmp_path)
    for table in (inputs.predictions, inputs.labels, *inputs.tuning):
        assert list(table.findings) == findings
