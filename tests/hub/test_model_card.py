"""Model cards and the way to the hub, against hand-made run folders and a hub of the tests' own (helpers_push).

Reference: the run's own files, huggingface_hub's reader of cards, and the bytes that hub was sent.
"""

import io
import json
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_evaluation import simulate
from helpers_model import OTHER_SIZES
from helpers_push import READER, WRITER, PushHub
from huggingface_hub import ModelCard

from ctclip.card_file import EARLIER_MARK, MARK, discard_card
from ctclip.data.cohort import Volume
from ctclip.evaluation.calibration import load_calibration
from ctclip.evaluation.evaluate import evaluate
from ctclip.evaluation.tables import VolumeTable
from ctclip.hub import model_card as card_module
from ctclip.hub import push
from ctclip.hub.__main__ import main
from ctclip.hub.client import HubError
from ctclip.hub.model_card import licence_of, model_card
from ctclip.hub.published import PUBLIC_METRICS, CardError, Facts, published_metrics, published_record
from ctclip.hub.push import push_run, save_with_card, write_card
from ctclip.training.checkpoint import save_best
from ctclip_model import ABNORMALITIES, CheckpointError, CTCLIPMultiAbnormalityModel, asdict

ON_THE_HUB = ("model.safetensors", "config.json", "README.md", "run.json", "metrics.json", "calibration.json")
SECRETS = ("/home/jane", "jane_doe", "St_Elsewhere", "mercy_hospital", "Doe_John", "C:\\")
CONFIG = {
    "mode": "full_train", "data_dir": "/home/jane/St_Elsewhere", "cache_dir": "C:\\Users\\jane_doe\\cache",
    "model": "ctclip", "ctclip_path": None, "head": "linear", "use_attention": "none", "loss_type": "focal",
    "pretrained": True, "seed": 3,
    "a_text_of_tomorrow": "/home/jane/mercy_hospital",
}
RECORD = {
    "status": "finished", "config": CONFIG, "data_dir": "/home/jane/St_Elsewhere", "phantom": True, "device": "cpu",
    "labels": list(ABNORMALITIES), "volumes": {"train": 1234, "tuning": 321},
    "patients": {"train": 1000, "tuning": 300}, "versions": {"ctclip": "0.6.5"},
    "tuning_patients": ["Doe_John"], "left_out": [{"name": "Doe_John_1.nii.gz", "reason": "/home/jane/x: damaged"}],
    "something_of_tomorrow": "mercy_hospital",
}
EPOCHS = [{"epoch": 1, "best": True, "tuning_auroc_macro": 0.71234, "seconds": 3.0},
          {"epoch": 2, "best": False, "tuning_auroc_macro": 0.7, "seconds": 4.0}]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """metrics.json and calibration.json as an evaluation writes them, with a baseline of somebody's folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    reported, tuning = simulate(60, 1), simulate(50, 2, split="train", first=500)
    baseline = VolumeTable(simulate(60, 3)[0], "/home/jane/St_Elsewhere/old.csv")
    names = reported[0].index
    metadata = {name: {"PatientSex": "M" if i else "F", "Manufacturer": "Doe_John" if i < 2 else "Maker"}
                for i, name in enumerate(names)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctclip.evaluation.evaluate.write_pictures", lambda *args: None)
        evaluate(*reported, tuning=tuning, baseline=baseline, metadata=metadata, phantom=True, resamples=100,
                 output_dir=folder)
    return folder


@pytest.fixture
def make_run(tmp_path, evaluated):
    """make_run(changes of the record, evaluated, model) -> (folder, model)."""

    def make(record=None, measured=True, model=None, name="run"):
        folder = tmp_path / name
        if model is None:
            torch.manual_seed(0)
            model = CTCLIPMultiAbnormalityModel(None, sizes=asdict(OTHER_SIZES))
            torch.nn.init.normal_(model.classifier.weight)
        model._save_pretrained(folder)
        content = RECORD | (record or {})
        content["config"] = CONFIG | (record or {}).get("config", {})
        (folder / "run.json").write_text(json.dumps(content))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in EPOCHS))
        if measured:
            for file in ("metrics.json", "calibration.json"):
                (folder / file).write_bytes((evaluated / file).read_bytes())
        return folder, model

    return make


def flat(text):
    return re.sub(r"\s+", " ", text)


# ---- what the card says


def test_the_card_holds_the_runs_own_numbers(make_run):
    folder, _ = make_run()
    card = model_card(CTCLIPMultiAbnormalityModel.from_pretrained(folder), folder)
    m = json.loads((folder / "metrics.json").read_text())
    for figure in (m["tuned"]["auroc_macro"], *m["intervals"]["tuned"]["recall_macro"], m["tuned"]["crg"],
                   m["calibration"]["after"]["ece"], *m["intervals"]["calibration"]["before"]["brier"]):
        assert f"{figure:.4f}" in card
    rate, low, high = m["tuned"]["positive_rate"], *m["intervals"]["tuned"]["positive_rate"]
    assert f"{100 * rate:.1f} % ({100 * low:.1f}-{100 * high:.1f})" in card
    assert "| training | 1,234 | 1,000 |" in card and "Skipped (unreadable, not a chest): 1 volumes" in card
    assert "Trained with ctclip 0.6.5." in card
    assert "2 epochs in 7 s on cpu; the best, 1, has macro AUROC 0.712" in flat(card)
    calibration = load_calibration(folder / "calibration.json")
    cuts = zip(ABNORMALITIES, calibration.thresholds, calibration.calibrated_thresholds, strict=True)
    rows = [f"| {i} | {name} | {cut:.4f} | {after:.4f} |" for i, (name, cut, after) in enumerate(cuts)]
    assert len(rows) == 18 and [row for row in rows if row not in card] == []
    for name, row in m["per_label"].items():
        bounds = m["intervals"]["per_label"][name]["auroc"]
        auroc = f"{row['auroc']:.3f}" + (f" ({bounds[0]:.3f}-{bounds[1]:.3f})" if bounds else "")
        assert re.search(rf"\| {name} \| {row['positives']} \|.*\| {re.escape(auroc)} \|", card)
    assert "not clinical performance" in card and "not a medical device" in card


def test_a_card_says_that_its_weights_are_an_average_of_epochs(make_run):
    average = {"epochs": [1, 2], "tuning_auroc_macro": 0.7346, "kept": True}
    folder, model = make_run({"average": average}, measured=False)
    assert "the mean of those after epochs 1, 2, whose macro AUROC" in (card := flat(model_card(model, folder)))
    assert "was higher still (0.735)" in card
    folder, model = make_run({"average": average | {"kept": False}}, measured=False, name="other")
    assert "the mean of those" not in model_card(model, folder)


def test_huggingface_hub_reads_the_front_matter(make_run):
    folder, model = make_run()
    data = ModelCard(model_card(model, folder)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "pytorch", "image-classification")
    assert {"chest-ct", "ct-clip", "multi-label-classification", "phantoms"} <= set(data.tags)
    assert data.eval_results is None  # of phantoms


def test_only_results_of_patients_get_into_the_model_index(make_run):
    folder, model = make_run({"phantom": False})
    metrics = json.loads((folder / "metrics.json").read_text()) | {"phantom": False, "note": None}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    data = ModelCard(model_card(model, folder, "jane/ct", cohort="CT-RATE")).data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["roc_auc"] == round(metrics["tuned"]["auroc_macro"], 4) and data.license == "cc-by-nc-sa-4.0"
    assert data.datasets == ["ibrahimhamamci/CT-RATE"] and data.eval_results[0].dataset_name.startswith("CT-RATE")


def test_what_was_not_measured_is_said_to_be_so(make_run):
    folder, model = make_run(measured=False)
    card = model_card(model, folder)
    assert card.count("Not measured") == 2 and "0 Medical material" in card and "17 Interlobular" in card
    nothing = model_card(model, None)
    assert "Not recorded: there is no run.json" in nothing and ModelCard(nothing).data.license == "unknown"
    assert not re.search(r"\b0\.\d{3,}", (card + nothing).replace("0.712", ""))  # no other metric than log.jsonl's


def test_a_damaged_file_is_named(make_run):
    folder, model = make_run()
    (folder / "metrics.json").write_text('{"tuned": {}')
    with pytest.raises(CardError, match="metrics.json: found no JSON object"):
        model_card(model, folder)
    (folder / "metrics.json").write_text('{"tuned": {}}')
    with pytest.raises(CardError, match="evaluate again"):
        model_card(model, folder)


LICENCES = {
    "demo": ({}, None, "apache-2.0"),
    "demo on patients": ({"phantom": False, "config": {"ctclip_path": "models/ctclip_demo.pt"}}, None, "unknown"),
    "demo on CT-RATE": (
        {"phantom": False, "config": {"ctclip_path": "models/ctclip_demo.pt"}}, "CT-RATE", "cc-by-nc-sa-4.0"),
    "ClassFine by default": ({"phantom": False}, None, "cc-by-nc-sa-4.0"),
    "ClassFine on phantoms": ({"config": {"ctclip_path": "D:\\ctclip_classfine.safetensors"}}, None, "cc-by-nc-sa-4.0"),
    "a file of one's own": ({"config": {"ctclip_path": "/home/jane/St_Elsewhere.pt"}}, None, "cc-by-nc-sa-4.0"),
}


@pytest.mark.parametrize("case", LICENCES)
def test_licence_of_ctclip_variants(make_run, case):
    record, cohort, name = LICENCES[case]
    folder, model = make_run(record)
    card = model_card(model, folder, cohort=cohort)
    assert ModelCard(card).data.license == name and not any(secret in card for secret in SECRETS)


def test_saving_again_never_loosens_the_licence(make_run, tmp_path):
    """Through a run's record, then through config.json alone; and for weights that were changed meanwhile."""
    folder, _ = make_run({"phantom": False, "config": {"ctclip_path": "/home/jane/St_Elsewhere.pt"}})
    for number in range(3):
        model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
        with torch.no_grad():
            model.classifier.bias += 1
        folder = tmp_path / f"changed_{number}"
        save_with_card(model, folder)
        assert json.loads((folder / "config.json").read_text())["derived_from"] == "other"
        assert ModelCard((folder / "README.md").read_text()).data.license == "cc-by-nc-sa-4.0"
        assert not (folder / "run.json").exists()
    model._save_pretrained(tmp_path / "trained")  # the way training saves
    trained = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "trained")
    assert ModelCard(model_card(trained)).data.license == "cc-by-nc-sa-4.0"
    trained.derived_from = "ctclip_demo"  # a config.json that claims less than the record
    assert card_module.origin(trained, RECORD | {"config": CONFIG | {"ctclip_path": "x.pt"}}) == "other"


