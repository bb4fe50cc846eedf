"""A network in the place of the ResNet50, small enough for a test."""

from collections import OrderedDict

import torch

from fedcmr.client import evaluation
from fedcmr.shared.tasks.ejection_fraction import network as module


def make_tiny(monkeypatch) -> None:
    """`Regressor` is small from now on, in this process."""

    def small(**_):
        features = torch.nn.Sequential(
            torch.nn.Conv2d(2, 8, 5, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4)
        )
        network = torch.nn.Sequential(OrderedDict(layer1=features, flat=torch.nn.Flatten()))
        network.fc = torch.nn.Linear(128, 3)
        return network

    monkeypatch.setattr(module, "resnet50", small)


def make_evaluations_quick(monkeypatch) -> None:
    """Sites wait for no whole step and no expected time, and invent small patients, in this process."""
    monkeypatch.setattr(evaluation, "STEP_S", 0.01)
    monkeypatch.setattr(evaluation, "SPARE", 1e-6)
    monkeypatch.setattr(evaluation, "INVENTED_SLICES", 2)
