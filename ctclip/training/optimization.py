"""What is optimised: the trainable parameters with optimizer, learning rates and moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ctclip.training.run import Run
from ctclip_model import HEAD_PREFIXES, CTCLIPMultiAbnormalityModel


def schedule(progress: float, start: float, end: float, warmup: float) -> float:
    """Fraction of the peak rate at `progress` (epochs): linear warm-up from `start`, times a cosine to 0 at `end`."""
    if progress < start:
        return 0.0
    done = (progress - start) / (end - start)
    rise = min(1.0, done / warmup) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class EMA:
    """Exponential moving average of parameters, by name. Off with decay 0."""

    def __init__(self, decay: float):
        self.decay = decay
        self.steps = 0
        self.live: dict[str, nn.Parameter] = {}
        self.averages: dict[str, Tensor] = {}

    def track(self, parameters: dict[str, nn.Parameter]) -> None:
        """From now on averages these; an average that exists goes on, a new one starts at the present value."""
        if self.decay:
            self.live = dict(parameters)
            self.averages = {name: value.detach().clone() for name, value in parameters.items()} | self.averages

    @torch.no_grad()
    def update(self) -> None:
        """With timm's warm-up of the decay: 0 at first, 1 - n ** (-2 / 3) at the n-th update, at most `decay`."""
        if self.averages:
            self.steps += 1
            average = get_ema_multi_avg_fn(min(self.decay, 1 - self.steps ** (-2 / 3)))
            average([self.averages[name] for name in self.live], list(self.live.values()), self.steps)


@contextmanager
def swapped_in(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily gives the model these tensors, by name."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in tensors}
    with torch.no_grad():
        before = {name: value.detach().clone() for name, value in own.items()}
        for name, value in own.items():
            value.copy_(tensors[name])
        try:
            yield
        finally:
            for name, value in own.items():
                value.copy_(before[name])


def rng_state(device: torch.device) -> dict[str, Tensor]:
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | on_gpu


def set_rng_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class TrainableParameters:
    """The parameters that are trained at present, by name: the head's, and those of the layers that are unfrozen."""

    def __init__(self, run: Run, model: CTCLIPMultiAbnormalityModel):
        self.run, self.model, self.config = run, model, run.config
        self.layers = model.layers()
        self.unfrozen = 0  # layers, counted from the output
        self.epoch = -1  # that `unfreeze` was last called for
        self.ema = EMA(self.config.ema_decay)
        self.every_parameter = dict(model.named_parameters())  # once: a walk through the model costs more than a step
        head = {id(parameter) for parameter in model.head_parameters()}
        self.parameters = {name: value for name, value in self.every_parameter.items() if id(value) in head}
        rates = self.config.head_learning_rate, self.config.backbone_learning_rate
        decay = self.config.layer_decay, self.config.weight_decay
        self.groups = model.parameter_groups(*rates, *decay, self.config.adapter_learning_rate)
        # One operation in place of ten per tensor: most of what a step of a small head on the CPU takes.
        self.optimizer = torch.optim.AdamW(self._groups_of(0, 0), fused=True if run.device.type == "cpu" else None)

    def _groups_of(self, layer: int, start: int) -> list[dict]:
        """AdamW groups of a layer (0: the head), trained from the epoch `start` on."""
        chosen = [group for group in self.groups if group["layer"] == layer]
        return [group | {"peak": group["lr"], "start": start, "lr": 0.0} for group in chosen]

    @property
    def backbone_frozen(self) -> bool:
        return self.unfrozen == 0

    def unfreeze(self, epoch: int) -> None:
        """Unfreezes the layers that are to be trained in this epoch, those nearest to the output first."""
        for at in range(self.config.frozen_epochs, epoch + 1):
            while self.unfrozen < self.config.unfrozen_layers(at, len(self.layers)):
                self.unfrozen += 1
                self.parameters |= {name: self.every_parameter[name] for name in self.layers[-self.unfrozen]}
                for group in self._groups_of(self.unfrozen, at):
                    self.optimizer.add_param_group(group)
        self.epoch = epoch
        if self.unfrozen:
            self.model.unfreeze_backbone(self.unfrozen)
        else:
            self.model.freeze_backbone()
        self.ema.track(self.parameters)

    def tensors(self, epoch: int | None = None) -> dict[str, Tensor]:
        """Every tensor that training may have changed at the end of an epoch (default: by now): parameters, and
        BatchNorm statistics of CBAM and of a slice backbone."""
        unfrozen = self.unfrozen if epoch is None else self.config.unfrozen_layers(epoch, len(self.layers))
        names = [*self.parameters, *(name for layer in self.layers[len(self.layers) - unfrozen :] for name in layer)]
        found = {name: self.every_parameter[name].detach() for name in names}
        if not self.model.is_ctclip:  # CT-CLIP's buffers (codebook, zeros) are fixed
            buffers = dict(self.model.named_buffers())
            found |= {name: buffers[name] for name in buffers if unfrozen or name.startswith(HEAD_PREFIXES)}
        saved = self.model.state_dict()
        return {name: value for name, value in found.items() if name in saved}

    def set_learning_rates(self, progress: float) -> None:
        """To the schedule's value at `progress` (epochs)."""
        for group in self.optimizer.param_groups:
            warmup, end = self.config.warmup_fraction, self.config.epochs
            group["lr"] = group["peak"] * schedule(progress, group["start"], end, warmup)

    def snapshot(self) -> dict:
        """Random-number state and BatchNorm statistics: what forward passes change before the optimizer's step."""
        statistics = [] if self.model.is_ctclip else [buffer.clone() for buffer in self.model.buffers()]
        return {"rng": rng_state(self.run.device), "statistics": statistics}

    def roll_back(self, snapshot: dict) -> None:
        """Discards the gradients of a step that the optimizer has not taken, and all else that it has changed."""
        self.optimizer.zero_grad()
        set_rng_state(self.run.device, snapshot["rng"])
        for buffer, value in zip(self.model.buffers(), snapshot["statistics"], strict=False):
            buffer.copy_(value)

    def average_gradients(self) -> None:
        """Over the ranks, once a step: before it, one may need more passes than another, run out of memory, or have
        nothing readable, without leaving the others waiting inside a backward pass."""
        if self.run.ranks.world > 1:
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.run.ranks.average(parameter.grad)

    def clip_and_step(self) -> bool:
        """Clips the gradients and takes one optimizer step; False, and no step, if they are not finite.

        An overflow is part of loss scaling, and counts as finite until the scale has nowhere left to go.
        """
        scaler = self.run.scaler
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not gradients:
            return True  # nothing of this step could be read
        scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        finite, too_long = torch.stack([norm.isfinite(), norm > self.config.clip_norm]).tolist()
        if finite and too_long:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, norm)
        if finite or scaler.is_enabled():  # on an overflow the scaler skips the step and lowers its scale
            scaler.step(self.optimizer)
            scaler.update()
        if finite:
            self.ema.update()
        return finite or (scaler.is_enabled() and scaler.get_scale() >= 1)