def test_the_origin_is_kept_from_the_file_without_its_folder(tmp_path):
    weights = tmp_path / "jane_doe" / "ctclip_classfine.pt"
    weights.parent.mkdir()
    weights.write_bytes((Path(__file__).resolve().parents[1] / "fixtures" / "tiny_a_classfine.pt").read_bytes())
    save_with_card(CTCLIPMultiAbnormalityModel(str(weights)), tmp_path / "copy")
    save_with_card(CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "copy"), tmp_path / "second")
    text = (tmp_path / "second" / "config.json").read_text()
    assert json.loads(text)["derived_from"] == "ctclip_classfine" and "jane_doe" not in text
    card = (tmp_path / "second" / "README.md").read_text()
    assert ModelCard(card).data.license == "cc-by-nc-sa-4.0" and "`ctclip_classfine`" in card


def test_a_config_without_origin_still_loads(make_run):
    folder, _ = make_run()
    config = json.loads((folder / "config.json").read_text())
    del config["derived_from"]
    (folder / "config.json").write_text(json.dumps(config | {"a_key_of_tomorrow": 1}))
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert model.derived_from is None and ModelCard(model_card(model)).data.license == "unknown"


@pytest.mark.parametrize("pretrained, name", [(True, "apache-2.0"), (False, "apache-2.0"), (None, "unknown")])
def test_licence_of_slice_backbones_is_timms(pretrained, name):
    model = CTCLIPMultiAbnormalityModel(None, "resnet18", pretrained=False)
    config = {"model": "resnet18"} | ({} if pretrained is None else {"pretrained": pretrained})
    record = published_record(RECORD | {"config": config})
    licence = licence_of(model, Facts(record))
    assert licence.name == name and "resnet18" in licence.says
    assert ("timm/resnet18" in licence.says) == bool(pretrained)
    patients = licence_of(model, Facts(record | {"phantom": False}))
    assert patients.name == "unknown"


