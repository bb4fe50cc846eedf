"""The DICOM and NIfTI of a synthetic data set: what they say, where they lie, and the way back through `prepare`."""

import subprocess
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from fedcmr.client.cli import main
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.server.dataset.dicom import MAX_STORED, export_case
from fedcmr.server.dataset.nifti import LABELS, export_nifti
from fedcmr.server.dataset.nnunet import export_nnunet
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.settings import SynthesisConfig
from fedcmr.shared.case import CASE_PIXEL_MM, CASE_SIZE, LV, MYO, RV, Case, load_cases
from fedcmr.shared.orientation import BASE_TO_APEX
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, of_folder, public
from tests.client.ingest.dicom_files import write_study

KEY = bytes(range(32))
SYNTHETIC_DATA = (0x0008, 0x001C)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture
def cases(prior) -> list[Case]:
    """True anatomy, rendered by a generator that has learnt nothing."""
    return synthesize(prior, None, SynthesisConfig(num_cases=4, num_steps=1), ["GE", "Philips"], seed=3).cases


def dicom_affine(datasets: list[pydicom.Dataset]) -> np.ndarray:
    """(column, row, slice, 1) to LPS from the attributes of one phase's slices, as PS3.3 C.7.6.2.1.1 has it."""
    first, second = datasets[:2]
    column, row = np.split(np.array(first.ImageOrientationPatient, float), 2)
    affine = np.eye(4)
    affine[:3, 0] = column * first.PixelSpacing[1]
    affine[:3, 1] = row * first.PixelSpacing[0]
    affine[:3, 2] = np.subtract(second.ImagePositionPatient, first.ImagePositionPatient)
    affine[:3, 3] = first.ImagePositionPatient
    return affine


def test_dicom_says_that_it_is_synthetic_and_holds_the_pixels(cases, tmp_path):
    case = cases[0]
    datasets = [pydicom.dcmread(path) for path in export_case(tmp_path, case)]
    num_slices = case.frames.shape[1]
    assert len({dataset.SOPInstanceUID for dataset in datasets}) == len(datasets) == 2 * num_slices
    for i, dataset in enumerate(datasets):
        phase, index = divmod(i, num_slices)
        assert (dataset[SYNTHETIC_DATA].value, dataset[SYNTHETIC_DATA].VR) == ("YES", "CS")
        assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.4"
        np.testing.assert_allclose(dataset.pixel_array / MAX_STORED, case.frames[phase, index], atol=0.5 / MAX_STORED)
        assert (dataset.TemporalPositionIdentifier, dataset.CardiacNumberOfImages) == (phase + 1, 2)
        assert dataset.SpacingBetweenSlices == pytest.approx(case.spacing_mm[0], abs=1e-4)


def test_simpleitk_reads_each_phase_as_one_volume_with_its_spacing_and_place(cases, tmp_path):
    """As 3D Slicer does: a series is a volume. Both phases in one series were twice the slices at half the distance."""
    case = cases[0]
    paths = export_case(tmp_path, case)
    affine = dicom_affine([pydicom.dcmread(path) for path in paths[: case.frames.shape[1]]])
    folder = str(tmp_path / case.info.pseudonym)
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(folder)
    assert len(series) == 2
    seen = []
    for uid in series:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder, uid))
        image = reader.Execute()
        assert image.GetSize() == case.frames.shape[:0:-1]
        np.testing.assert_allclose(image.GetSpacing(), case.spacing_mm[::-1], rtol=1e-5)
        direction = np.array(image.GetDirection()).reshape(3, 3)
        np.testing.assert_allclose(direction[:, 0], affine[:3, 0] / case.spacing_mm[2], atol=1e-5)
        np.testing.assert_allclose(direction[:, 1], affine[:3, 1] / case.spacing_mm[1], atol=1e-5)
        pixels = SimpleITK.GetArrayFromImage(image) / MAX_STORED
        for index in range(case.frames.shape[1]):
            # Where the pixel of array index (0, 0, index) lies, whichever end the reader began at.
            place = image.TransformIndexToPhysicalPoint((0, 0, index))
            ours = int(np.rint((np.linalg.inv(affine) @ [*place, 1])[2]))
            np.testing.assert_allclose(affine[:3] @ [0, 0, ours, 1], place, atol=1e-3)
            seen += [(p, ours) for p in (0, 1) if np.allclose(pixels[index], case.frames[p, ours], atol=1e-3)]
    assert sorted(seen) == [(p, z) for p in (0, 1) for z in range(case.frames.shape[1])]


