"""The segmenter finds the heart in scans without masks: simulated ones, and real ones where they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fedcmr.client.ingest.centring import find_centre, find_frames, lv_voxels
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.heart_finder import cavity_areas, find_heart
from fedcmr.client.ingest.layouts.acdc import find_acdc
from fedcmr.client.ingest.layouts.mnms import find_mnms
from fedcmr.client.ingest.layouts.plain import find_plain, parse_labels
from fedcmr.client.ingest.normalise import normalise, orient
from fedcmr.client.ingest.prepare import prepare
from fedcmr.shared.case import LV, MYO, RV, load_cases
from fedcmr.shared.tasks.segmentation.finds import finds_of_cavity
from fedcmr.simulations.hospital import write_hospital
from fedcmr.simulations.scanners.acquisition import SCANNERS

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "real"
real = [pytest.mark.real, pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for vendor in SCANNERS:
        write_hospital(folder / vendor, vendor, 1, 8, 12, 5, vendor.lower())
    return folder


@pytest.fixture(scope="module")
def cines(hospitals) -> dict[str, Cine]:
    return {vendor: orient(find_dicom(hospitals / vendor).studies[0].read()) for vendor in SCANNERS}


def errors_mm(cine: Cine, frames: tuple[int, int]) -> tuple[float, float]:
    """Of the whole heart's and of the left ventricle's middle, against those of the masks."""
    found = find_heart(cine.images[list(frames)], cine.spacing_mm)
    masks = cine.masks[list(frames)]
    true = [ndimage.center_of_mass(np.isin(masks, of).sum(axis=(0, 1))) for of in ((RV, MYO, LV), LV)]
    return tuple(float(np.hypot(*((np.array(a) - b) * cine.spacing_mm[1:]))) for a, b in zip(found, true, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("vendor", SCANNERS)
def test_in_simulated_scans_heart_and_ventricle_are_found(cines, vendor):
    cine = cines[vendor]
    heart, ventricle = errors_mm(cine, find_frames(replace(cine, masks=None)))
    assert heart < 10 and ventricle < 3


@pytest.mark.slow
def test_a_heart_at_the_image_s_edge_is_found_where_it_is(cines):
    cine = cines["Philips"]
    heart = find_centre(cine)
    first = [max(0, int(c) - round(50 / mm)) for c, mm in zip(heart, cine.spacing_mm[1:], strict=True)]
    cut = cine.images[:, :, first[0] :, first[1] :]
    frames = find_frames(replace(cine, masks=None))
    whole, moved = (find_heart(images[list(frames)], cine.spacing_mm) for images in (cine.images, cut))
    shift = np.subtract(whole.ventricle, moved.ventricle)
    assert np.abs((shift - first) * cine.spacing_mm[1:]).max() < 4


@pytest.mark.slow
@pytest.mark.parametrize("vendor", SCANNERS)
def test_the_cavity_s_areas_follow_its_volume_over_the_cycle(cines, vendor):
    cine = cines[vendor]
    heart = find_heart(cine.images[list(find_frames(replace(cine, masks=None)))], cine.spacing_mm)
    areas = cavity_areas(cine.images, cine.spacing_mm, heart)
    likeness = np.corrcoef(areas, lv_voxels(cine.masks))[0, 1]
    assert areas.shape == (12,) and likeness > 0.8


@pytest.mark.slow
def test_without_masks_a_case_is_centred_on_its_heart_in_the_child_processes_too(hospitals, tmp_path):
    for path in hospitals.rglob("masks.nii.gz"):
        path.rename(path.with_suffix(".hidden"))
    try:
        summary = prepare(hospitals, tmp_path / "blind", "dicom", key=bytes(32), num_processes=2)
    finally:
        for path in hospitals.rglob("masks.nii.hidden"):
            path.rename(path.with_suffix(".gz"))
    prepare(hospitals, tmp_path / "drawn", "dicom", key=bytes(32), num_processes=2)
    assert (summary.num_cases, summary.refused) == (3, {}) and "heart-by-motion" not in summary.warnings
    drawn = {case.info.pseudonym: case for case in load_cases(tmp_path / "drawn")}
    for case in load_cases(tmp_path / "blind"):
        other = drawn[case.info.pseudonym]
        here, there = (one.frames[0].mean(axis=0)[35:93, 35:93] for one in (case, other))  # 72 mm
        turns = [np.rot90(there, k) for k in range(4)]  # masks say better than axes how the heart lies
        offsets = [(a, b) for a in range(-7, 8) for b in range(-7, 8)]  # 9 mm
        moved = [np.roll(turned, offset, (0, 1)) for turned in turns for offset in offsets]
        likeness = [np.corrcoef(here.ravel(), one.ravel())[0, 1] for one in moved]
        assert max(likeness) > 0.8, "the same heart, within 9 mm"


def test_what_moves_and_is_no_heart_keeps_the_centre_of_motion_and_a_warning():
    rng = np.random.default_rng(0)
    rows = np.arange(96)[:, None]
    bright = [100 * (np.abs(rows - 48) < 20 + 8 * np.cos(2 * np.pi * t / 10)) for t in range(10)]
    images = np.stack([np.stack([plane + rng.normal(0, 1, (96, 96)) for _ in range(6)]) for plane in bright])
    cine = Cine(images.astype(np.float32), None, (9.0, 2.0, 2.0), None, "GE", 1.5)
    assert find_heart(cine.images[[0, 5]], cine.spacing_mm) is None
    found = normalise(cine)
    assert found.warnings == ("heart-by-motion",)
    assert (found.ed, found.es) == find_frames(orient(cine), find_centre(orient(cine)))


@pytest.mark.slow
def test_masks_decide_where_they_are(cines):
    found = normalise(cines["GE"])
    assert found.warnings == () and found.ed == int(lv_voxels(cines["GE"].masks).argmax())


GE = parse_labels("lv=3,myo=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda: find_acdc(REAL / "acdc", [0]), marks=real, id="acdc"),
        pytest.param(lambda: find_mnms(REAL / "three_vendors/siemens/test"), marks=real, id="siemens"),
        pytest.param(lambda: find_mnms(REAL / "three_vendors/philips/test"), marks=real, id="philips"),
        pytest.param(lambda: find_plain(REAL / "three_vendors/ge/test", GE), marks=real, id="ge"),
    ],
)
def test_real_hearts_are_found_within_a_centimetre(read, request):
    errors = []
    for study in read().studies:
        cine = orient(study.read())
        errors.append(errors_mm(cine, find_frames(replace(cine, masks=None))))
    heart, ventricle = np.max(errors, axis=0)
    assert ventricle < 10 or pytest.fail("a ventricle was not found")
    if "ge" not in request.node.name:  # its masks do not know the right ventricle
        assert heart < 10


def test_a_find_that_fills_the_image_has_no_muscle_around_it():
    ((find, share),) = finds_of_cavity(np.full((8, 8), LV, np.uint8))
    assert find.all() and share == 0
