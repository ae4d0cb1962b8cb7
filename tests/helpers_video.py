"""A video ResNet that trains in a second: mc3_18 with one block in each stage, an eighth as wide."""

import pytest
import torchvision.models
from torch import nn
from torchvision.models.video import resnet


class Narrow(resnet.VideoResNet):
    def __init__(self) -> None:
        makers = [resnet.Conv3DSimple] + [resnet.Conv3DNoTemporal] * 3
        super().__init__(resnet.BasicBlock, makers, [1, 1, 1, 1], resnet.BasicStem)
        self.fc = nn.Linear(64, 400)

    def _make_layer(self, block, conv_builder, planes, blocks, stride=1):
        return super()._make_layer(block, conv_builder, planes // 8, blocks, stride)


@pytest.fixture
def small_video(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: Narrow())
