"""The Sunnybrook Cardiac Data as they are published: DICOM series, contours as lists of points, a table."""

import numpy as np
import pytest

from fedcmr.client.ingest.layouts.sunnybrook import find_sunnybrook, read_contour
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.case import CASE_PIXEL_MM, CASE_SIZE, ED, ES, LV, MYO, NOT_DRAWN, load_cases
from tests.client.ingest.dicom_files import (
    CENTRE,
    COLUMN_AXIS,
    NORMAL,
    NUM_PHASES,
    NUM_SLICES,
    PIXEL_MM,
    ROW_AXIS,
    SLICE_MM,
    beating_heart,
    write_image,
)

KEY = b"k" * 32
ANGLES = np.linspace(0, 2 * np.pi, 80, endpoint=False)
END_SYSTOLE = NUM_PHASES // 2


def circle(radius: float) -> np.ndarray:
    """Points (x, y) of a contour around the cavity's middle; the first pixel's middle is (1, 1)."""
    return np.stack([CENTRE[1] + 1 + radius * np.cos(ANGLES), CENTRE[0] + 1 + radius * np.sin(ANGLES)], axis=1)


def radius(z: int, phase: int) -> float:
    return (7 + z) * (0.6 if phase else 1.0)


def write_contour(path, points) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x:.2f} {y:.2f}\r\n" for x, y in points))


def write_patient(images_folder, contours_folder, series="0001", seed=0) -> None:
    """One series whose file names count from base to apex, and contours of both phases."""
    images, _ = beating_heart()
    for z, t in np.ndindex(NUM_SLICES, NUM_PHASES):
        number = z * NUM_PHASES + t + 1
        position = -PIXEL_MM * (CENTRE[0] * ROW_AXIS + CENTRE[1] * COLUMN_AXIS) + z * SLICE_MM * NORMAL
        write_image(
            images_folder / f"IM-{series}-{number:04d}.dcm",
            images[t, z] + seed,
            PatientID=None,
            Manufacturer="GE MEDICAL SYSTEMS",
            StudyInstanceUID=f"1.2.{seed}",
            SeriesInstanceUID=f"1.2.{seed}.1",
            SOPInstanceUID=f"1.2.{seed}.1.{number}",
            InstanceNumber=number + 500,  # the file's name counts
            TriggerTime=f"{t * 40.0:.1f}",
            ImagePositionPatient=list(position),
        )
        if t in (0, END_SYSTOLE) and contours_folder:
            stem = f"IM-0001-{number:04d}"
            write_contour(contours_folder / f"{stem}-icontour-manual.txt", circle(radius(z, t)))
            write_contour(contours_folder / f"{stem}-p1contour-manual.txt", circle(2.0))
            if t == 0:
                write_contour(contours_folder / f"{stem}-ocontour-manual.txt", circle(radius(z, t) + 4))


def contours_of(root, name):
    return root / "SCD_ManualContours" / name / "contours-manual" / "IRCCI-expert"


@pytest.fixture
def source(tmp_path):
    """Both layouts: the archive's with a table, the challenge's without; and a patient whom nobody contoured."""
    root = tmp_path / "in"
    write_patient(root / "SCD_IMAGES_01" / "SCD0000101" / "CINESAX_300", contours_of(root, "SC-HF-I-01"), "0003", 1)
    write_patient(
        root / "challenge" / "SC-N-40" / "DICOM", root / "challenge/SC-N-40/contours-manual/IRCCI-expert", seed=2
    )
    write_patient(root / "SCD_IMAGES_02" / "SCD0000201" / "CINESAX_5", None, seed=3)
    write_patient(root / "SCD_IMAGES_02" / "SCD0000301" / "CINESAX_5", None, seed=4)
    (root / "scd_patientdata.csv").write_text(
        "PatientID,OriginalID,Gender,Age,Pathology\n"
        "SCD0000101,SC-HF-I-1,Female,50,Heart failure with infarct\n"
        "SCD0000201,SC-HYP-38,Male,60,Hypertrophy\n"
    )
    return root