def test_segmentations_hold_the_masks_their_codes_and_their_images(cases, tmp_path):
    """Read back by highdicom, which other programs than ours wrote."""
    case = cases[0]
    datasets = [pydicom.dcmread(path) for path in export_case(tmp_path, case)]
    num_slices = case.frames.shape[1]
    for phase, name in enumerate(("ed", "es")):
        path = tmp_path / case.info.pseudonym / "masks" / f"{name}.dcm"
        assert pydicom.dcmread(path)[SYNTHETIC_DATA].value == "YES"
        masks = highdicom.seg.segread(path)
        images = datasets[phase * num_slices : (phase + 1) * num_slices]
        assert masks.segmentation_type.value == "BINARY" and masks.StudyInstanceUID == images[0].StudyInstanceUID
        assert [one.SeriesInstanceUID for one in masks.ReferencedSeriesSequence] == [images[0].SeriesInstanceUID]
        found = {
            masks.get_segment_description(number).segmented_property_type.value: number
            for number in masks.segment_numbers
        }
        assert found.keys() == {"87878005", "49848007", "53085002"}
        assert {masks.get_segment_description(n).segmented_property_type.scheme_designator for n in found.values()} == {
            "SCT"
        }
        planes = masks.get_pixels_by_source_instance(
            [image.SOPInstanceUID for image in images], assert_missing_frames_are_empty=True
        )
        for code, label in (("87878005", LV), ("49848007", MYO), ("53085002", RV)):
            np.testing.assert_array_equal(planes[..., found[code] - 1], case.masks[phase] == label)
        assert {masks.ContentDate, masks.StudyDate} == {"19000101", ""} and "InstanceCreationDate" not in masks


def test_a_phase_without_labels_has_no_segmentation(cases, tmp_path):
    masks = cases[0].masks.copy()
    masks[1] = 0
    export_case(tmp_path, replace(cases[0], masks=masks))
    assert [path.name for path in (tmp_path / cases[0].info.pseudonym / "masks").iterdir()] == ["ed.dcm"]


def test_dicom_names_no_scanner(cases, tmp_path):
    case = cases[1]
    dataset = pydicom.dcmread(export_case(tmp_path, case)[0])
    assert dataset.Manufacturer == "fedcmr" and case.info.vendor in dataset.SeriesDescription
    for keyword in ("DeviceSerialNumber", "StationName", "InstitutionName", "MagneticFieldStrength", "TriggerTime"):
        assert keyword not in dataset
    assert not dataset.StudyDate and not dataset.PatientBirthDate and not dataset.EchoTime


def test_equal_cases_have_equal_uids_and_others_do_not(cases, tmp_path):
    def uid(folder, case):
        return pydicom.dcmread(export_case(tmp_path / folder, case)[0]).StudyInstanceUID

    assert uid("a", cases[0]) == uid("b", cases[0]) != uid("c", cases[1])


