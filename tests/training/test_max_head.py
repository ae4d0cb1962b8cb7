"""Head "max": against its definition token by token; its fit against a cohort in which one token of each positive
volume differs along a known direction; a run of it."""

import json

import pytest
import torch
from helpers_training import history, moved_between, one_line, train_until_step, weights

import ctclip_model
from ctclip.config import TrainingConfig
from ctclip.training import max_head
from ctclip.training.loop import train
from ctclip_model import CTCLIPMultiAbnormalityModel, MaxHead
from ctclip_training import main


@torch.no_grad()
def test_the_logit_is_the_mean_of_the_highest_tokens():
    torch.manual_seed(0)
    head = MaxHead(6, outputs=3, tokens=2)
    x = torch.randn(2, 4, 3, 2, 6)
    assert torch.equal(head(x), torch.zeros(2, 3))
    for parameter in head.parameters():
        parameter.normal_()
    values = x.flatten(1, 3) @ head.evidence.weight.T
    expected = values.sort(1, descending=True).values[:, :2].mean(1) + head.evidence.bias
    torch.testing.assert_close(head(x), expected)
    attention, evidence = head.attend(x)
    assert attention.shape == evidence.shape == (2, 3, 4, 3, 2) and attention.unique().tolist() == [0, 0.5]
    assert head(x[:, :1, :1, :1]).shape == (2, 3)  # of fewer tokens than it takes: all


def test_one_token_among_many_is_found():
    """Of 60 tokens one tells; a third axis varies thirty times as much and tells nothing."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(80, 2, generator=generator) < 0.4).float()
    tokens = torch.randn(80, 60, 8, generator=generator)
    tokens[..., 2] *= 30
    tokens[:, 7, 0] += 6 * labels[:, 0]
    tokens[:, 40, 1] -= 6 * labels[:, 1]
    labels[:40, 0] = torch.where(torch.rand(40, generator=generator) < 0.2, torch.tensor(-1.0), labels[:40, 0])
    head = MaxHead(8, outputs=3, tokens=1)
    wanted = torch.cat([labels, torch.zeros(80, 1)], 1)
    found = max_head.fit_max_head(head, lambda number: tokens[number], wanted[:40], generator)
    assert found[:2].min() > 0.9 and found[2].isnan()
    logits = head(tokens[40:, None, None]).detach()
    assert max_head.ranking(logits.T[:2, None], labels[40:].T).min() > 0.9
    assert (logits[:, 2] == 0).all() and logits.abs().max() < 20
    assert head.evidence.weight[0].abs().argmax() == 0 and head.evidence.weight[1].abs().argmax() == 1


def test_axes_of_large_variance_are_kept(monkeypatch):
    monkeypatch.setattr(max_head, "MOST_AXES", 2)
    tokens = torch.randn(4, 500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 2, 7, 3]) + 5
    mean, whitening = max_head.moments(lambda number: tokens[number], 4)
    assert whitening.shape == (5, 2) and set(whitening.abs().argmax(0).tolist()) == {1, 3}
    white = ((tokens - mean) @ whitening).flatten(0, 1)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(2), atol=0.03, rtol=0)


@pytest.mark.usefixtures("fast")
def test_a_run_fits_trains_and_goes_on_with_the_same_bits(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(ctclip_model, "SLICE_INPUT_SHAPE", (24, 64, 64))
    settings = TrainingConfig(
        data_dir=str(phantoms), model="test_resnet", pretrained=False, cache_dir=str(tmp_path / "cache"), limit=12,
        batch_size=4, epochs=2, freeze_epochs=1, head="max", tokens="patch", feature_stride=16, adapt="last:1",
    )  # fmt: skip
    whole = train(settings, tmp_path / "whole")
    assert [record["stage"] for record in history(whole)] == ["frozen", "unfrozen"]
    train_until_step(settings, tmp_path / "run", 4)
    again = train(settings, tmp_path / "run")
    assert not moved_between(weights(whole), weights(again))
    model = CTCLIPMultiAbnormalityModel.from_pretrained(whole)
    assert model.head_name == "max" and model.classifier.evidence.weight.any()
    assert json.loads((whole / "config.json").read_text())["head"] == "max"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--head", "max"], "found --head max with --model ctclip, expected a slice backbone"),
        (["--model", "r3d_18", "--head", "max"], "--head"),
        (["--model", "test_vit", "--head", "max", "--freeze-epochs", "0"], "found --head max with --freeze-epochs 0, "),
        (["--model", "test_vit", "--head", "max", "--augment"], "found --head max with --augment, expected frozen"),
        (["--model", "test_vit", "--head", "max", "--dropout", "0.5"], "found --dropout, which goes with another head"),
        (["--model", "test_vit", "--head", "max", "--no-pretrained", "--search", "2"], "--head max with --search"),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_one_line(phantoms, tmp_path, capsys, flags, line):
    assert main([*flags, "--data-dir", str(phantoms), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert line in error and one_line(error)
