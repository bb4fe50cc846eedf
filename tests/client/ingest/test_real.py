"""The real scans next to the project, where they are. Only the public development fold is looked at one by one."""

from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedcmr.client.check.folder import check
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.centring import find_centre, find_frames
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.prepare import prepare
from fedcmr.shared.case import CASE_SIZE, LV, RV, load_case, load_cases, read_index

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "real"
KEY = bytes(32)
pytestmark = [pytest.mark.real, pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")]


def assert_comparable(case) -> None:
    """Heart in the middle, right ventricle at the upper left, base first."""
    labelled = np.argwhere(case.masks > 0)[:, 2:].mean(axis=0)
    rv, lv = (np.argwhere(case.masks == label)[:, 2:].mean(axis=0) for label in (RV, LV))
    area = (case.masks[0] > 0).sum(axis=(1, 2))
    area = area[area > 0]
    assert np.abs(labelled - (CASE_SIZE - 1) / 2).max() < 1.8
    assert (rv < lv).all()
    assert area[: len(area) // 2].sum() > area[-(len(area) // 2) :].sum()


def loop_ef(labels, lv) -> float:
    """From the number of a label among the bytes of each phase."""
    volumes = [np.asarray(phase).astype(np.uint8).tobytes().count(lv) for phase in labels]
    return 1 - min(volumes) / max(volumes)


@pytest.mark.slow
def test_all_79_acdc_patients_prepare_with_the_ejection_fraction_of_their_masks(tmp_path):
    summary = prepare(REAL / "acdc", tmp_path / "out", "acdc", key=KEY, num_processes=2)
    assert (summary.num_cases, summary.refused, summary.left_out) == (79, {}, {})
    efs = {info.group: info.ef for info in read_index(tmp_path / "out")}
    for folder in (REAL / "acdc").glob("patient*"):
        expected = loop_ef([nibabel.load(path).dataobj for path in folder.glob("*_gt.nii.gz")], 3)
        # Of private patients not even a failing test may print a figure.
        assert abs(efs[pseudonym(KEY, folder.name[7:])] - expected) < 1e-5 or pytest.fail(
            "an ejection fraction differs"
        )
    development = [info for info in read_index(tmp_path / "out") if info.group in _groups(0)]
    assert len(development) == 19
    # Number 76 is not there: its scans were number 74's.
    assert Counter(info.pathology for info in development) == {"DCM": 4, "HCM": 4, "MINF": 4, "NOR": 3, "RV": 4}
    for info in development:
        assert_comparable(load_case(tmp_path / "out", info))


def _groups(fold) -> set[str]:
    """Pseudonyms of the patients of a fold."""
    return {pseudonym(KEY, f"{number:03d}") for number in range(1, 101) if (number - 1) % 5 == fold}


def test_mnms_patients_of_three_vendors_prepare_alike(tmp_path):
    summary = prepare(REAL / "mnms", tmp_path / "out", "mnms", key=KEY)
    assert (summary.num_cases, summary.refused) == (3, {})
    cases = load_cases(tmp_path / "out")
    masks = [nibabel.load(path).dataobj for path in (REAL / "mnms").rglob("*_sa_gt.nii.gz")]
    expected = [loop_ef(np.moveaxis(np.asarray(one), 3, 0), 1) for one in masks]
    assert sorted(case.info.ef for case in cases) == pytest.approx(sorted(expected), abs=1e-5)
    assert {case.info.vendor for case in cases} == {"Siemens", "Philips", "GE"}
    for case in cases:
        assert_comparable(case)
    assert check(tmp_path / "out").num_labelled == 3


@pytest.mark.slow
def test_a_siemens_study_with_one_series_per_slice_gives_one_case(tmp_path):
    source = REAL / "dicom" / "siemens_vida_cine"
    found = find_dicom(source)
    assert found.left_out == {"other-orientation": 1, "not-dicom": 1}  # the 4-chamber series, and a licence text
    cine = found.studies[0].read()
    assert cine.images.shape == (25, 6, 208, 256)
    assert cine.spacing_mm == pytest.approx((17.7, 1.40625, 1.40625), abs=0.01)
    ed, es = find_frames(cine)
    assert min(ed, 25 - ed) <= 3, "end-diastole is near the R wave, where the cine starts"
    assert 6 <= es <= 13, "end-systole follows about a third of a beat later"
    # The septum's middle, read off the image, in pixels of 1.4 mm.
    assert np.hypot(*np.subtract(find_centre(cine), (99, 127))) < 12
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    (case,) = load_cases(tmp_path / "out")
    assert summary.num_cases == 1
    assert (case.info.vendor, case.info.field_strength_t, case.frames.shape) == (
        "Siemens",
        3.0,
        (2, 6, CASE_SIZE, CASE_SIZE),
    )