def test_nifti_reads_back_equal_and_says_that_it_is_synthetic(cases, tmp_path):
    export_nifti(tmp_path, cases)
    for case in cases:
        for name, array in (("frames", case.frames), ("masks", case.masks)):
            image = nibabel.load(tmp_path / name / f"{case.info.pseudonym}.nii.gz")
            read = np.asarray(image.dataobj)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read.transpose(3, 2, 1, 0), array)
            np.testing.assert_allclose(image.header.get_zooms()[:3], case.spacing_mm[::-1], rtol=1e-5)
            assert image.header["descrip"].item().startswith(b"SYNTHETIC")
            assert image.header.get_xyzt_units()[0] == "mm"
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_dicom_and_nifti_lie_in_the_same_place(cases, tmp_path):
    export_nifti(tmp_path / "nifti", cases)
    for case in cases:
        paths = export_case(tmp_path / "dicom", case)
        expected = LPS_TO_RAS @ dicom_affine([pydicom.dcmread(path) for path in paths[: case.frames.shape[1]]])
        for path in (
            tmp_path / "nifti" / "frames" / f"{case.info.pseudonym}.nii.gz",
            tmp_path / "nifti" / "masks" / f"{case.info.pseudonym}.nii.gz",
        ):
            np.testing.assert_allclose(nibabel.load(path).affine, expected, atol=1e-4)


def test_the_heart_lies_as_in_a_body(cases, tmp_path):
    """Slices run to the left, forward and down, seen from the apex; the right ventricle is the patient's right one."""
    case = cases[0]
    affine = dicom_affine([pydicom.dcmread(path) for path in export_case(tmp_path, case)])
    x, y, z = affine[:3, :3].T / np.linalg.norm(affine[:3, :3], axis=0)[:, None]
    assert z @ BASE_TO_APEX > 0.999 and np.cross(x, y) @ z == pytest.approx(-1)
    places = [np.argwhere(case.masks[0] == label).mean(axis=0)[::-1] for label in (LV, RV)]
    lv, rv = (affine @ [*place, 1] for place in places)
    assert rv[0] < lv[0] and rv[1] < lv[1], "to the right and in front"
    corners = [affine @ [*(np.array(case.frames.shape[:0:-1]) - 1) * end, 1] for end in (0, 1)]
    np.testing.assert_allclose(np.add(*corners)[:3], 0, atol=1e-4)


@pytest.mark.parametrize("layout", ["dicom", "plain", "nnunet"])
def test_an_export_comes_back_through_prepare_with_its_labels(cases, tmp_path, layout):
    if layout == "dicom":
        for case in cases:
            export_case(tmp_path / layout, case)
    elif layout == "nnunet":
        export_nnunet(tmp_path / layout, cases, "no terms")
    else:
        export_nifti(tmp_path / layout, cases)
    labels = parse_labels(LABELS) if layout == "plain" else None
    summary = prepare(tmp_path / layout, tmp_path / "out", layout, labels=labels, key=KEY)
    assert (summary.num_cases, summary.refused, summary.left_out) == (len(cases), {}, {})
    prepared = {case.info.group: case for case in load_cases(tmp_path / "out")}
    for case in cases:
        back = prepared[pseudonym(KEY, case.info.pseudonym)]
        assert back.info.ef == pytest.approx(case.info.ef, abs=1e-5)
        # The style is no scanner's name: only a table tells it.
        assert back.info.vendor == ("unknown" if layout == "dicom" else case.info.vendor)
        voxels = np.count_nonzero(back.masks == LV, axis=(1, 2, 3))
        assert 1 - voxels[1] / voxels[0] == pytest.approx(case.info.ef, abs=0.01)
        areas_mm2 = [
            np.count_nonzero(one.masks == LV, axis=(2, 3)) * np.prod(one.spacing_mm[1:]) for one in (case, back)
        ]
        np.testing.assert_allclose(areas_mm2[1], areas_mm2[0], rtol=0.03, atol=5)
        assert back.spacing_mm[0] == pytest.approx(case.spacing_mm[0], abs=1e-3)
        # `prepare` turns a heart whose right ventricle is not at the upper left by quarters; it mirrors none.
        assert max(overlap(np.rot90(resampled(case), k, axes=(2, 3)), back.masks) for k in range(4)) > 0.95


