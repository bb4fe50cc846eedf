"""The networks that segment: shapes, files that rebuild them, and labels on the case's own grid."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.settings import load
from fedcmr.shared.case import Case, CaseInfo
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.segmentation.inference import one_heart, predict_masks, predict_probabilities
from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS
from fedcmr.shared.tasks.segmentation.segmenter import (
    CPU_PIXELS,
    SHIPPED_SEGMENTER,
    Architecture,
    Segmenter,
    load_segmenter,
    probabilities,
    save_segmenter,
)

SMALL = Architecture("unet", 8, 32, 4.0)


def case_of(size: int, pixel_mm: float, num_slices: int = 2) -> Case:
    """A bright disc of 24 mm radius, 16 mm below the middle."""
    axis = (np.arange(size) - (size - 1) / 2) * pixel_mm
    disc = (axis[:, None] - 16) ** 2 + axis**2 < 24**2
    frames = np.broadcast_to(disc, (2, num_slices, size, size)).astype(np.float32)
    info = CaseInfo("p", "unknown", float("nan"), float("nan"), "p")
    return Case(info, frames, np.zeros(frames.shape, np.uint8), np.array([9, pixel_mm, pixel_mm], np.float32))


def bright_is_lv(architecture: Architecture) -> Segmenter:
    """A segmenter whose scores are the image itself: bright pixels are cavity."""

    class Bright(torch.nn.Module):
        def forward(self, images):
            dark = torch.zeros_like(images)
            return torch.stack([dark, dark - 9, dark - 9, 20 * images], 2).flatten(1, 2)

    segmenter = Segmenter(architecture)
    segmenter.network = Bright()
    segmenter.register_parameter("place", torch.nn.Parameter(torch.zeros(1)))
    return segmenter.eval()


def test_on_a_cpu_the_memory_of_a_prediction_is_bounded_whatever_the_number_of_slices():
    segmenter, sizes = Segmenter(SMALL).eval(), []
    segmenter.register_forward_pre_hook(lambda _, given: sizes.append(given[0][:, 0].numel()))
    images = torch.randn(50, 2, 64, 96)
    found = probabilities(segmenter, images)
    assert max(sizes) <= CPU_PIXELS < images[:, 0].numel()
    for number in (0, 49):
        torch.testing.assert_close(found[number], probabilities(segmenter, images[number : number + 1])[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_scores_every_pixel_and_learns(network):
    segmenter = Segmenter(Architecture(network, 8, 32, 4.0)).train()
    images = torch.randn(2, 2, 32, 48)
    scores = segmenter(images)
    assert scores.shape == (2, 2, 4, 32, 48)
    scores.square().mean().backward()
    still = [name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name in still if "dummy" not in name]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_rebuilds_its_network_and_grid(network, tmp_path):
    segmenter = Segmenter(Architecture(network, 8, 48, 2.5)).eval()
    save_segmenter(tmp_path / "s.safetensors", segmenter, {"note": "x"})
    read = load_segmenter(tmp_path / "s.safetensors")
    assert read.architecture == segmenter.architecture and not any(p.requires_grad for p in read.parameters())
    images = torch.randn(1, 2, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(read(images), segmenter(images), atol=2e-2, rtol=2e-2)


def test_a_file_of_an_earlier_version_is_the_shipped_network():
    assert load_segmenter(SHIPPED_SEGMENTER).architecture == Architecture("unet", 16, 64, 2.0)


def test_an_unknown_network_or_loss_is_refused_by_name():
    with pytest.raises(UserError, match=r"segmentation\.network in"):
        load("default", ["segmentation.network=transformer"])
    with pytest.raises(UserError, match=r"segmentation\.loss in"):
        load("default", ["segmentation.loss=focal"])
    with pytest.raises(UserError, match=r"segmentation\.crop_px a multiple of 16, got 90"):
        load("default", ["segmentation.crop_px=90"])
    with pytest.raises(UserError, match=r"segmentation\.crop_px up to size_px"):
        load("default", ["segmentation.crop_px=160"])


@pytest.mark.parametrize(("size", "pixel_mm"), [(96, 1.5), (128, 1.25), (64, 2.0), (80, 1.0)])
def test_labels_lie_on_the_case_s_own_grid(size, pixel_mm):
    """Found on a grid of 2 mm, the disc has its own area and place on any other."""
    case = case_of(size, pixel_mm)
    found = predict_masks(bright_is_lv(Architecture("unet", 8, 64, 2.0)), [case])[0].numpy()
    assert found.shape == case.frames.shape
    inside = found[0, 0] == 3
    true = case.frames[0, 0] > 0.5
    assert 2 * (inside & true).sum() / (inside.sum() + true.sum()) > 0.96


def test_beyond_the_field_of_view_of_the_network_there_is_background():
    case = case_of(96, 2.0)
    likely = predict_probabilities(
        bright_is_lv(Architecture("unet", 8, 32, 2.0)), [replace(case, frames=case.frames * 0 + 1)]
    )[0]
    assert torch.allclose(likely.sum(2), torch.ones_like(likely.sum(2)), atol=1e-5)
    assert (likely.argmax(2)[:, :, 0] == 0).all() and (likely.argmax(2)[:, :, 48, 48] == 3).all()


def test_what_lies_apart_from_the_heart_is_background():
    labels = torch.zeros(5, 32, 32, dtype=torch.uint8)
    for z in (0, 1, 3, 4):  # the cavity is missed in the middle, where muscle still joins its halves
        labels[z, 8:20, 8:20], labels[z, 10:18, 10:18] = 2, 3
    labels[2, 8:20, 8:20] = 2
    labels[1, 8:16, 2:8] = 1
    heart = labels.clone()
    labels[0, 26:30, 26:30], labels[4, 28:30, 2:4] = 3, 1  # as of stomach and liver
    kept = one_heart(labels)
    assert torch.equal(kept, heart) and labels[0, 27, 27] == 3
    assert torch.equal(one_heart(torch.zeros_like(labels)), torch.zeros_like(labels))
    small = torch.zeros_like(labels)
    small[2, 20:22, 20:22] = 3
    apart = small.clone()
    apart[:, 2:10, 2:10] = 2  # a larger piece of muscle that holds no cavity
    assert torch.equal(one_heart(apart), small)
    apart[2, 20:22, 20:22] = 0
    assert torch.equal(one_heart(apart), apart)


def test_the_header_of_a_file_is_plain_json(tmp_path):
    save_segmenter(tmp_path / "s.safetensors", Segmenter(SMALL), {})
    from fedcmr.shared import checkpoint

    header = checkpoint.load_metadata(tmp_path / "s.safetensors")
    assert json.loads(json.dumps(header))["architecture"] == {
        "network": "unet",
        "width": 8,
        "size_px": 32,
        "pixel_mm": 4.0,
    }
