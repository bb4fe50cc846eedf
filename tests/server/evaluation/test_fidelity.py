"""The measures of fidelity, each against a closed form, an independent formula, or a set whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.covariance import ledoit_wolf

from fedcmr.server.evaluation.fidelity.anatomy import anatomy
from fedcmr.server.evaluation.fidelity.discriminator import Scores, auc, cross_fitted, heart_alone
from fedcmr.server.evaluation.fidelity.distances import Kernel, Manifolds, frechet_distance, shrunk_covariance
from fedcmr.server.evaluation.fidelity.features import encoder_features, standardised
from fedcmr.server.evaluation.fidelity.measure import HALVES, NO_SYNTHETIC, OTHERS, OWN, PRIOR_ONLY, TOO_FEW, Effort
from fedcmr.server.evaluation.fidelity.measure import measure_fidelity as measure
from fedcmr.server.evaluation.fidelity.radiomics import FIRST_ORDER, TEXTURE, features_within, radiomics
from fedcmr.server.evaluation.fidelity.samples import NUM_SLICES, Samples, common_regions, sample_slices
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, Case, CaseInfo
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter
from fedcmr.shared.views import Grid

GRID = Grid(64, 2.0)
FEW = Effort(num_steps=0, num_draws=10, num_bootstrap=100)


def heart(number, vendor="GE", contrast=1.0, num_slices=5, rv=True):
    """A ring of 24 mm within 34 mm at ED, 16 mm within 28 mm at ES, a square beside it, on noise."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[-32:32, -32:32] * 2.0 + 1
    radius = np.hypot(y, x)
    masks = np.zeros((2, num_slices, 64, 64), np.uint8)
    for phase, (inner, outer) in enumerate(((24, 34), (16, 28))):
        masks[phase, :, (abs(y) < 16) & (x > 36) & (x < 56)] = RV if rv else 0
        masks[phase, :, radius < outer] = MYO
        masks[phase, :, radius < inner] = LV
    if not rv:
        masks[masks == 0] = NOT_DRAWN
    shade = np.isin(masks, (RV, LV)) * 0.4 + 0.2 + rng.normal(0, 0.03)
    frames = (shade * contrast + rng.normal(0, 0.05, masks.shape)).clip(0, 1).astype(np.float32)
    info = CaseInfo(f"p{number}", vendor, 1.5, 0.5, f"p{number}")
    return Case(info, frames, masks, np.array([10, 2, 2], np.float32))


def hearts(first, num, **what):
    return [heart(first + i, **what) for i in range(num)]


@pytest.fixture(scope="module")
def block():
    """Siemens and GE of different contrast, one synthetic set of each, a prior that is off, and too few of Philips."""
    real = {
        "Siemens": hearts(0, 12, vendor="Siemens"),
        "GE": hearts(100, 9, contrast=0.6, rv=False),
        "Philips": hearts(200, 7, vendor="Philips"),
        "Canon": hearts(300, 8, vendor="Canon", contrast=0.6),
    }
    synthetic = {"Siemens": hearts(400, 20, vendor="Siemens"), "GE": hearts(500, 20, contrast=0.6)}
    return measure(real, synthetic, {"Siemens": hearts(600, 20, contrast=0.3)}, GRID, FEW)


def test_like_hearts_are_as_near_as_two_halves_and_far_from_other_contrast(block):
    rows = block["groups"]["Siemens"]["comparisons"]
    for metric in ("frd", "kid"):
        own, others, halves, prior = (rows[name][metric] for name in (OWN, OTHERS, HALVES, PRIOR_ONLY))
        assert others > 3 * own and prior > 3 * own and others > 3 * abs(halves)
    low, high = rows[HALVES]["ci95"]["kid"]
    assert low < 0 < high and rows[OWN]["kid"] < 0.1 * rows[OTHERS]["kid"]
    assert rows[OWN]["precision"] > 0.7 and rows[OWN]["recall"] > 0.7
    assert rows[PRIOR_ONLY]["precision"] == rows[PRIOR_ONLY]["recall"] == 0
    assert all(rows[OWN][f"wasserstein_{key}"] == 0 for key in ("lv_ed_ml", "lv_es_ml", "mass_g", "wall_mm"))
    assert rows[OTHERS]["n_patients"] == 17 and rows[OWN]["n_patients"] == 12


def test_who_is_too_few_and_whom_nobody_synthesised_have_a_sentence_and_no_figure(block):
    assert block["not_measured"] == {"Philips": TOO_FEW, "Canon": NO_SYNTHETIC}
    assert set(block["groups"]) == {"Siemens", "GE"}
    assert PRIOR_ONLY not in block["groups"]["GE"]["comparisons"]
    assert block["groups"]["GE"]["n_half"] == 4 and block["groups"]["GE"]["n_prior_only"] is None


def test_what_one_vendor_has_not_drawn_is_compared_with_none(block):
    assert block["structures"] == [
        "myocardium at ED",
        "left ventricle at ED",
        "myocardium at ES",
        "left ventricle at ES",
    ]
    assert block["n_radiomics"] == 6 * len(FIRST_ORDER + TEXTURE)