def test_an_export_is_recorded_as_simulated_by_what_its_files_say(cases, tmp_path, capsys):
    for case in cases[:2]:
        export_case(tmp_path / "export", case)
    arguments = [
        "prepare",
        str(tmp_path / "export"),
        str(tmp_path / "out"),
        "--format",
        "dicom",
        "--num-processes",
        "1",
    ]
    assert main(arguments) == 0
    assert of_folder(tmp_path / "out") == SIMULATED_SCANS and "recorded as simulated" in capsys.readouterr().out
    assert main(arguments) == 0 and of_folder(tmp_path / "out") == SIMULATED_SCANS
    assert main([*arguments, "--simulated"]) == 0 and of_folder(tmp_path / "out") == SIMULATED_SCANS


def test_one_file_that_does_not_say_so_makes_the_folder_private(cases, tmp_path):
    paths = [path for case in cases[:2] for path in export_case(tmp_path / "export", case)]
    dataset = pydicom.dcmread(paths[3])
    del dataset[SYNTHETIC_DATA]
    dataset.save_as(paths[3])
    summary = prepare(tmp_path / "export", tmp_path / "out", "dicom", key=KEY)
    assert summary.num_cases == 2 and summary.provenance == of_folder(tmp_path / "out") == PRIVATE_REAL


def test_one_scan_next_to_an_export_makes_the_folder_private_for_good(cases, tmp_path):
    export_case(tmp_path / "export", cases[0])
    assert prepare(tmp_path / "export", tmp_path / "out", "dicom", key=KEY).provenance == SIMULATED_SCANS
    write_study(tmp_path / "scans")
    assert prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY).provenance == PRIVATE_REAL
    assert prepare(tmp_path / "export", tmp_path / "out", "dicom", key=KEY).provenance == PRIVATE_REAL
    assert of_folder(tmp_path / "out") == PRIVATE_REAL


def test_until_all_is_read_the_folder_is_private(cases, tmp_path, monkeypatch):
    """A crash in between leaves real scans in no folder that is recorded as simulated."""
    export_case(tmp_path / "export", cases[0])
    prepare(tmp_path / "export", tmp_path / "out", "dicom", key=KEY)
    seen = []
    watched = replace(LAYOUTS["dicom"], find=lambda *arguments: seen.append(of_folder(tmp_path / "out")) or 1)
    monkeypatch.setitem(LAYOUTS, "dicom", watched)
    with pytest.raises(AttributeError):
        prepare(tmp_path / "export", tmp_path / "out", "dicom", key=KEY)
    assert seen == [PRIVATE_REAL]


def test_what_somebody_states_goes_before_what_files_say(cases, tmp_path):
    export_case(tmp_path / "export", cases[0])
    for name, first in (("never asked", PRIVATE_REAL), ("asked before", None)):
        out = tmp_path / name
        prepare(tmp_path / "export", out, "dicom", key=KEY, provenance=first)
        assert prepare(tmp_path / "export", out, "dicom", key=KEY, provenance=PRIVATE_REAL).provenance == PRIVATE_REAL
        assert prepare(tmp_path / "export", out, "dicom", key=KEY).provenance == of_folder(out) == PRIVATE_REAL
    public_set = prepare(tmp_path / "export", tmp_path / "p", "dicom", key=KEY, provenance=public("Sunnybrook"))
    assert public_set.provenance == of_folder(tmp_path / "p") == public("Sunnybrook")


