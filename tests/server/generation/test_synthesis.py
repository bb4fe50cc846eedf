"""Synthetic cases: labelled by their masks, balanced over vendors, faithful to the masks they were made from."""

from collections import Counter

import numpy as np
import pytest
import torch

from fedcmr.server.generation.synthesis import SharedGenerator, synthesize, vendor_names
from fedcmr.server.settings import SynthesisConfig
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.style import STYLE_NAMES, StyleDistribution, style_vector
from fedcmr.shared.views import slice_pairs, with_heart

VENDORS = ["GE", "Philips", "Siemens"]
SMALL = SynthesisConfig(num_cases=12, num_slices=6, num_steps=2)


def shared_generator(prior, level: float = 0.0) -> SharedGenerator:
    trainable = {name: value.detach().clone() for name, value in prior.generator.trainable().items()}
    styles = StyleDistribution(
        torch.full((len(STYLE_NAMES),), level), torch.full((len(STYLE_NAMES),), 0.1), torch.eye(len(STYLE_NAMES))
    )
    return SharedGenerator(trainable, dict.fromkeys(VENDORS, styles))


def test_labels_are_measured_on_the_masks_and_follow_the_request(prior):
    made = synthesize(prior, shared_generator(prior), SMALL, VENDORS, seed=1, device_name="cpu")
    for case, requested in zip(made.cases, made.requested_efs, strict=True):
        assert case.info.ef == ejection_fraction(case.masks)
        assert abs(case.info.ef - requested) < 0.03
    assert Counter(case.info.vendor for case in made.cases) == dict.fromkeys(VENDORS, 4)
    assert len({case.info.pseudonym for case in made.cases}) == 12


@pytest.mark.slow
def test_equal_seeds_give_equal_cases_and_the_prior_stays_as_it_was(prior):
    before = {name: value.detach().clone() for name, value in prior.generator.trainable().items()}
    other = shared_generator(prior)
    other.trainable["out.0.weight"].add_(0.5)
    first = synthesize(prior, other, SMALL, VENDORS, seed=1, device_name="cpu")
    again = synthesize(prior, other, SMALL, VENDORS, seed=1, device_name="cpu")
    for one, two in zip(first.cases, again.cases, strict=True):
        np.testing.assert_array_equal(one.frames, two.frames)
    for name, value in prior.generator.trainable().items():
        assert torch.equal(value, before[name])
    plain = synthesize(prior, shared_generator(prior), SMALL, VENDORS, seed=1, device_name="cpu")
    assert not np.array_equal(plain.cases[0].frames, first.cases[0].frames)
    np.testing.assert_array_equal(plain.cases[0].masks, first.cases[0].masks)


@pytest.mark.parametrize("adapter", ["norm_affine", "lora"])
def test_every_adapter_changes_the_images_and_nothing_else(prior, adapter):
    trainable = {n: v.detach() + 0.3 for n, v in prior.generator.trainable(adapter).items()}
    adapted = SharedGenerator(trainable, shared_generator(prior).styles)
    changed = synthesize(prior, adapted, SMALL, VENDORS, seed=1, device_name="cpu")
    plain = synthesize(prior, shared_generator(prior), SMALL, VENDORS, seed=1, device_name="cpu")
    assert not np.array_equal(plain.cases[0].frames, changed.cases[0].frames)
    np.testing.assert_array_equal(plain.cases[0].masks, changed.cases[0].masks)
    for name, value in prior.generator.trainable(adapter).items():
        torch.testing.assert_close(value.detach(), trainable[name] - 0.3)


def test_a_generator_of_other_names_is_refused(prior):
    strange = SharedGenerator({"unknown": torch.zeros(3)}, shared_generator(prior).styles)
    with pytest.raises(UserError, match="does not fit"):
        synthesize(prior, strange, SMALL, VENDORS, seed=1, device_name="cpu")


def test_vendor_shares():
    names = vendor_names(SynthesisConfig(num_cases=10, vendor_shares={"GE": 1, "Siemens": 3}), VENDORS)
    assert Counter(names) in ({"GE": 2, "Siemens": 8}, {"GE": 3, "Siemens": 7})
    assert Counter(vendor_names(SynthesisConfig(num_cases=10), VENDORS)).most_common()[0][1] == 4


def test_a_vendor_that_was_not_learnt_is_refused(prior):
    with pytest.raises(UserError, match="Canon"):
        synthesize(prior, shared_generator(prior), SynthesisConfig(num_cases=4, vendor_shares={"Canon": 1}), VENDORS, 0)


@pytest.mark.slow
def test_the_shipped_prior_generates_the_style_and_the_anatomy_requested():
    """Style vectors measured on the images follow those requested, and blood is brighter than muscle in its mask."""
    prior = load_prior()
    # From pure noise: a later start hands part of the style to the guide.
    config = SynthesisConfig(num_cases=16, num_slices=4, num_steps=6, t_start=0.0)
    measured, requested = [], []
    for level in (-1.0, 1.0):
        shared = shared_generator(prior, level)
        for case in synthesize(prior, shared, config, VENDORS, seed=2, device_name="cpu").cases:
            images, masks = slice_pairs(case)
            seen = with_heart(masks)
            measured.append(prior.standardise(style_vector(images[seen], masks[seen])))
            requested.append(level)
    styles, levels = torch.stack(measured), torch.tensor(requested)
    shift = styles[levels > 0].mean(0) - styles[levels < 0].mean(0)
    brightness = [STYLE_NAMES.index(name) for name in ("lv_mean", "rv_mean", "myo_mean")]
    assert (shift[brightness] > 0.7).all()
    raw = styles * prior.style_std + prior.style_mean
    assert (raw[:, STYLE_NAMES.index("lv_mean")] > raw[:, STYLE_NAMES.index("myo_mean")]).float().mean() > 0.95