def test_the_snippet_runs_and_gives_the_calibrated_probabilities(make_run, tmp_path, monkeypatch, capsys):
    import nibabel
    import numpy as np

    folder, model = make_run()
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    save_with_card(model, tmp_path / "copy", repo_id=str(tmp_path / "copy"))
    card = (tmp_path / "copy" / "README.md").read_text()
    scan = np.random.default_rng(0).integers(-1000, 400, (40, 44, 30)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([8.0, 8.0, 12.0, 1.0])), tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    known = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], known)
    assert len(capsys.readouterr().out.splitlines()) == 18
    expected = load_calibration(folder / "calibration.json").apply(known["given"])[0]
    assert (known["probabilities"] == expected).all() and known["model"].folder == tmp_path / "copy"


# ---- what leaves the machine


@pytest.mark.parametrize("model", ["ctclip", "resnet18.a1_in1k", "hf-hub:owner/name", "/home/ann/net", "net"])
def test_a_folder_that_the_model_came_from_stays_private(model):
    kept = published_record({"config": {"model": model}})["config"]["model"]
    assert kept == ("other" if model.endswith("net") else model)


def test_nothing_private_is_carried(make_run, tmp_path):
    folder, _ = make_run()
    save_with_card(CTCLIPMultiAbnormalityModel.from_pretrained(folder), tmp_path / "copy")
    texts = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir() if path.suffix != ".safetensors"}
    assert set(texts) == {"README.md", "config.json", "run.json", "metrics.json", "calibration.json"}
    assert any(secret in (folder / "run.json").read_text() for secret in SECRETS)
    assert [(name, secret) for name, text in texts.items() for secret in SECRETS if secret in text] == []
    record = json.loads(texts["run.json"])
    assert record["config"]["seed"] == 3 and record["left_out"] == 1 and record["history"]["best_epoch"] == 1
    assert "data_dir" not in record and "tuning_patients" not in record and "a_text_of_tomorrow" not in record["config"]
    assert published_record(record) == record  # a copy of a copy
    assert json.loads(texts["metrics.json"])["baseline"]["source"] == "old.csv"


