"""Letters drawn into scans are found, scans without letters are left alone."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fedcmr.client.ingest.burned_in import MIN_STROKES, is_annotated, num_strokes, suspect
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.layouts.acdc import find_acdc
from fedcmr.client.ingest.layouts.mnms import find_mnms
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.simulations.hospital import POPULATIONS
from fedcmr.simulations.patients.population import draw_patient
from fedcmr.simulations.scanners.acquisition import SCANNERS, acquire

REAL = Path(__file__).resolve().parents[4] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real scans are not there")
GLYPHS = {  # rows of a 5 x 7 font, from the top, as bits
    "A": (14, 17, 17, 31, 17, 17, 17),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    "0": (14, 17, 19, 21, 25, 17, 14),
    " ": (0,) * 7,
    "-": (0, 0, 0, 31, 0, 0, 0),
}


def letters(text: str, scale: int = 1) -> np.ndarray:
    """Shape (7 * scale, 6 * len(text) * scale), bool."""
    glyphs = [[[bool(row >> bit & 1) for bit in (4, 3, 2, 1, 0)] + [False] for row in GLYPHS[c]] for c in text]
    return np.kron(np.concatenate(np.array(glyphs), axis=1), np.ones((scale, scale))).astype(bool)


def cine(images: np.ndarray) -> Cine:
    return Cine(images.astype(np.float32), None, (10.0, 1.4, 1.4), None, "unknown", math.nan)


def body(num_phases: int = 12, num_slices: int = 8, seed: int = 0) -> np.ndarray:
    """A thorax with a beating heart and fat of fixed brightness under the skin, (T, Z, 160, 192)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:160, :192].astype(float)
    images = np.zeros((num_phases, num_slices, 160, 192))
    for z in range(num_slices):
        wide = np.hypot((x - 96) / (80 - z), (y - 80) / (62 - z))
        still = np.where(wide < 1, 300.0, 0.0) + np.where((wide < 1) & (wide > 0.93), 500.0, 0.0)
        for t in range(num_phases):
            radius = 20 + 5 * np.cos(2 * np.pi * t / num_phases) - z
            images[t, z] = still + np.where(np.hypot(x - 100, y - 80) < radius, 400.0, 0.0)
    return np.abs(images + rng.normal(0, 15, images.shape))


def drawn(images: np.ndarray, text: np.ndarray, row: int, column: int, value: float) -> np.ndarray:
    images = images.copy()
    height, width = text.shape
    images[..., row : row + height, column : column + width][..., text] = value
    return images


def test_a_body_without_letters_is_not_suspected():
    assert not any(suspect(cine(body(seed=seed))) for seed in range(5))


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("place", ["top", "bottom"])
@pytest.mark.parametrize("text", ["DOE JOHN", "JANE 1961-09"])
def test_a_name_in_a_corner_is_found_whatever_its_size(scale, place, text):
    mark = letters(text, scale)[:, : 192 - 6]
    row = 3 if place == "top" else 160 - 3 - len(mark)
    images = body()
    assert suspect(cine(drawn(images, mark, row, 3, images.max())))


def test_dark_letters_on_a_bright_bar_and_turned_images_are_found():
    images = body()
    bar = images.copy()
    bar[..., 2:15, 2:60] = images.max()
    dark = drawn(bar, letters("DOE JOHN"), 5, 5, 0.0)
    bright = drawn(images, letters("DOE JOHN"), 4, 4, images.max())
    assert suspect(cine(dark))
    flipped, transposed = bright[..., ::-1], bright.transpose(0, 1, 3, 2)
    for turned in (np.rot90(bright, axes=(2, 3)), transposed, flipped, flipped[..., ::-1, :]):
        assert suspect(cine(turned))


def slanted(text: str, angle: float, scale: int = 1) -> np.ndarray:
    """Letters on a line that rises by so many degrees."""
    return ndimage.rotate(np.pad(letters(text, scale), 2).astype(float), angle, order=1) > 0.5


