"""Contours beside the heart are noticed: those of simulated scans when they are moved, and one real patient's."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.displaced import fit_of_contours
from fedcmr.client.ingest.layouts.acdc import find_acdc
from fedcmr.client.ingest.layouts.mnms import find_mnms
from fedcmr.client.ingest.layouts.plain import find_plain, parse_labels
from fedcmr.client.ingest.prepare import prepare
from fedcmr.simulations.hospital import write_hospital
from fedcmr.simulations.scanners.acquisition import SCANNERS

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "real"
real = [pytest.mark.real, pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")]
GE = parse_labels("lv=3,myo=2")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for vendor in SCANNERS:
        write_hospital(folder / vendor, vendor, 1, 8, 12, 5, vendor.lower())
    return folder


@pytest.fixture(scope="module")
def cines(hospitals) -> dict[str, Cine]:
    return {vendor: find_dicom(hospitals / vendor).studies[0].read() for vendor in SCANNERS}


def moved(cine: Cine, rows_mm: float, columns_mm: float) -> Cine:
    """With its masks moved, and the images left."""
    shift = (round(rows_mm / cine.spacing_mm[1]), round(columns_mm / cine.spacing_mm[2]))
    return replace(cine, masks=np.roll(cine.masks, shift, axis=(2, 3)))


@pytest.mark.parametrize("vendor", SCANNERS)
def test_masks_are_displaced_where_they_were_moved_by_a_wall_and_only_there(cines, vendor):
    fit = fit_of_contours(cines[vendor])
    assert not fit.is_displaced and np.hypot(*fit.offset_mm) < 4
    for rows_mm, columns_mm in ((12, 0), (0, -14), (-10, 10)):
        fit = fit_of_contours(moved(cines[vendor], rows_mm, columns_mm))
        assert fit.is_displaced and np.hypot(*np.add(fit.offset_mm, (rows_mm, columns_mm))) < 4
    assert not fit_of_contours(moved(cines[vendor], 3, 3)).is_displaced


def test_a_heart_at_the_image_s_edge_is_not_displaced(cines):
    cine = cines["Siemens"]
    first = np.argwhere(cine.masks.any(axis=(0, 1, 3)))[0, 0]
    cut = replace(cine, images=cine.images[:, :, first + 2 :], masks=cine.masks[:, :, first + 2 :])
    assert not fit_of_contours(cut).is_displaced
    assert fit_of_contours(moved(cut, 0, 12)).is_displaced


def test_masks_on_noise_and_no_masks_say_nothing(cines):
    cine = cines["GE"]
    noise = np.random.default_rng(0).normal(0, 1, cine.images.shape).astype(np.float32)
    assert not fit_of_contours(replace(cine, images=noise)).is_displaced
    assert fit_of_contours(replace(cine, masks=None)) is None


def test_prepare_keeps_the_case_with_a_warning(hospitals, tmp_path):
    shutil.copytree(hospitals / "GE", tmp_path / "moved")
    (path,) = (tmp_path / "moved").rglob("masks.nii.gz")
    drawn = nibabel.load(path)
    labels = np.roll(np.asarray(drawn.dataobj), round(14 / drawn.header.get_zooms()[0]), axis=0)
    nibabel.save(nibabel.Nifti1Image(labels, drawn.affine), path)
    for source, warned in ((hospitals / "GE", False), (tmp_path / "moved", True)):
        summary = prepare(source, tmp_path / f"{source.name}-cases", "dicom", key=bytes(32))
        assert summary.num_cases == 1
        assert ("contours-displaced" in summary.warnings) == warned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "displaced"),
    [
        pytest.param(lambda: find_acdc(REAL / "acdc", [0]), [], marks=real, id="acdc"),
        pytest.param(lambda: find_mnms(REAL / "three_vendors/philips/test"), [], marks=real, id="philips"),
        pytest.param(lambda: find_plain(REAL / "three_vendors/ge/train", GE), [23], marks=real, id="ge"),
    ],
)
def test_of_real_patients_the_contours_of_one_are_displaced(read, displaced):
    fits = [fit_of_contours(study.read()) for study in read().studies]
    assert [index for index, fit in enumerate(fits) if fit is not None and fit.is_displaced] == displaced
