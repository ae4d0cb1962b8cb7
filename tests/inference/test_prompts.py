"""Prompts against the golden text latents and probabilities (made by the published implementation), the definition of
p(present) as a softmax over a pair, token ids written out by hand, and a model rebuilt where none of it can be had."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ctclip_model
from ctclip.errors import UserError
from ctclip.hub.weights import make_slim
from ctclip.inference.prompts import read_prompts
from ctclip.training.run import TrainingConfig, build_model
from ctclip_model import (
    ABNORMALITIES,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    PromptError,
    Prompts,
    prompt_weights,
    read_checkpoint,
    read_vocabulary,
    text_latents,
    tokenise,
    vocabulary_path,
)

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
STATE = read_checkpoint(FIXTURES / "tiny_a_clip.pt")
WORDS = sorted({word for name in ABNORMALITIES for word in name.lower().split()})
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "not", "present", ".", *WORDS, "##s"]  # 40, as the tower has rows
OWN = "Lung nodules\nEffusion\tpleural effusion\tnot pleural effusion\n# a remark\n\nHernia\n"


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "tiny_a_expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file if file[key].dtype.kind in "fi"}


@pytest.fixture
def weights(tmp_path) -> Path:
    """A zero-shot file with its vocabulary beside it."""
    path = tmp_path / "ctclip_zeroshot.pt"
    path.write_bytes((FIXTURES / "tiny_a_clip.pt").read_bytes())
    write_vocabulary(path, PIECES)
    return path


def write_vocabulary(path: Path, pieces: list[str]) -> None:
    vocabulary_path(path).parent.mkdir(exist_ok=True)
    vocabulary_path(path).write_text("\n".join(pieces) + "\n", encoding="utf-8")


def vocabulary(path: Path) -> list[str]:
    return read_vocabulary(vocabulary_path(path))


def without_transformers(monkeypatch) -> None:
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)


def refusal(function, *args, kind=PromptError, **kwargs) -> str:
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- golden numbers ----------------------------------------------------------------------------------------------------


def test_text_latents_equal_the_published_implementation(expected):
    latents = text_latents(STATE, expected["prompt_ids"], expected["prompt_mask"])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected["text_latents"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_model_answers_as_the_published_implementation(expected, weights, monkeypatch):
    """The golden prompts are token ids of no language: they stand in for the tokenised texts."""
    monkeypatch.setattr(ctclip_model, "tokenise", lambda *args: (expected["prompt_ids"], expected["prompt_mask"]))
    model = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    assert model.head_name == "prompts" and model.labels == ABNORMALITIES
    torch.testing.assert_close(model(expected["volume"]).sigmoid(), expected["prompt_probs"], rtol=0, atol=1e-5)
    from_codes = model.head(model.features_from_cache(model.encode_for_cache(expected["volume"])))
    torch.testing.assert_close(from_codes.sigmoid(), expected["prompt_probs"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_head_is_the_softmax_over_the_pair(expected, weights):
    """The definition, one finding at a time: similarities to both texts, a softmax over the two."""
    model = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    ids, mask = tokenise(Prompts.from_names(ABNORMALITIES), vocabulary(weights), 64)
    image, text = model.encode(expected["volume"]), text_latents(STATE, ids, mask)
    similarity = image @ text.T * STATE["temperature"].exp()  # (2, 36)
    for label in range(18):
        direct = similarity[:, 2 * label : 2 * label + 2].softmax(1)[:, 0]
        found = model(expected["volume"]).sigmoid()[:, label]
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-6)
    assert (image < 0).any() and model.classifier.bias.abs().max() == 0


def test_padding_and_company_change_nothing(expected):
    ids, mask = expected["prompt_ids"], expected["prompt_mask"]
    whole = text_latents(STATE, ids, mask)
    wider = torch.nn.functional.pad(ids, (0, 9), value=7), torch.nn.functional.pad(mask, (0, 9))
    torch.testing.assert_close(text_latents(STATE, *wider), whole, rtol=0, atol=1e-6)
    for row in (0, 1, 17):
        length = int(mask[row].sum())
        alone = text_latents(STATE, ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-6)
    assert int(mask[1].sum()) < mask.shape[1]


def test_half_precision_files_are_computed_in_float32(expected):
    half = {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    latents = text_latents(half, expected["prompt_ids"], expected["prompt_mask"])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected["text_latents"], rtol=0, atol=5e-3)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_what_bert_makes_of_a_text(weights):
    """By hand: lower case, accents off, punctuation split off, the longest piece first, [CLS] and [SEP] around."""
    prompts = Prompts(("a", "b"), ("Lung NODULES.", "is"), ("nódule", "pleural effusion is not present."))
    ids, mask = tokenise(prompts, vocabulary(weights), 64)
    by_hand = [
        ["[CLS]", "lung", "nodule", "##s", ".", "[SEP]"],
        ["[CLS]", "nodule", "[SEP]"],
        ["[CLS]", "is", "[SEP]"],
        ["[CLS]", "pleural", "effusion", "is", "not", "present", ".", "[SEP]"],
    ]
    assert len(PIECES) == 40 and ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape == (4, 8)
    for row, pieces in enumerate(by_hand):
        filled = [PIECES.index(piece) for piece in pieces] + [0] * (8 - len(pieces))
        assert ids[row].tolist() == filled and mask[row].tolist() == [1] * len(pieces) + [0] * (8 - len(pieces))


def test_a_text_that_is_too_long_or_cannot_be_spelled_is_named(weights):
    long = Prompts(("Hernia", "Long"), ("hernia", "lung " * 63), ("not hernia", "not long"))
    assert "a text of 'Long' has 65 tokens, expected at most 64" in refusal(
        prompt_weights, STATE, long, vocabulary_path(weights)
    )
    fits = replace(long, present=("hernia", "lung " * 62), absent=("not hernia", "not lung"))
    assert prompt_weights(STATE, fits, vocabulary_path(weights)).shape == (2, 16)
    assert "a text of 'Herniá 肺' has words" in refusal(
        prompt_weights, STATE, Prompts.from_names(["Hernia", "Herniá 肺"]), vocabulary_path(weights)
    )


def test_a_vocabulary_of_another_tower_is_refused(weights):
    write_vocabulary(weights, [*PIECES, "one more"])
    said = refusal(CTCLIPMultiAbnormalityModel, str(weights), head="prompts", kind=CheckpointError)
    assert f"{vocabulary_path(weights)}: found 41 lines, expected 40" in said
    write_vocabulary(weights, PIECES[1:])
    assert "found a vocabulary without [PAD]" in refusal(vocabulary, weights)
    vocabulary_path(weights).write_bytes(b"\xff\xfe")
    assert "found no text" in refusal(vocabulary, weights)


# -- the file of findings ----------------------------------------------------------------------------------------------


def test_prompts_file_takes_findings_with_and_without_wording(tmp_path):
    file = tmp_path / "my.txt"
    file.write_bytes("\ufeff# mine\nRib fracture\r\n\n  Goitre\tA goitre is seen\tNo goitre\n".encode())
    assert read_prompts(file) == Prompts(
        ("Rib fracture", "Goitre"),
        ("Rib fracture is present.", "A goitre is seen"),
        ("Rib fracture is not present.", "No goitre"),
    )
    pair = ["Medical material is present.", "Medical material is not present."]
    assert Prompts.from_names(ABNORMALITIES).pairs()[:2] == pair


FAULTS = {
    "empty": (b"", "found no finding, expected one per line"),
    "remarks only": (b"# Hernia\n\n", "found no finding"),
    "twice": (b"Hernia\nhernia\n", "found 'hernia' twice, expected every finding once"),
    "two parts": (b"Goitre\nHernia\thernia\n", "line 2: found 2 parts between tabs, expected"),
    "an empty part": (b"Hernia\t\tno hernia\n", "line 1: found 3 parts between tabs, one empty, expected"),
    "twice but for case and spaces": (b"Hernie ou\nHERNIE  ou\n", "found 'hernie ou' twice, expected"),
    "latin-1": ("Hernie où\n".encode("latin-1"), "found bytes that are not UTF-8 (at 8)"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_prompts_file_is_one_line(tmp_path, case):
    content, said = FAULTS[case]
    file = tmp_path / "my.txt"
    file.write_bytes(content)
    message = refusal(read_prompts, file)
    assert message.startswith(str(file)) and said in message and "; " in message


def test_a_prompts_file_that_is_not_there_or_a_folder(tmp_path):
    assert "found no such file" in refusal(read_prompts, tmp_path / "none.txt")
    assert "found it unreadable" in refusal(read_prompts, tmp_path)


def test_prompts_of_unequal_numbers_are_refused():
    assert "found 1 findings, 1 texts for and 0 against" in refusal(Prompts, ("a",), ("a",), ())
    assert "a text that is empty" in refusal(Prompts, ("a",), ("a",), (" ",))


# -- the model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_own_findings_are_saved_and_loaded_where_nothing_else_is(weights, tmp_path, monkeypatch, expected):
    (tmp_path / "my.txt").write_text(OWN, encoding="utf-8")
    model = CTCLIPMultiAbnormalityModel(str(weights), head="prompts", prompts=read_prompts(tmp_path / "my.txt")).eval()
    assert model.labels == ("Lung nodules", "Effusion", "Hernia")
    logits = model(expected["volume"])
    assert logits.shape == (2, 3) and logits.abs().min() > 0
    model.save_pretrained(tmp_path / "run")
    vocabulary_path(weights).unlink()
    weights.unlink()
    without_transformers(monkeypatch)
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run").eval()
    assert again.labels == model.labels and again.head_name == "prompts"
    assert torch.equal(again(expected["volume"]), logits)
    again.save_pretrained(tmp_path / "second")
    assert CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "second").labels == model.labels
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["labels"] == list(model.labels) and config["head"] == "prompts" and "prompts" not in config


def test_report_tells_where_the_head_came_from(weights):
    report = CTCLIPMultiAbnormalityModel(str(weights)).load_report
    assert report.new == () and report.no_prompts_reason is None
    assert report.loaded + sum(report.dropped.values()) == len(STATE)
    assert "head: prompts, for 18 findings, made from the file's text tower" in str(report)
    linear = CTCLIPMultiAbnormalityModel(str(weights), head="linear").load_report
    assert linear.new == ("classifier.weight", "classifier.bias") and str(linear).endswith("head: linear, new")
    classfine = CTCLIPMultiAbnormalityModel(str(FIXTURES / "tiny_a_classfine.pt")).load_report
    assert classfine.no_prompts_reason is None and str(classfine).endswith("head: linear, from the file")
    mlp = CTCLIPMultiAbnormalityModel(str(FIXTURES / "tiny_a_classfine.pt"), head="mlp").load_report
    assert str(mlp).endswith("head: mlp, its linear part from the file")


@pytest.mark.parametrize("lacking", ["vocabulary", "text tower", "transformers"])
@torch.no_grad()
def test_without_what_prompts_need_the_default_head_is_new_and_says_why(lacking, weights, monkeypatch, expected):
    said = "pip install transformers"
    if lacking == "vocabulary":
        vocabulary_path(weights).unlink()
        said = f"no vocabulary found at {vocabulary_path(weights)}, expected vocab.txt of microsoft/"
    elif lacking == "text tower":
        torch.save({key: value for key, value in STATE.items() if not key.startswith("text_")}, weights)
        said = "no text tower found in the file"
    else:
        without_transformers(monkeypatch)
    model = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    assert model.head_name == "linear" and torch.equal(model(expected["volume"]), torch.zeros(2, 18))
    assert model.load_report.new == ("classifier.weight", "classifier.bias")
    assert said in model.load_report.no_prompts_reason and model.load_report.no_prompts_reason in str(model.load_report)
    assert said in refusal(CTCLIPMultiAbnormalityModel, str(weights), head="prompts", kind=CheckpointError)


def test_classfine_keeps_its_head_unless_prompts_are_asked_for(tmp_path, expected):
    path = tmp_path / "ctclip_classfine.pt"
    path.write_bytes((FIXTURES / "tiny_a_classfine.pt").read_bytes())
    write_vocabulary(path, PIECES)
    model = CTCLIPMultiAbnormalityModel(str(path)).eval()
    torch.testing.assert_close(model(expected["volume"]), expected["classfine_logits"], rtol=0, atol=1e-5)
    prompted = CTCLIPMultiAbnormalityModel(str(path), head="prompts")
    assert prompted.load_report.dropped["ClassFine's linear head"] == 2 and prompted.classifier.bias.abs().max() == 0
    weight = prompt_weights(read_checkpoint(path), Prompts.from_names(ABNORMALITIES), vocabulary_path(path))
    assert torch.equal(prompted.classifier.weight, weight)


@torch.no_grad()
def test_a_slim_copy_answers_the_same(weights, expected):
    logits = CTCLIPMultiAbnormalityModel(str(weights)).eval()(expected["volume"])
    make_slim(weights)
    assert torch.equal(CTCLIPMultiAbnormalityModel(str(weights)).eval()(expected["volume"]), logits) and logits.any()


def test_arguments_that_do_not_go_together_are_refused(weights):
    prompts = Prompts.from_names(["Hernia"])
    for said, arguments in {
        "prompts go with head='prompts', found head=None": {"prompts": prompts},
        "labels that are not the prompts' names": {"head": "prompts", "prompts": prompts, "labels": ["Goitre"]},
        "found 1 labels of your own with head='linear'": {"head": "linear", "labels": ["Hernia"]},
    }.items():
        assert said in refusal(CTCLIPMultiAbnormalityModel, str(weights), kind=ValueError, **arguments)
    assert "is for CT-CLIP" in refusal(CTCLIPMultiAbnormalityModel, None, head="prompts", kind=ValueError)


def test_the_text_tower_is_not_part_of_the_model(weights):
    model = CTCLIPMultiAbnormalityModel(str(weights))
    own = set(CTCLIPMultiAbnormalityModel(str(weights), head="linear").state_dict())
    assert set(model.state_dict()) == own and model.classifier.weight.requires_grad


# -- a tower that is not whole -----------------------------------------------------------------------------------------


def test_damaged_text_towers_are_one_line(weights, expected):
    ids, mask = expected["prompt_ids"], expected["prompt_mask"]
    key = "text_transformer.encoder.layer.1.output.dense.bias"
    lacks = {name: value for name, value in STATE.items() if name != key}
    assert f"({key})" in refusal(text_latents, lacks, ids, mask)
    assert f"({key})" in refusal(text_latents, STATE | {key: torch.ones(23)}, ids, mask)
    extra = STATE | {"text_transformer.surprise": torch.ones(1)}
    assert "(text_transformer.surprise)" in refusal(text_latents, extra, ids, mask)
    words = "text_transformer.embeddings.word_embeddings.weight"
    assert f"no matrix {words} found" in refusal(text_latents, {k: STATE[k] for k in STATE if k != words}, ids, mask)
    assert "width 25, expected 768 or 24" in refusal(text_latents, STATE | {words: torch.ones(40, 25)}, ids, mask)


def test_transformers_says_nothing(weights):
    """In a process of its own, where it is imported for the first time; its verbosity is then as it was."""
    program = (
        "import sys, ctclip_model\n"
        "assert 'transformers' not in sys.modules\n"
        f"model = ctclip_model.CTCLIPMultiAbnormalityModel({str(weights)!r})\n"
        "from transformers.utils import logging\n"
        "print(model.head_name, logging.get_verbosity() == logging.WARNING)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "prompts True\n", "")


# -- training from there -----------------------------------------------------------------------------------------------


def test_training_starts_at_the_zero_shot_logits(weights, expected):
    config = TrainingConfig(ctclip_path=str(weights), init_head="prompts")
    model, zeroshot = build_model(config, phantom=False), CTCLIPMultiAbnormalityModel(str(weights))
    assert model.head_name == "prompts" and model.labels == ABNORMALITIES
    assert torch.equal(model.eval()(expected["volume"]), zeroshot.eval()(expected["volume"]))
    model.freeze_backbone()
    model.train()(expected["volume"]).sum().backward()
    assert model.classifier.weight.grad.abs().sum() > 0 and model.classifier.bias.grad.abs().sum() > 0
    dropped = torch.stack([model.head(torch.ones(1, 16)) for _ in range(3)])
    assert not torch.equal(dropped[0], dropped[1]) or not torch.equal(dropped[1], dropped[2])  # dropout


@pytest.mark.usefixtures("fast")
def test_a_run_from_prompts_goes_on_and_is_saved_with_its_head(weights, phantoms, tmp_path, expected):
    from ctclip_training import main

    flags = ["--data-dir", phantoms, "--ctclip-path", weights, "--cache-dir", tmp_path / "cache", "--batch-size", 8]
    flags += ["--epochs", 1, "--freeze-backbone", "--limit", 12, "--learning-rate", 1e-12, "--init-head", "prompts"]
    assert main([*map(str, flags), "--output-dir", str(tmp_path / "run")]) == 0
    run = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run").eval()
    zeroshot = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    assert run.head_name == "prompts"
    torch.testing.assert_close(run(expected["volume"]), zeroshot(expected["volume"]), rtol=0, atol=1e-6)
    assert main(["--resume", str(tmp_path / "run"), "--init-head", "prompts"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--init-head", "file"]) == 2


def test_init_head_goes_with_ctclip_and_the_linear_head(weights, tiny_classfine):
    for changes in ({"head": "mlp"}, {"head": "attention"}, {"model": "resnet18", "pretrained": False}):
        said = refusal(TrainingConfig(init_head="prompts", **changes).check, kind=UserError)
        assert said.startswith("found --init-head, which goes with --model ctclip and --head linear only")
    vocabulary_path(weights).unlink()
    config = TrainingConfig(ctclip_path=str(weights), init_head="prompts")
    assert "no vocabulary found" in refusal(build_model, config, False, kind=CheckpointError)
    assert build_model(replace(config, init_head="file"), False).head_name == "linear"


def test_a_run_of_before_there_was_a_choice_is_the_same_run():
    stored = asdict(TrainingConfig())
    assert stored.pop("init_head") == "file" and TrainingConfig(**stored) == TrainingConfig()


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_prompt_file_predicts_the_18_findings_and_ones_own(weights, tmp_path, monkeypatch, capsys):
    import pandas as pd
    from helpers_data import chest, write

    import run_task2
    from ctclip.data.preprocessing import preprocess_volume

    scan = write(tmp_path / "scans" / "a.nii.gz", chest())
    (tmp_path / "my.txt").write_text("Hernia\nLung nodules\n")
    flags = ["--mode", "predict", "--checkpoint", str(weights), "--input", str(scan.parent), "--device", "cpu"]
    assert run_task2.main([*flags, "--output", str(tmp_path / "all.csv")]) == 0
    assert "uncalibrated probabilities" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "all.csv", index_col=0).drop(columns=["Scale", "Warning"])
    model = CTCLIPMultiAbnormalityModel(str(weights)).eval()
    with torch.no_grad():
        answers = model(preprocess_volume(scan, shape=model.input_shape)[None]).sigmoid()
    np.testing.assert_allclose(table.to_numpy(), answers.numpy(), atol=6e-5)  # four digits
    assert run_task2.main([*flags, "--output", str(tmp_path / "all.json")]) == 0
    own = [*flags, "--prompts", str(tmp_path / "my.txt")]
    assert run_task2.main([*own, "--output", str(tmp_path / "own.csv"), "--explain", "hernia"]) == 0
    written = pd.read_csv(tmp_path / "own.csv", index_col=0)
    assert list(written.columns) == ["Hernia", "Lung nodules", "Scale", "Warning"]
    assert (tmp_path / "own_explain" / "a" / "Hernia.png").is_file()
    assert run_task2.main([*own, "--output", str(tmp_path / "own.html")]) == 0
    page = (tmp_path / "own.html").read_text()
    assert "Hernia" in page and "Cardiomegaly" not in page
    capsys.readouterr()
    assert run_task2.main([*own, "--output", str(tmp_path / "own.json")]) == 2
    assert "expected the challenge's 18 in a results.json" in capsys.readouterr().err
