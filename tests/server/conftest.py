import pytest
import torch

from shared.tasks.ejection_fraction import network as module


@pytest.fixture
def tiny(monkeypatch):
    """The same training with a network small enough for a test."""

    def small(**_):
        features = torch.nn.Sequential(
            torch.nn.Conv2d(2, 8, 5, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4)
        )
        network = torch.nn.Sequential(features, torch.nn.Flatten())
        network.fc = torch.nn.Linear(128, 3)
        return network

    monkeypatch.setattr(module, "resnet50", small)