@pytest.mark.slow
def test_contours_become_labels_and_the_rest_is_unknown(source, tmp_path):
    summary = prepare(source, tmp_path / "out", "sunnybrook", key=KEY)
    assert (summary.num_cases, summary.refused) == (3, {"not-in-table": 1})
    assert (summary.provenance.kind, summary.provenance.source) == ("public", "Sunnybrook")
    cases = {case.info.pathology: case for case in load_cases(tmp_path / "out")}
    assert {kind: (c.info.sex, c.info.contours) for kind, c in cases.items()} == {
        "HF-I": ("F", "partial"),
        "N": ("", "partial"),
        "HYP": ("M", ""),
    }
    areas = np.pi * np.array([[radius(z, phase) ** 2 for z in range(NUM_SLICES)] for phase in (0, 1)])
    walls = np.pi * np.array([(radius(z, 0) + 4) ** 2 for z in range(NUM_SLICES)]) - areas[0]
    for kind in ("HF-I", "N"):
        case = cases[kind]
        assert case.info.vendor == "GE" and case.info.ef == pytest.approx(1 - areas[1].sum() / areas[0].sum(), abs=5e-3)
        cavity_mm2 = (case.masks == LV).sum(axis=(1, 2, 3)) * CASE_PIXEL_MM**2
        np.testing.assert_allclose(cavity_mm2, areas.sum(axis=1) * PIXEL_MM**2, rtol=0.01)
        assert (case.masks[ED] == MYO).sum() * CASE_PIXEL_MM**2 == pytest.approx(walls.sum() * PIXEL_MM**2, rel=0.03)
        assert set(np.unique(case.masks[ED])) == {MYO, LV, NOT_DRAWN}
        assert set(np.unique(case.masks[ES])) == {LV, NOT_DRAWN}
        rows, columns = np.nonzero((case.masks == LV).any(axis=(0, 1)))
        assert (
            abs(rows.mean() - (CASE_SIZE - 1) / 2) < 1 and abs(columns.mean() - (CASE_SIZE - 1) / 2) < 1
        )  # the crop's centre


def test_a_contour_holds_the_pixels_whose_middles_it_surrounds(tmp_path):
    write_contour(tmp_path / "c.txt", circle(9.3))
    inside = read_contour(tmp_path / "c.txt", (88, 96))
    rows, columns = np.mgrid[:88, :96]
    distance = np.hypot(rows - CENTRE[0], columns - CENTRE[1])
    assert inside[distance < 9].all() and not inside[distance > 9.7].any()
    areas = []
    for shift in np.linspace(0, 1, 11):  # on any grid the pixels add up to the area, by Gauss's formula
        x, y = (circle(9.3) + shift).T
        write_contour(tmp_path / "c.txt", np.stack([x, y], axis=1))
        polygon = 0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))
        areas.append(read_contour(tmp_path / "c.txt", (88, 96)).sum() / polygon)
    assert np.mean(areas) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unreadable-contour"),
        ("1 2\n3 4\n", "unreadable-contour"),
        ("1 2\n3\n5 6\n", "unreadable-contour"),
        ("1 2\n3 nan\n5 6\n", "unreadable-contour"),
        ("1 2\nDoe Jane\n5 6\n", "unreadable-contour"),
        ("1 2\n3 4\n900 6\n", "masks-misaligned"),
        ("-5 2\n3 4\n9 6\n", "masks-misaligned"),
    ],
)
def test_a_damaged_contour_costs_its_patient_and_has_a_reason(tmp_path, text, reason):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(Unusable) as error:
        read_contour(tmp_path / "c.txt", (88, 96))
    assert error.value.code == reason


def test_contours_of_other_images_and_of_nobody_are_counted(source, tmp_path):
    for path in contours_of(source, "SC-HF-I-01").iterdir():
        path.rename(path.with_name(path.name.replace("IM-0001-0", "IM-0001-9")))
    write_contour(contours_of(source, "SC-N-02") / "IM-0001-0001-icontour-manual.txt", circle(5))
    with Workers() as workers:
        findings = find_sunnybrook(source, workers)
    assert findings.left_out["masks-without-frames"] == 1
    read = {study.patient: study.read for study in findings.studies}
    with pytest.raises(Unusable, match="masks-differ"):
        read["SC-HF-I-1"]()
    assert read["SC-N-40"]().masks.any() and read["SC-HYP-38"]().masks is None


def test_a_table_whose_number_is_none_is_no_reason_to_end(tmp_path):
    """Python reads no whole number of more than 4,300 digits."""
    (tmp_path / "scd_patientdata.csv").write_text(f"PatientID,OriginalID\nSCD0000101,SC-N-{'1' * 5000}\n")
    with Workers() as workers:
        assert find_sunnybrook(tmp_path, workers).studies == []