def test_nobody_to_compare_gives_a_block_without_figures():
    assert measure({}, {}, {}, GRID, FEW)["groups"] == {}
    blank = [Case(c.info, c.frames, np.zeros_like(c.masks), c.spacing_mm) for c in hearts(0, 9)]
    assert measure({"GE": blank}, {"GE": hearts(0, 9)}, {}, GRID, FEW)["not_measured"] == {"GE": TOO_FEW}


@pytest.mark.slow
def test_equal_seeds_give_equal_figures():
    groups = {"GE": hearts(0, 8)}, {"GE": hearts(50, 8)}, {}
    effort = Effort(num_steps=2, num_draws=3, num_bootstrap=100, seed=4)
    assert measure(*groups, GRID, effort) == measure(*groups, GRID, effort)


def test_frechet_distance_is_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (2000, 5, 3)) @ np.diag([1.0, 2.0, 3.0])
    b = rng.normal(0, 1, (1500, 5, 3)) + np.array([1.0, 0.0, 2.0])
    flat = [values.reshape(-1, 3) for values in (a, b)]
    covariances = [ledoit_wolf(values)[0] for values in flat]
    shift = flat[0].mean(axis=0) - flat[1].mean(axis=0)
    expected = shift @ shift + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(5 + 0 + 1 + 4, rel=0.1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_covariance_of_few_slices_is_that_of_ledoit_and_wolf():
    values = np.random.default_rng(1).normal(0, 2, (12, 30))
    np.testing.assert_allclose(shrunk_covariance(values), ledoit_wolf(values)[0], rtol=1e-9)
    assert np.linalg.eigvalsh(shrunk_covariance(values)).min() > 0


def test_kid_is_the_sum_over_pairs_of_different_patients():
    rng = np.random.default_rng(2)
    features = rng.normal(0, 1, (7, 2, 4))
    a, b = np.array([0, 2, 5]), np.array([1, 3, 4, 6])

    def between(one, other):
        return np.mean([(x @ y / 4 + 1) ** 3 for x in features[one] for y in features[other]])

    within = [np.mean([between(i, j) for i in group for j in group if i != j]) for group in (a, b)]
    expected = sum(within) - 2 * np.mean([between(i, j) for i in a for j in b])
    assert Kernel.of(features).distance(a, b) == pytest.approx(expected)


def test_kid_of_two_groups_of_one_population_is_zero_on_average():
    features = np.random.default_rng(3).normal(0, 1, (400, 1, 4))
    features = features.repeat(3, axis=1)  # slices of one patient are alike and must not count as draws of their own
    kernel, groups = Kernel.of(features), np.arange(400).reshape(50, 8)
    values = [kernel.distance(group[:4], group[4:]) for group in groups]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(50)


def test_precision_and_recall_are_one_for_the_same_patients_and_zero_for_distant_ones():
    features = np.random.default_rng(4).normal(0, 1, (10, 3, 5))
    features[5:] += 50
    manifolds, a, b = Manifolds.of(features), np.arange(5), np.arange(5, 10)
    assert manifolds.covered(a, by=a) == 1 and manifolds.covered(a, by=b) == manifolds.covered(b, by=a) == 0
    with pytest.raises(ValueError, match="more than 3 patients"):
        manifolds.covered(a, by=b[:3])


def test_precision_counts_slices_within_a_ball_up_to_the_third_nearest_other_patient():
    places = np.array([[0.0, 0.0], [1, 1], [2, 2], [3, 3], [2.9, 3.1]])[:, :, None]
    covered = Manifolds.of(places).covered(np.array([4]), by=np.arange(4))
    assert covered == 1  # 0 reaches to 3, 1 and 2 to 3, 3 to 0
    places[4] = [[5.9], [6.1]]  # 3 reaches to 6 and no farther
    assert Manifolds.of(places).covered(np.array([4]), by=np.arange(4)) == 0.5


def test_first_order_and_texture_of_a_region_are_those_of_its_pixels_alone():
    image = np.full((1, 8, 8), 0.9)
    image[0, 2:6, 2:6] = np.indices((4, 4)).sum(axis=0) % 2 * 0.5 + 0.1  # a chessboard of 0.1 and 0.6
    within = np.zeros((1, 8, 8), bool)
    within[0, 2:6, 2:6] = True
    found = dict(zip(FIRST_ORDER + TEXTURE, features_within(image, within)[0], strict=True))
    assert found["mean"] == pytest.approx(0.35 * 255) and found["sd"] == pytest.approx(0.25 * 255)
    assert found["entropy"] == pytest.approx(1) and found["kurtosis"] == pytest.approx(1)
    assert (found["p10"], found["p90"]) == pytest.approx((0.1 * 255, 0.6 * 255))
    levels = 9 - 1  # 0.6 and 0.1 of 16 levels
    # Of 24 straight pairs all differ, of 18 diagonal ones none does.
    assert found["contrast"] == pytest.approx(levels**2 * 24 / 42)
    assert found["dissimilarity"] == pytest.approx(levels * 24 / 42)
    assert found["correlation"] == pytest.approx(1 - 2 * 24 / 42)


def test_every_patient_gives_equally_many_slices_that_show_the_structures():
    cases = [heart(0, num_slices=9), heart(1, num_slices=2), heart(2)]
    cases[0].masks[:, :4] = 0
    cases[2].masks[:] = 0
    regions = [(ED, LV), (ES, LV)]
    samples = sample_slices(cases, regions, GRID)
    assert samples.images.shape == (2, NUM_SLICES, 2, 64, 64)
    assert all((samples.masks[:, :, phase] == LV).flatten(2).any(2).all() for phase in (ED, ES))
    assert radiomics(samples, regions).shape[:2] == (2, NUM_SLICES)
    assert common_regions([cases[:2], hearts(5, 3, rv=False)], GRID) == [(ED, MYO), (ED, LV), (ES, MYO), (ES, LV)]


def test_the_encoder_sees_the_same_on_another_grid():
    segmenter, cases = load_segmenter(), hearts(0, 2)
    fine = Grid(128, 1.0)
    own, other = (encoder_features(segmenter, sample_slices(cases, [(ED, LV)], grid), grid) for grid in (GRID, fine))
    assert own.shape == other.shape == (2, NUM_SLICES, 256)
    assert np.corrcoef(own.ravel(), other.ravel())[0, 1] > 0.95
    scaled = standardised({"a": own, "b": other}, ["a"])["a"].reshape(-1, 256)
    assert np.abs(scaled.mean(axis=0)).max() < 1e-6 and scaled.std(axis=0).max() == pytest.approx(1)


def test_the_network_tells_black_from_white_and_not_two_halves_of_one_set():
    rng = torch.Generator().manual_seed(0)
    shape = (12, NUM_SLICES, 2, 32, 32)
    black, white = (torch.randn(shape, generator=rng) * 0.1 + shade for shade in (-0.9, 0.9))
    assert auc(cross_fitted(black, white, seed=0, num_steps=30), 100, 0) == (1.0, [1.0, 1.0])
    halves = [torch.randn(shape, generator=rng) + torch.randn(12, 1, 1, 1, 1, generator=rng) for _ in range(2)]
    value, (low, high) = auc(cross_fitted(*halves, seed=0, num_steps=60), 500, 0)
    assert low < 0.5 < high and abs(value - 0.5) < 0.25


def test_the_auc_counts_pairs_of_a_fold_and_ties_as_half():
    scores = Scores(np.array([0.0, 5.0]), np.array([0.0, 1.0, 2.0]), np.array([0, 1]), np.array([0, 0, 1]))
    assert auc(scores, 100, 0)[0] == pytest.approx((0.5 + 1 + 0) / 3)


def test_the_heart_alone_is_grey_beyond_its_margin():
    samples = sample_slices(hearts(0, 1), [(ED, LV)], GRID)
    alone = heart_alone(samples, [(ED, LV)], GRID)
    y, x = np.mgrid[-32:32, -32:32] * 2.0 + 1
    radius = np.hypot(y, x)
    assert (alone[:, :, ED, radius > 24 + 6 + 2] == 0).all() and (alone[:, :, ES] == 0).all()
    inside = torch.from_numpy(radius < 28)
    assert torch.equal(alone[:, :, ED, inside], samples.images[:, :, ED, inside])


def test_volumes_mass_and_thickness_are_those_of_the_rings():
    found = anatomy(hearts(0, 2))
    area = math.pi / 1000 * 10 * 5
    assert found["lv_ed_ml"] == pytest.approx([24**2 * area] * 2, rel=0.02)
    assert found["lv_es_ml"] == pytest.approx([16**2 * area] * 2, rel=0.04)
    assert found["mass_g"] == pytest.approx([1.05 * (34**2 - 24**2) * area] * 2, rel=0.03)
    assert found["wall_mm"] == pytest.approx([10, 10], rel=0.03)


def test_what_nobody_drew_has_no_volume():
    part = heart(0, rv=False)
    part.masks[ED, 1][part.masks[ED, 1] == MYO] = NOT_DRAWN
    found = anatomy([part])
    assert np.isnan(found["mass_g"]).all() and np.isnan(found["wall_mm"]).all()
    assert np.isfinite(found["lv_ed_ml"]).all()
    part.masks[ES, 2] = NOT_DRAWN
    assert np.isnan(anatomy([part])["lv_es_ml"]).all()


def test_a_sample_of_nobody_has_no_features():
    nobody = sample_slices([], [(ED, LV)], GRID)
    assert len(nobody) == 0 and radiomics(nobody, [(ED, LV)]).shape[0] == 0
    assert encoder_features(load_segmenter(), nobody, GRID).shape == (0, NUM_SLICES, 256)
    assert isinstance(nobody, Samples)
