import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from fedcmr.shared.case import LV, MYO
from fedcmr.simulations.patients.heart import activation, contours
from fedcmr.simulations.patients.population import GROUPS, Population, draw_patient
from fedcmr.simulations.scanners.acquisition import SCANNERS, acquire

SLICING_POINTS = 0.06


def drawn(group: str, seed: int):
    return draw_patient(np.random.default_rng(seed), Population({group: 1.0}))


def plain_ef(masks: np.ndarray) -> float:
    volumes = []
    for stack in masks:
        volume = 0
        for mask in stack:
            for row in mask:
                volume += sum(1 for label in row if label == LV)
        volumes.append(volume)
    return 1 - min(volumes) / max(volumes)


@pytest.mark.parametrize("group", GROUPS)
def test_ejection_fraction_of_the_masks_lies_in_the_range_of_the_group(group):
    lowest, highest = GROUPS[group].ef
    for seed, scanner in zip((11, 12), ("GE", "Siemens"), strict=True):
        patient = drawn(group, seed)
        masks = acquire(patient, SCANNERS[scanner], 8, 8, np.random.default_rng(seed)).masks
        volumes = (masks == LV).sum((1, 2, 3))
        assert volumes.argmax() == 0
        assert lowest - SLICING_POINTS <= 1 - volumes.min() / volumes.max() <= highest + SLICING_POINTS


def test_ejection_fraction_equals_a_plain_loop_over_the_masks():
    patient = drawn("normal", 3)
    masks = acquire(patient, SCANNERS["GE"], 6, 8, np.random.default_rng(3)).masks
    volumes = (masks == LV).sum((1, 2, 3))
    first, last = np.flatnonzero(masks.any((0, 1, 2)))[[0, -1]]
    assert plain_ef(masks[:, :, :, first : last + 1]) == 1 - volumes.min() / volumes.max()
    assert plain_ef(masks[:, :, :, first : last + 1]) == pytest.approx(patient.ef, abs=0.08)


@pytest.mark.parametrize("group", GROUPS)
def test_myocardium_encloses_the_cavity_on_mid_slices(group):
    masks = acquire(drawn(group, 5), SCANNERS["GE"], 8, 8, np.random.default_rng(5)).masks
    for phase in masks:
        held = np.flatnonzero((phase == LV).any((1, 2)))
        for z in held[1:-1]:
            rim = binary_dilation(phase[z] == LV) & (phase[z] != LV)
            assert (phase[z][rim] == MYO).all()


def test_volume_of_the_smooth_heart_falls_by_the_drawn_ejection_fraction():
    patient = drawn("infarcted", 8)
    z = np.linspace(-80, 80, 1601)
    lines = contours(patient, z, np.array([0.0, patient.es_time]))
    inside = (lines.level >= 0) & (lines.level < 1)
    volume = (np.pi * lines.endo.astype(np.float64) ** 2 * inside).mean(-1).sum(-1)
    assert 1 - volume[1] / volume[0] == pytest.approx(patient.ef, abs=0.01)


def test_infarcted_territory_neither_moves_nor_thickens_as_the_rest_does():
    patient = drawn("infarcted", 8)
    _, angle, _, level = patient.scar
    z = np.array([patient.length_mm * (0.5 - level)])
    lines = contours(patient, z, np.array([0.0, patient.es_time]))
    scar = round(np.degrees(angle)) % 360
    motion = 1 - lines.endo[1, 0] / lines.endo[0, 0]
    thickening = (lines.epi - lines.endo)[1, 0] / (lines.epi - lines.endo)[0, 0]
    assert motion[scar] < 0.5 * motion[(scar + 180) % 360]
    assert thickening[scar] < thickening[(scar + 180) % 360]


def test_healthy_wall_thickens_and_the_mitral_plane_moves_toward_the_apex():
    patient = drawn("normal", 2)
    lines = contours(patient, np.array([0.0]), np.array([0.0, patient.es_time]))
    wall = (lines.epi - lines.endo).mean(-1)[:, 0]
    assert 1.3 < wall[1] / wall[0] < 2.0
    assert 10 < patient.mapse_mm < 16


def test_activation_is_0_at_the_r_wave_and_1_at_end_systole():
    patient = drawn("normal", 2)
    np.testing.assert_allclose(activation(patient, np.array([0.0, patient.es_time, 1.0])), [0, 1, 0], atol=1e-6)


def test_contours_are_finite_from_above_the_atria_to_below_the_apex():
    for group in GROUPS:
        lines = contours(drawn(group, 1), np.linspace(-120, 120, 49), np.linspace(0, 1, 8))
        for name in ("endo", "epi", "fat", "rv", "level", "rv_level"):
            assert np.isfinite(getattr(lines, name)).all(), (group, name)
        assert (lines.epi >= lines.endo).all()


def test_populations_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    groups = [draw_patient(rng, Population({"normal": 3.0, "dilated": 1.0})).group for _ in range(400)]
    assert set(groups) == {"normal", "dilated"}
    assert groups.count("dilated") == pytest.approx(100, abs=30)


def test_the_area_changes_as_much_near_the_apex_as_in_the_middle():
    """As on 20 public ACDC patients, where it is 0.41 in the middle and 0.40 toward the apex."""
    changes = []
    for seed in range(12):
        patient = drawn("normal", seed)
        length = patient.length_mm
        z = (length / 2 - patient.mapse_mm) - np.array([0.3, 0.7]) * (length - patient.mapse_mm)
        endo = contours(patient, z, np.array([0.0, patient.es_time])).endo
        areas = (endo**2).sum(-1)
        changes.append(1 - areas[1] / areas[0])
    middle, apical = np.mean(changes, axis=0)
    assert apical == pytest.approx(middle, abs=0.03)
