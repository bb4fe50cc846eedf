import csv
import hashlib
import shutil
import subprocess

import numpy as np
import pydicom
import pytest

from server.dicom_export import MAX_STORED, export_case
from server.release import DATASHEET_NAME, cavity_ml, write_release
from shared.anatomy import ejection_fraction
from shared.case import LV, MYO, Case, CaseInfo, load_cases
from shared.errors import UserError

PRIVACY = {
    "unit": "one patient at one site",
    "accountant": "prv",
    "delta": 1e-3,
    "epsilon": 7.98,
    "sites": {
        "A": {"epsilon": 7.98, "steps": 11, "refused": 0},
        "B": {"epsilon": None, "steps": 0, "refused": 2},
    },
}
FACTS = {"study": "test", "privacy": PRIVACY, "made_with": {"rounds": 6}, "real_data": "They were simulated."}
SEEN = [0.7, 0.72, 0.71]


def synthetic_case(number: int, vendor: str = "GE") -> Case:
    rng = np.random.default_rng(number)
    masks = np.zeros((2, 3, 64, 64), np.uint8)
    masks[:, :, 20:44, 20:44] = MYO
    masks[0, :, 24:40, 24:40] = LV
    masks[1, :, 28:36, 28:36] = LV
    frames = rng.random(masks.shape, dtype=np.float32)
    info = CaseInfo(f"syn-{number:05d}", vendor, float("nan"), ejection_fraction(masks), f"syn-{number:05d}")
    return Case(info, frames, masks, np.array([9.5, 2, 2], np.float32))


@pytest.fixture
def cases() -> list[Case]:
    return [synthetic_case(0, "GE"), synthetic_case(1, "Siemens"), synthetic_case(2, "GE")]


def test_release_reads_back_with_labels_and_checksums(cases, tmp_path):
    folder = tmp_path / "synthetic"
    write_release(folder, cases, [0.7, 0.71, 0.72], [0.68, float("nan"), 0.73], FACTS)
    for written, read in zip(cases, load_cases(folder), strict=True):
        np.testing.assert_array_equal(written.frames, read.frames)
        assert read.info.vendor == written.info.vendor
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["vendor"] for row in rows] == ["GE", "Siemens", "GE"]
    assert [float(row["ef_requested"]) for row in rows] == [0.7, 0.71, 0.72]
    assert [row["ef_measured"] for row in rows] == ["0.68", "", "0.73"]
    assert float(rows[0]["ef"]) == pytest.approx(1 - 8**2 / 16**2)
    assert float(rows[0]["lv_ed_ml"]) == pytest.approx(3 * 16**2 * 9.5 * 4 / 1000, abs=0.005)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        "SHA256SUMS"
    }
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_datasheet_tells_what_was_spent(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "epsilon = 7.98 at delta = 0.001" in text and "| B | - | 0.001 |" in text
    assert "2 in the style of GE, 1 in the style of Siemens" in text
    assert "3 slices 9.5 mm apart, of 64 x 64 pixels" in text


def test_datasheet_tells_whether_the_pictures_show_what_was_asked_for(cases, tmp_path):
    asked, seen = [0.2, 0.5, 0.8], [0.25, 0.45, 0.70]
    write_release(tmp_path / "s", cases, asked, seen, FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert f"r = {np.corrcoef(asked, seen)[0, 1]:.3f}" in text
    assert f"mean absolute difference {100 * np.mean([0.05, 0.05, 0.10]):.1f} " in text and "in 0 of 3 patients" in text
    write_release(tmp_path / "s", cases, asked, [0.25, float("nan"), float("nan")], FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "r = unknown, mean absolute difference 5.0 " in text and "in 2 of 3 patients" in text


def test_datasheet_warns_where_there_was_no_privacy(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, {**FACTS, "privacy": {**PRIVACY, "epsilon": None}})
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "trained without differential privacy" in text and "epsilon =" not in text


def test_a_second_release_replaces_the_first_whole(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS)
    write_release(tmp_path / "s", cases[:1], None, SEEN[:1], FACTS)
    assert len(list((tmp_path / "s" / "cases").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_of_something_else_is_left_alone(cases, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        write_release(tmp_path, cases, None, SEEN, FACTS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_cavity_volume_counts_voxels():
    case = synthetic_case(0)
    assert cavity_ml(case, 1) == pytest.approx((case.masks[1] == LV).sum() * 9.5 * 2 * 2 / 1000)


def test_dicom_says_that_it_is_synthetic_and_holds_the_pixels(tmp_path):
    case = synthetic_case(7, "Philips")
    paths = export_case(tmp_path, case)
    datasets = [pydicom.dcmread(path) for path in paths]
    assert len(datasets) == 6 and len({dataset.SOPInstanceUID for dataset in datasets}) == 6
    for i, dataset in enumerate(datasets):
        phase, index = divmod(i, 3)
        assert dataset[0x0008, 0x001C].value == "YES"
        assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.4"
        np.testing.assert_allclose(dataset.pixel_array / MAX_STORED, case.frames[phase, index], atol=0.5 / MAX_STORED)
        assert dataset.ImagePositionPatient[2] == -9.5 * index and dataset.TemporalPositionIdentifier == phase + 1


def test_dicom_names_no_scanner(tmp_path):
    dataset = pydicom.dcmread(export_case(tmp_path, synthetic_case(7, "Philips"))[0])
    assert dataset.Manufacturer == "fedcmr" and "Philips" in dataset.SeriesDescription
    for keyword in ("DeviceSerialNumber", "StationName", "InstitutionName", "MagneticFieldStrength"):
        assert keyword not in dataset
    assert not dataset.StudyDate and not dataset.PatientBirthDate


def test_equal_cases_have_equal_uids_and_others_do_not(tmp_path):
    def uid(folder, case):
        return pydicom.dcmread(export_case(tmp_path / folder, case)[0]).StudyInstanceUID

    assert uid("a", synthetic_case(1)) == uid("b", synthetic_case(1)) != uid("c", synthetic_case(2))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_dciodvfy_finds_no_error(tmp_path):
    path = export_case(tmp_path, synthetic_case(1))[0]
    report = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in (report.stdout + report.stderr).splitlines() if line.startswith("Error")]
    # Debian's dicom3tools is older than SyntheticData (0008,001C) and does not know the tag.
    assert [line for line in errors if "(0008,001c)" not in line] == []


def test_release_with_dicom_lists_it_in_the_checksums(cases, tmp_path):
    write_release(tmp_path / "s", cases[:1], None, SEEN[:1], FACTS, dicom=True)
    assert "dicom/syn-00000/es_02.dcm" in (tmp_path / "s" / "SHA256SUMS").read_text()