def test_another_makers_synthetic_data_may_be_a_part_of_a_patients_image(tmp_path):
    """YES is true of an image of which "some or all" was made (PS3.3 C.12.1)."""
    write_study(tmp_path / "scans", SyntheticData="YES", Manufacturer="Philips")
    write_study(tmp_path / "more", SyntheticData="NO", Manufacturer="fedcmr", study="1.2.9")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY)
    assert (summary.provenance, summary.warnings) == (PRIVATE_REAL, {"synthetic-data": 1})
    assert "--simulated" in REASONS["synthetic-data"]
    assert prepare(tmp_path / "more", tmp_path / "other", "dicom", key=KEY).provenance == PRIVATE_REAL


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the labelled pixels that agree."""
    labelled = (one > 0) | (other > 0)
    return float((one == other)[labelled].mean())


def resampled(case: Case) -> np.ndarray:
    """Masks on a prepared case's pixels around the labels' centroid, nearest neighbour: neither turned nor mirrored."""
    rows, columns = (
        np.average(np.arange(64), weights=case.masks.astype(bool).sum(axis=axes)) for axes in ((0, 1, 3), (0, 1, 2))
    )
    places = (np.arange(CASE_SIZE) - (CASE_SIZE - 1) / 2) * CASE_PIXEL_MM / case.spacing_mm[1]
    rows, columns = (np.rint(centre + places).astype(int) for centre in (rows, columns))
    inside = np.ix_((rows >= 0) & (rows < 64), (columns >= 0) & (columns < 64))
    masks = np.zeros((*case.masks.shape[:2], CASE_SIZE, CASE_SIZE), np.uint8)
    grid = np.ix_(rows.clip(0, 63), columns.clip(0, 63))
    for plane in np.ndindex(masks.shape[:2]):
        masks[plane][inside] = case.masks[plane][grid][inside]
    return masks


# A third party's judgement: dciodvfy (one file) and dcentvfy (a patient, study and series) of dicom3tools


def complaints(*command: object) -> list[str]:
    """Errors and warnings of a validator."""
    report = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert report.returncode in (0, 1), report.stderr
    lines = (report.stdout + report.stderr).splitlines()
    return [line for line in lines if line.startswith(("Error", "Warning"))]


def findings_of(path: Path) -> list[str]:
    """dciodvfy's complaints of a file, less those that say only that it is older than SyntheticData (0008,001C)."""
    found = complaints("dciodvfy", "-new", path)
    unknown = any("(0008,001c)" in line and "Unrecognized tag" in line for line in found)
    return [line for line in found if not (unknown and "(0008,001c)" in line)]


@pytest.mark.tool("dciodvfy")
def test_dciodvfy_finds_no_error(cases, tmp_path):
    export_case(tmp_path, cases[0])
    for path in tmp_path.rglob("*.dcm"):
        # A study of no day belongs in no DICOMDIR; StudyDate is type 2 and may be empty.
        assert {line.split("> - ")[1] for line in findings_of(path)} <= {
            "Missing attribute or value that would be needed to build DICOMDIR"
        }


@pytest.mark.tool("dciodvfy")
def test_dciodvfy_has_nothing_else_against_the_mark(cases, tmp_path):
    """That the tag is unknown is all: without it, whatever the version, no error is left."""
    path = export_case(tmp_path, cases[0])[0]
    dataset = pydicom.dcmread(path)
    del dataset[SYNTHETIC_DATA]
    dataset.save_as(path)
    assert [line for line in complaints("dciodvfy", "-new", path) if line.startswith("Error")] == []


@pytest.mark.tool("dciodvfy")
@pytest.mark.parametrize(
    "keyword, value",
    [("FrameOfReferenceUID", None), ("ImageOrientationPatient", [1, 0, 0]), ("LossyImageCompression", "MAYBE")],
)
def test_dciodvfy_would_have_found_it(cases, tmp_path, keyword, value):
    path = export_case(tmp_path, cases[0])[0]
    dataset = pydicom.dcmread(path)
    if value is None:
        del dataset[keyword]
    else:
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    assert any(keyword in line for line in findings_of(path))


@pytest.mark.tool("dciodvfy")
def test_dcentvfy_finds_patients_studies_and_series_consistent(cases, tmp_path):
    paths = [path for case in cases[:2] for path in export_case(tmp_path, case)]
    assert complaints("dcentvfy", *tmp_path.rglob("*.dcm")) == []
    dataset = pydicom.dcmread(paths[0])
    dataset.SeriesNumber = 7
    dataset.save_as(paths[0])
    assert any("SeriesNumber" in line for line in complaints("dcentvfy", *paths))