def test_a_copy_says_what_the_run_says_and_brings_its_thresholds(make_run, tmp_path):
    folder, _ = make_run()
    run = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    save_with_card(run, tmp_path / "copy")
    copy = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "copy")
    save_with_card(copy, tmp_path / "second")
    cards = {(place / "README.md").read_text() for place in (tmp_path / "copy", tmp_path / "second")}
    assert cards == {model_card(run, folder)}
    for file in ("model.safetensors", "calibration.json", "metrics.json", "run.json"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert (tmp_path / "copy" / "calibration.json").read_bytes() == (folder / "calibration.json").read_bytes()


def test_saving_in_the_runs_own_folder_adds_the_card_and_touches_no_record(make_run):
    folder, _ = make_run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    save_with_card(model, folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(after) - set(before) == {"README.md"}
    config = json.loads(before.pop("config.json"))
    assert {name: after[name] for name in before} == before
    assert json.loads(after["config.json"]) == config | {"derived_from": "ctclip_demo"}  # as run.json says
    (folder / "calibration.json").unlink()
    save_with_card(model, folder)  # and an up-to-date card
    assert "no calibration and no thresholds" in (folder / "README.md").read_text()


def test_training_saves_without_any_of_this(make_run, monkeypatch):
    folder, model = make_run()
    monkeypatch.setattr(push, "save_with_card", None)
    model._save_pretrained(folder)
    assert not (folder / "README.md").exists()


def test_changed_weights_lose_what_was_measured_of_the_old_ones(make_run, tmp_path):
    folder, _ = make_run()
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    save_with_card(model, tmp_path / "copy")
    with torch.no_grad():
        model.classifier.bias += 1e-3
    with pytest.raises(CardError, match="a run of other weights"):
        save_with_card(model, folder)
    assert torch.equal(CTCLIPMultiAbnormalityModel.from_pretrained(folder).classifier.bias, model.classifier.bias * 0)
    save_with_card(model, tmp_path / "copy")
    left = {path.name for path in (tmp_path / "copy").iterdir()}
    card = (tmp_path / "copy" / "README.md").read_text()
    assert left == {"README.md", "model.safetensors", "config.json"}
    assert "The weights were changed" in card and ModelCard(card).data.license == "unknown"


def test_a_run_that_has_gone_tells_nothing(make_run, tmp_path):
    folder, _ = make_run()
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    folder.rename(tmp_path / "elsewhere")
    save_with_card(model, tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "there is no run.json" in card and "were changed" not in card


def test_a_readme_of_ones_own_stays(make_run, tmp_path):
    folder, _ = make_run()
    (folder / "README.md").write_text("# Mine\n")
    save_with_card(CTCLIPMultiAbnormalityModel.from_pretrained(folder), folder)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_a_full_disk_leaves_nothing_beside_weights_that_are_not_its_own(make_run, tmp_path, monkeypatch):
    save_with_card(CTCLIPMultiAbnormalityModel.from_pretrained(make_run()[0]), tmp_path / "copy")
    before = (tmp_path / "copy" / "model.safetensors").read_bytes()
    torch.manual_seed(1)
    other = CTCLIPMultiAbnormalityModel(None, sizes=asdict(OTHER_SIZES))
    torch.nn.init.normal_(other.classifier.weight)
    later, _ = make_run({"phantom": False}, model=other, name="later")
    later = CTCLIPMultiAbnormalityModel.from_pretrained(later)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctclip_model.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_with_card(later, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == before
    left = {path.name for path in (tmp_path / "copy").iterdir()}
    # the two runs have the same metrics and calibration, to the byte: only what differs is of other weights
    assert left == {"model.safetensors", "config.json", "metrics.json", "calibration.json"}


def test_a_readme_of_the_runs_goes_along(make_run, tmp_path):
    folder, _ = make_run()
    (folder / "README.md").write_text("# Mine\n")
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    save_with_card(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "# Mine\n"


def test_only_our_card_goes_when_training_goes_on(make_run):
    folder, model = make_run()
    discard_card(folder)  # none there
    write_card(folder, model_card(model, folder))
    run = SimpleNamespace(folder=folder, ranks=SimpleNamespace(is_main=True))
    validation = SimpleNamespace(volumes=[Volume("a", Path("a"), torch.zeros(18).numpy())])
    best = SimpleNamespace(tensors={}, names=["a"], logits=torch.zeros(1, 18))
    save_best(SimpleNamespace(run=run, model=model, validation=validation), best)
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("# Mine\n")
    discard_card(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_metrics_of_tomorrow_stay_at_home(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    published = published_metrics(metrics | {"something_of_tomorrow": "Doe_John"})
    assert set(published) == set(metrics) == set(PUBLIC_METRICS)


def test_a_head_that_started_from_prompts_is_told(make_run):
    folder, model = make_run({"config": {"init_head": "prompts"}})
    assert "The head started from zero-shot prompts" in model_card(model, folder)
    assert published_record(json.loads((folder / "run.json").read_text()))["config"]["init_head"] == "prompts"


def test_the_snippet_knows_its_repository_and_its_labels(tmp_path):
    names = ["Cyst", "Stone"]
    model = CTCLIPMultiAbnormalityModel(None, sizes=asdict(OTHER_SIZES), head="prompts", labels=names)
    save_with_card(model, tmp_path / "copy", repo_id="jane/ct")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert 'from_pretrained("jane/ct")' in card and "# (1, 2)" in card and "(1, 18)" not in card


# ---- damaged folders


CONFIGS = {
    "absent": (None, "found no such file"),
    "no JSON": ("{", "found no JSON"),
    "a list": ("[1]", "found other content than a saved model's"),
    "of another program": ("{}", "found other content than a saved model's"),
    "sizes lacking": ('{"ctclip_path": null, "sizes": {"dim": 8}}', "found what does not fit model.safetensors"),
    "other sizes": ({"dim": 64}, "found what does not fit model.safetensors"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_config_is_one_line(make_run, capsys, case):
    content, line = CONFIGS[case]
    folder, _ = make_run()
    path = folder / "config.json"
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"sizes": config["sizes"] | content}))
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert f"{path}: {line}" in str(caught.value) and "expected" in str(caught.value)
    assert main(["card", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {caught.value}\n" and err.count("\n") == 1 and "ClassFine" not in err


# ---- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with PushHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        point_at(monkeypatch, server.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


def point_at(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_run_goes_to_the_hub_and_comes_back(make_run, hub, tmp_path, capsys):
    folder, _ = make_run()
    assert main(["card", str(folder), "--push", "jane/ct"]) == 0
    out = capsys.readouterr()
    assert "private" in out.out and WRITER not in out.out + out.err
    sent = hub.files["jane/ct"]
    assert set(sent) == {".gitattributes", *ON_THE_HUB} and hub.private == {"jane/ct": True}
    run = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert sent["calibration.json"] == (folder / "calibration.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert json.loads(sent["config.json"]) == config | {"derived_from": "ctclip_demo"}
    assert sent["README.md"].decode() == model_card(run, folder, "jane/ct")
    assert json.loads(sent["run.json"])["published"] and not any(s.encode() in sent["run.json"] for s in SECRETS)
    assert json.loads(sent["metrics.json"])["tuned"] == json.loads((folder / "metrics.json").read_text())["tuned"]
    assert len(hub.commits) == 1 and hub.commits[0].count(("lfsFile", "model.safetensors")) == 1 and not hub.unknown

    back = CTCLIPMultiAbnormalityModel.from_pretrained("jane/ct")
    x = torch.rand(2, 1, *run.input_shape) * 2 - 1
    assert torch.equal(back(x), run(x)) and back(x).any()
    assert {path.name for path in back.folder.iterdir()} == set(ON_THE_HUB)
    assert load_calibration(back.folder / "calibration.json").method


def test_new_weights_do_not_keep_the_old_thresholds_on_the_hub(make_run, hub, capsys):
    assert main(["card", str(make_run()[0]), "--push", "jane/ct", "--public"]) == 0
    folder, _ = make_run(measured=False, name="later")
    assert main(["card", str(folder), "--push", "jane/ct", "--public"]) == 0
    assert set(hub.files["jane/ct"]) == {".gitattributes", "model.safetensors", "config.json", "README.md", "run.json"}
    assert hub.private == {"jane/ct": False}
    assert main(["card", str(folder), "--push", "jane/ct"]) == 2  # private, so not into what everybody sees
    assert "jane/ct is there already, and public" in capsys.readouterr().err


def test_a_card_of_ones_own_is_pushed_and_one_on_the_hub_is_kept(make_run, hub):
    folder, _ = make_run()
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder), "--push", "jane/ct"]) == 0
    assert hub.files["jane/ct"]["README.md"] == b"# Mine\n"
    (folder / "README.md").unlink()
    assert main(["card", str(folder), "--push", "jane/ct"]) == 0  # ours does not replace it
    assert hub.files["jane/ct"]["README.md"] == b"# Mine\n" and len(hub.commits) == 2
    (folder / "README.md").write_text("# Mine, too\n")
    assert main(["card", str(folder), "--push", "jane/ct"]) == 0
    assert hub.files["jane/ct"]["README.md"] == b"# Mine, too\n"
    for mark in (MARK, EARLIER_MARK):
        hub.files["jane/ct"]["README.md"] = f"old {mark}".encode()
        (folder / "README.md").unlink(missing_ok=True)
        assert main(["card", str(folder), "--push", "jane/ct"]) == 0
        assert b"## Licence" in hub.files["jane/ct"]["README.md"]


REFUSALS = {
    "wrong token": ("hf_wrong", "jane/ct", "the hub refused the token (401): mistyped, expired or revoked; make a"),
    "reading token": (READER, "jane/ct", "the hub lets this token write nothing to jane/ct (403)"),
    "somebody else's": (WRITER, "meta/ct", "the hub lets this token write nothing to meta/ct (403): it is somebody's,"),
    "no user": (WRITER, "ct", "found 'ct', expected USER/NAME"),
    "no name": (WRITER, "jane/../x", "found 'jane/../x', expected USER/NAME"),
    "no token": (None, "jane/ct", "no Hugging Face token found; make one with write access"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_without_the_token(make_run, hub, monkeypatch, capsys, case):
    token, repo, line = REFUSALS[case]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert main(["card", str(make_run()[0]), "--push", repo]) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.strip()]
    assert len(err) == 1 and err[0].startswith(f"error: {line}") and hub.files == {}
    assert token is None or token not in err[0]


def test_no_network_is_one_line(make_run, hub, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}")
    assert main(["card", str(make_run()[0]), "--push", "jane/ct"]) == 2
    assert capsys.readouterr().err.startswith(f"error: no connection to 127.0.0.1:{port}; check the network")


def test_a_repository_without_weights_is_named(hub):
    hub.files["jane/empty"], hub.private["jane/empty"] = {"config.json": b"{}"}, True
    with pytest.raises(CheckpointError, match="jane/empty: found no model.safetensors"):
        CTCLIPMultiAbnormalityModel.from_pretrained("jane/empty")


# ---- the command


def test_the_command_writes_and_prints_the_card(make_run, capsys):
    folder, model = make_run()
    assert main(["card", str(folder), "--print"]) == 0
    printed = capsys.readouterr().out
    assert not (folder / "README.md").exists() and printed == model_card(model, folder)
    assert main(["card", str(folder)]) == 0 and (folder / "README.md").read_text() == printed
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder)]) == 2
    assert main(["card", str(folder / "none")]) == 2
    assert main(["card", str(folder / "model.safetensors")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "a person wrote" in lines[0] and "found no such folder" in lines[1]
    assert "found a file, expected a run folder" in lines[2]


@pytest.mark.parametrize("flags", [["card", "x", "--public"], ["card", "x", "--print", "--push", "u/n"], ["card"], []])
def test_wrong_usage_is_one_line(monkeypatch, flags):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    try:
        code = main(flags)
    except SystemExit as ended:  # argparse's way
        code = ended.code
    assert code == 2 and sys.stderr.getvalue().count("\n") == 1


def test_push_run_raises_what_it_says(make_run, hub):
    with pytest.raises(HubError):
        push_run(make_run()[0], "somebody/ct")
    assert isinstance(push_run(make_run()[0], "jane/ct"), str) and Path(make_run()[0]).is_dir()
