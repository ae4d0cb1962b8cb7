"""What only a CUDA machine can show: mixed precision, accumulation, real lack of memory, codes against the CPU's.

Skipped, visibly, everywhere else."""

import math

import pytest
import torch
from helpers_training import history

from ctclip.training.loop import train
from ctclip.training.run import Machine, TrainingConfig
from ctclip_model import DEMO_PATH, CTCLIPMultiAbnormalityModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def config(phantoms, tmp_path):
    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "ctclip_path": DEMO_PATH, "cache_dir": str(tmp_path / "cache")}
        return TrainingConfig(**(base | {"epochs": 3, "freeze_epochs": 1, "batch_size": 8} | changes))

    return make


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_mixed_precision_comes_close_to_the_cpu(config, head, tmp_path):
    runs = {
        device: history(train(config(head=head, dropout=0.0), tmp_path / device, Machine(device=device)))
        for device in ("cpu", "cuda")
    }
    for expected, found in zip(runs["cpu"], runs["cuda"], strict=True):
        assert math.isfinite(found["train_loss"]) and found["skipped_steps"] == 0
        assert found["tuning_loss"] == pytest.approx(expected["tuning_loss"], abs=0.02)


def test_accumulation_gives_the_losses_of_whole_batches(config, tmp_path):
    losses = [
        [
            line["train_loss"]
            for line in history(train(config(dropout=0.0), tmp_path / str(size), Machine(micro_batch=size)))
        ]
        for size in (8, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)


def test_real_lack_of_memory_halves_the_micro_batch_and_goes_on(config, tmp_path, capsys):
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(600e6 / whole)
        machine = Machine(micro_batch=32, gradient_checkpointing="off")
        folder = train(config(batch_size=32, unfreeze_layers=0), tmp_path / "run", machine)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory on cuda" in capsys.readouterr().out
    assert len(history(folder)) == 3


def test_checkpointing_needs_less_memory(phantoms):
    peaks = []
    for enabled in (False, True):
        model = CTCLIPMultiAbnormalityModel(DEMO_PATH).cuda().train()
        model.set_gradient_checkpointing(enabled)
        torch.cuda.reset_peak_memory_stats()
        model(torch.rand(8, 1, *model.input_shape, device="cuda") * 2 - 1).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    assert peaks[1] < 0.8 * peaks[0]


def test_float32_codes_are_those_of_the_cpu(phantoms):
    model = CTCLIPMultiAbnormalityModel(DEMO_PATH).eval()
    volume = torch.rand(2, 1, *model.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        expected = model.code_ids(volume)
        found = model.cuda().code_ids(volume.cuda()).cpu()
    assert (expected == found).float().mean() > 0.9999
