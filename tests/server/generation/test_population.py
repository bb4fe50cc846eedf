"""Hearts drawn from a vendor's released population: its shapes, the ejection fractions asked for, and many of them."""

import numpy as np
import pytest
import torch

from fedcmr.server.generation import population
from fedcmr.server.generation.heart_shapes import draw_hearts
from fedcmr.server.generation.population import draw_dark_shares, draw_population, measured, pool_of, weights_for
from fedcmr.shared.shape import GEOMETRY_NAMES, SHAPE_NAMES, ShapeDistribution, standardise_shapes

SLICES = 6


@pytest.fixture(scope="module", autouse=True)
def small_pools():
    """A quarter of the hearts: seconds instead of half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "POOL_SIZE", 250)
        patch.setattr(population, "REFINED_SIZE", 150)
        patch.setattr(population, "_pools", {})
        patch.setattr(population, "_populations", {})
        yield


def wanted(**means: float) -> ShapeDistribution:
    """A population that differs from the public hearts in the entries named."""
    mean = torch.tensor([means.get(name, 0.0) for name in SHAPE_NAMES])
    return ShapeDistribution(mean, torch.full((len(SHAPE_NAMES),), 0.9))


def test_the_scale_of_shapes_is_that_of_the_widely_drawn_hearts():
    shapes = pool_of(8).shapes
    np.testing.assert_allclose(shapes.mean(dim=0), 0, atol=0.25)
    np.testing.assert_allclose(shapes.std(dim=0), 1, atol=0.2)


def test_the_weighted_pool_has_the_released_moments_and_even_ejection_fractions():
    pool, target = pool_of(SLICES), wanted(wall=0.7, thickening=-0.8, lv_length=-0.5)
    weights = weights_for(pool, target).numpy()
    assert weights.min() > 0 and weights.sum() == pytest.approx(1)
    mean = weights @ pool.shapes.numpy()
    geometry = slice(len(GEOMETRY_NAMES))
    np.testing.assert_allclose(mean, target.mean[geometry], atol=0.12)
    std = np.sqrt(weights @ (pool.shapes.numpy() - mean) ** 2)
    np.testing.assert_allclose(std, target.std[geometry], atol=0.15)
    before, after = (np.abs(m - target.mean[geometry].numpy()).max() for m in (pool.shapes.mean(dim=0).numpy(), mean))
    assert after < 0.3 * before
    efs = pool.efs.numpy()
    assert weights[efs < np.median([efs.min(), efs.max()])].sum() == pytest.approx(0.5, abs=0.05)


def test_a_population_like_the_pool_is_the_pool_itself():
    """The most even weights are even ones."""
    pool = pool_of(SLICES)
    own = ShapeDistribution(pool.shapes.mean(dim=0), pool.shapes.std(dim=0, correction=0))
    weights = weights_for(pool, own)
    assert 1 / float((weights**2).sum()) > 0.6 * len(weights)


@pytest.mark.slow
def test_drawn_hearts_are_of_the_population_and_of_the_ejection_fractions_requested():
    targets = {"GE": wanted(wall=-0.8, lv_length=-0.7), "Philips": wanted(thickening=0.6, rv_size=0.8)}
    names = ["GE", "Philips"] * 60
    efs = torch.linspace(0.12, 0.75, 120)
    hearts = draw_population(targets, names, SLICES, efs, torch.Generator().manual_seed(1))
    shapes, found = measured(hearts, SLICES)
    np.testing.assert_allclose(found, efs, atol=0.03)
    usual, _ = measured(draw_hearts(120, torch.Generator().manual_seed(1), SLICES, efs), SLICES)
    for start, vendor in enumerate(["GE", "Philips"]):
        target = targets[vendor].mean[: len(GEOMETRY_NAMES)]
        near, far = (np.abs(np.nanmean(s[start::2], axis=0) - target.numpy()) for s in (shapes.numpy(), usual.numpy()))
        assert near.mean() < 0.5 * far.mean()
    assert len(hearts.radius.unique()) == 120  # no heart twice


def test_vendors_that_released_no_shapes_have_the_usual_hearts():
    efs = torch.linspace(0.2, 0.7, 8)
    plain = draw_hearts(8, torch.Generator().manual_seed(3), SLICES, efs)
    none = draw_population({}, ["GE"] * 8, SLICES, efs, torch.Generator().manual_seed(3))
    assert all(torch.equal(getattr(plain, name), getattr(none, name)) for name in vars(plain))
    names = ["GE", "Siemens"] * 4
    mixed = draw_population({"GE": wanted()}, names, SLICES, efs, torch.Generator().manual_seed(3))
    assert torch.equal(mixed.wall[1::2], plain.wall[1::2]) and not torch.equal(mixed.wall[::2], plain.wall[::2])


def test_trabeculae_are_drawn_as_released_and_by_nobody_else():
    efs = torch.full((4000,), 0.6)
    names = ["GE", "Siemens"] * 2000
    target = {"GE": wanted(dark_ed=-0.5, dark_es=1.0)}
    shares = draw_dark_shares(target, names, efs, torch.Generator().manual_seed(0))
    assert shares[1::2].isnan().all()
    padded = torch.cat([torch.zeros(2000, len(GEOMETRY_NAMES)), shares[::2]], dim=1)
    away = standardise_shapes(padded.double(), efs[:2000])[:, len(GEOMETRY_NAMES) :]
    np.testing.assert_allclose(away.mean(dim=0), [-0.5, 1.0], atol=0.1)
    np.testing.assert_allclose(away.std(dim=0), [0.9, 0.9], atol=0.1)
    assert draw_dark_shares({}, names, efs, torch.Generator()) is None
