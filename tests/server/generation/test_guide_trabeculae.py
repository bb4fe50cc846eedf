"""Bent scans are as dark within the contours as their vendor's patients are."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from fedcmr.server.generation.guide_scans import read_guides
from fedcmr.server.generation.guide_trabeculae import MAX_SHIFT, dark_shifts, standardised_shares
from fedcmr.server.generation.synthesis import SharedGenerator, synthesize
from fedcmr.server.settings import SynthesisConfig
from fedcmr.shared.case import LV, MYO, load_cases, save_case
from fedcmr.shared.provenance import public
from fedcmr.shared.shape import SHAPE_NAMES, SPREAD, ShapeDistribution
from fedcmr.shared.style import STYLE_NAMES, StyleDistribution
from fedcmr.shared.trabeculae import dark_shares
from fedcmr.shared.views import NETWORK_GRID, slice_pairs

SIZE = len(SHAPE_NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_cases):
    """Scans a third of whose cavities is trabeculae, at the border."""
    path = tmp_path_factory.mktemp("guides") / "scans"
    write_cases(path, "GE", 3, seed=1)
    for case in load_cases(path):
        for frame, masks in zip(case.frames.reshape(-1, 96, 96), case.masks.reshape(-1, 96, 96), strict=True):
            cavity = masks == LV
            depth = distance_transform_edt(cavity)
            frame[cavity & (depth < np.quantile(depth[cavity], 0.35))] = frame[masks == MYO].mean()
        save_case(path, case)
    (path / "prepared.json").write_text(json.dumps({"provenance": public("Sunnybrook").as_json()}))
    return path


def like(guides, more_at_es: float, grid=NETWORK_GRID) -> ShapeDistribution:
    """A population that is as dark as the guides, but for so much more of the cavity at ES."""
    mean = torch.zeros(SIZE)
    mean[-2:] = standardised_shares(guides, grid).nanmean(dim=0)
    mean[-1] += more_at_es / SPREAD[-1]
    return ShapeDistribution(mean, torch.full((SIZE,), 1e-3))


def test_a_vendor_differs_by_what_it_released(folder):
    guides = read_guides([folder])
    populations = {"GE": like(guides, 0.0), "Siemens": like(guides, 0.1), "Canon": like(guides, 0.5)}
    shifts = dark_shifts(populations, ["GE", "Philips", "Siemens", "Canon"], guides, NETWORK_GRID)
    np.testing.assert_allclose(shifts[[0, 2, 3]], [[0, 0], [0, 0.1], [0, MAX_SHIFT]], atol=1e-5)
    assert shifts[1].isnan().all(), "nothing was released of this vendor"
    assert dark_shifts({}, ["GE"], guides, NETWORK_GRID) is None


@pytest.mark.slow
def test_synthetic_hearts_get_darker_by_that_and_keep_their_labels(folder, prior):
    guides = read_guides([folder])
    config = SynthesisConfig(num_cases=6, num_slices=4, num_steps=0, guides=[str(folder)])
    zero = torch.zeros(len(STYLE_NAMES))
    style = StyleDistribution(zero, torch.full_like(zero, 1e-3), torch.eye(len(zero)))
    trainable = {name: value.detach().clone() for name, value in prior.generator.trainable().items()}
    found = {}
    for more in (0.0, 0.1):
        shared = SharedGenerator(trainable, {"GE": style}, {"GE": like(guides, more, prior.grid)})
        cases = synthesize(prior, shared, config, ["GE"], seed=1, device_name="cpu").cases
        pairs = [slice_pairs(case, prior.grid) for case in cases]
        shares = torch.cat([dark_shares(images[None], masks[None]) for images, masks in pairs])
        found[more] = (shares.mean(dim=0), [case.masks for case in cases])
    np.testing.assert_array_equal(found[0.0][1][0], found[0.1][1][0])
    more_dark = found[0.1][0] - found[0.0][0]
    assert 0.05 < float(more_dark[1]) < 0.12, "the match of grey values that follows takes a part of it back"
    assert abs(float(more_dark[0])) < 0.03
