import numpy as np
import pytest

from fedcmr.shared.case import LV, MYO, RV
from fedcmr.simulations.patients.population import Population, draw_patient
from fedcmr.simulations.scanners.acquisition import SCANNERS, acquire
from fedcmr.simulations.scanners.contrast import TISSUES, Relaxation, bssfp_signal
from fedcmr.simulations.scanners.receive_chain import k_space_window, receive


@pytest.fixture(scope="module")
def scans():
    """The same patient in each scanner."""
    patient = draw_patient(np.random.default_rng(4), Population({"normal": 1.0}))
    return {vendor: acquire(patient, SCANNERS[vendor], 6, 8, np.random.default_rng(4)) for vendor in SCANNERS}


def test_signal_equals_the_closed_formula_without_off_resonance():
    tissue, tr, flip = Relaxation(1000.0, 50.0, 0.8), 3.0, np.radians(60)
    e1, e2 = np.exp(-tr / 1000), np.exp(-tr / 50)
    expected = 0.8 * np.sin(flip) * (1 - e1) / (1 - (e1 - e2) * np.cos(flip) - e1 * e2) * np.sqrt(e2)
    assert bssfp_signal(tissue, tr, 60) == pytest.approx(expected, rel=1e-12)


def test_signal_equals_the_steady_state_of_the_simulated_bloch_equation():
    tissue, tr, flip, dephasing = Relaxation(900.0, 120.0, 1.0), 4.0, np.radians(50), 1.1
    e1, e2 = np.exp(-tr / 900), np.exp(-tr / 120)
    tip = np.array([[1, 0, 0], [0, np.cos(flip), np.sin(flip)], [0, -np.sin(flip), np.cos(flip)]])
    turn = dephasing + np.pi  # alternating excitation phase
    spin = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    state = np.zeros(3)
    for _ in range(5000):
        after = tip @ state
        state = np.diag([e2, e2, e1]) @ spin @ after + [0, 0, 1 - e1]
    assert bssfp_signal(tissue, tr, 50, dephasing) == pytest.approx(np.hypot(*after[:2]) * np.sqrt(e2), rel=1e-6)


def test_off_resonance_of_half_a_turn_is_a_dark_band():
    blood = TISSUES[1.5]["blood"]
    assert bssfp_signal(blood, 3.0, 60, np.pi) < 0.1 * bssfp_signal(blood, 3.0, 60)


@pytest.mark.parametrize("field_strength_t", TISSUES)
def test_tissues_order_as_in_cine_images(field_strength_t):
    signal = {name: bssfp_signal(t, 3.0, 45) for name, t in TISSUES[field_strength_t].items()}
    assert signal["blood"] > signal["venous blood"] > signal["liver"] > signal["myocardium"] > signal["lung"]
    assert 0.25 < signal["myocardium"] / signal["blood"] < 0.5


def test_noise_is_rician_with_the_asked_level():
    window = k_space_window((64, 48), (0.8, 0.7), 0.4)
    level = np.full((64, 48), 2.0, np.float32)
    dark = receive(np.zeros((400, 64, 48), np.float32), window, level, np.random.default_rng(0))
    assert dark.mean() == pytest.approx(2.0 * np.sqrt(np.pi / 2), rel=0.02)
    bright = receive(np.full((400, 64, 48), 100.0, np.float32), window, level, np.random.default_rng(0))
    assert bright.std(0).mean() == pytest.approx(2.0, rel=0.02)
    assert bright.mean() == pytest.approx(np.sqrt(100**2 + 2.0**2), rel=1e-3)


def test_sampling_equals_a_direct_fourier_sum():
    rng = np.random.default_rng(1)
    scene, window = rng.random((1, 10, 8)).astype(np.float32), k_space_window((10, 8), (0.7, 0.6), 0.5)
    high, wide = window.shape[0] // 2, window.shape[1] // 2
    rows, cols = np.mgrid[:10, :8]
    expected = np.zeros((10, 8), complex)
    for ky in range(-high, high + 1):
        for kx in range(-wide, wide + 1):
            wave = np.exp(2j * np.pi * (ky * rows / 10 + kx * cols / 8))
            expected += window[ky + high, kx + wide] * (scene[0] * wave.conj()).sum() * wave / 80
    image = receive(scene, window, np.zeros((10, 8), np.float32), rng)
    np.testing.assert_allclose(image[0], np.abs(expected), atol=1e-5)


def test_noise_keeps_the_spectrum_of_the_window():
    window = k_space_window((32, 32), (0.5, 0.5), 0.0)
    images = receive(
        np.full((50, 32, 32), 1e3, np.float32), window, np.ones((32, 32), np.float32), np.random.default_rng(2)
    )
    power = (np.abs(np.fft.fft2(images - images.mean())) ** 2).mean(0)
    inside = np.outer(*[np.abs(np.fft.fftfreq(32)) <= 0.25] * 2)
    assert power[~inside].sum() < 1e-3 * power[inside].sum()


def test_blood_is_bright_and_muscle_dark_in_every_scanner(scans):
    for scan in scans.values():
        frame, mask = scan.frames[0].astype(float), scan.masks[0]
        blood, muscle, right = (frame[mask == label].mean() for label in (LV, MYO, RV))
        assert 0.2 < muscle / blood < 0.6
        assert muscle < right < 1.1 * blood


def test_intensities_follow_the_vendor(scans):
    for vendor, scan in scans.items():
        lowest, highest = SCANNERS[vendor].max_intensity
        assert scan.frames.dtype == np.uint16
        assert lowest - 1 <= scan.frames.max() <= highest + 1


def test_vendors_see_the_same_patient_differently(scans):
    for name in ("frames", "masks"):
        shapes = {getattr(scan, name).shape for scan in scans.values()}
        assert len(shapes) == len(scans)
    directions = [scan.stack.row_direction for scan in scans.values()]
    angles = [np.degrees(np.arccos(a @ b)) for a, b in zip(directions, directions[1:] + directions[:1], strict=True)]
    assert max(angles) > 40
    contrast = [np.median(s.frames[0][s.masks[0] == LV]) / np.median(s.frames[0]) for s in scans.values()]
    assert max(contrast) > 1.2 * min(contrast)


def test_stack_is_orthonormal_and_evenly_spaced_from_base_to_apex(scans):
    for scan in scans.values():
        stack = scan.stack
        normal = np.cross(stack.row_direction, stack.column_direction)
        assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-6)
        steps = np.diff(stack.first_pixel_mm @ normal)
        np.testing.assert_allclose(steps, -stack.spacing_mm, atol=1e-6)  # the normal points to the base
        assert 0 < stack.thickness_mm <= stack.spacing_mm


@pytest.mark.parametrize("num_slices", [6, 16])
def test_any_number_of_slices_covers_the_cavity(num_slices):
    patient = draw_patient(np.random.default_rng(6), Population({"dilated": 1.0}))
    masks = acquire(patient, SCANNERS["GE"], num_slices, 8, np.random.default_rng(6)).masks
    area = (masks[0] == LV).sum((1, 2))
    assert area[0] > 0
    assert area[-1] < 0.5 * area.max()