@pytest.mark.parametrize("angle", [-35, -10, 5, 20, 35, 45, 60, 80, 100, 125, 170])
def test_a_name_is_found_at_any_slant(angle):
    """Somebody writes along the scanner's axes, somebody else along the image's."""
    images = body()
    mark = slanted("DOE JOHN 010160", angle)[:156, :188]
    row, column = ((extent - length) // 2 for extent, length in zip((160, 192), mark.shape, strict=True))
    assert suspect(cine(drawn(images, mark, row, column, images.max())))


def test_letters_survive_lossy_compression():
    images = drawn(body(), letters("JOHN DOE 1961"), 4, 4, 800.0)
    blurred = (images + np.roll(images, 1, 2) * 0.4 + np.roll(images, 1, 3) * 0.4) / 1.8
    noisy = blurred + np.random.default_rng(1).normal(0, 25, images.shape)
    assert suspect(cine(noisy))


def test_what_a_single_slice_shows_is_no_name():
    images = body()
    images[:, :1] = drawn(images[:, :1], letters("DOE JOHN 1961"), 3, 3, 800.0)
    assert not suspect(cine(images))


def test_thin_bright_vessels_that_pulsate_are_no_text():
    images, rng = body(), np.random.default_rng(2)
    for row, column in rng.integers(20, 140, (60, 2)):
        images[..., row : row + 6, column : column + 2] += 500 * rng.random((len(images), 1, 1, 1))
    assert not suspect(cine(images))


def test_two_letters_name_nobody():
    images = body()
    assert not suspect(cine(drawn(images, letters("A"), 4, 4, images.max())))


def test_only_an_image_that_says_yes_is_annotated():
    def header(value: str) -> Header:
        return Header(
            Path("x"),
            "p",
            "1",
            "2",
            "3",
            "GE",
            1.5,
            (0, 0, 0),
            (1, 0, 0, 0, 1, 0),
            (1, 1),
            2,
            2,
            0,
            1,
            BurnedInAnnotation=value,
        )

    assert is_annotated([header(""), header("YES")])
    assert not is_annotated([header(""), header("NO")])
    assert {"burned-in-annotation", "burned-in-suspected"} <= REASONS.keys()


@pytest.mark.parametrize("vendor", sorted(POPULATIONS))
def test_simulated_scans_hold_no_text_until_it_is_drawn_in(vendor):
    rng = np.random.default_rng(5)
    scan = acquire(draw_patient(rng, POPULATIONS[vendor]), SCANNERS[vendor], 6, 6, rng)
    images = np.asarray(scan.frames, np.float32)
    assert num_strokes(images) <= MIN_STROKES // 2
    assert suspect(cine(drawn(images, letters("DOE JOHN"), 4, 4, images.max())))


@pytest.mark.slow
@needs_real
@pytest.mark.real
def test_no_real_scan_is_suspected_and_every_one_is_with_a_name_in_it():
    """The development patients of ACDC, three of M&Ms and one cine straight from the scanner."""
    studies = [
        *find_acdc(REAL / "acdc", [0]).studies,
        *find_mnms(REAL / "mnms").studies,
        *find_dicom(REAL / "dicom" / "siemens_vida_cine").studies,
    ]
    assert len(studies) == 23
    for index, study in enumerate(studies):
        images = study.read().images
        assert num_strokes(images) <= MIN_STROKES // 2, index
        row, column = ((3, 3), (-17, 3), (3, -99), (-17, -99))[index % 4]
        height, width = images.shape[2:]
        assert suspect(cine(drawn(images, letters("JOHN DOE", 2), row % height, column % width, images.max()))), index
        if index % 4 == 0:
            mark = slanted("JOHN DOE 1961", (35, 60, 125)[index % 3])
            assert suspect(cine(drawn(images, mark[: height - 4, : width - 4], 2, 2, images.max()))), index
