"""DICOM exports of whole studies: which become cases, what they look like, and why the others do not."""

import json
import logging
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian

from fedcmr.client.ingest.centring import find_centre, find_frames
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.normalise import normalise, orient
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.vendor import field_strength, vendor_name
from fedcmr.shared.case import CASE_PIXEL_MM, LV, NOT_DRAWN, RV, load_cases
from fedcmr.shared.file_names import PRIVATE_NAME
from tests.client.ingest.dicom_files import (
    CENTRE,
    COLUMN_AXIS,
    COLUMNS,
    NORMAL,
    NUM_PHASES,
    NUM_SLICES,
    PIXEL_MM,
    ROW_AXIS,
    ROWS,
    SLICE_MM,
    beating_heart,
    write_image,
    write_study,
)

KEY = bytes(range(32))


def refusal(source: Path) -> str:
    """The reason code of the only study."""
    found = find_dicom(source)
    if not found.studies:
        return next(iter(found.refused))
    with pytest.raises(Unusable) as error:
        normalise(found.studies[0].read())
    return error.value.code


def true_ef() -> float:
    labels = beating_heart()[1]
    volumes = [sum(int((plane == 3).sum()) for plane in phase) for phase in labels]
    return 1 - min(volumes) / max(volumes)


def test_a_study_becomes_one_case_with_the_ejection_fraction_of_its_masks(tmp_path):
    write_study(tmp_path / "scans" / "one")
    prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY)
    (case,) = load_cases(tmp_path / "out")
    assert case.info.ef == pytest.approx(true_ef(), abs=1e-5)
    assert (case.info.vendor, case.info.field_strength_t) == ("Philips", 1.5)
    assert case.spacing_mm == pytest.approx([SLICE_MM, CASE_PIXEL_MM, CASE_PIXEL_MM])
    cavity = (case.masks == LV).sum(axis=(2, 3))
    assert (np.diff(cavity[0]) < 0).all(), "slices run from base to apex"
    assert 1 - cavity[1].sum() / cavity[0].sum() == pytest.approx(true_ef(), abs=0.002)
    rv, lv = (np.argwhere(case.masks[0] == label).mean(axis=0)[1:] for label in (RV, LV))
    assert (rv < lv).all(), "the right ventricle is at the upper left"
    # Blood is bright where the masks say cavity.
    assert case.frames[case.masks == LV].mean() > 0.9 > 0.3 > case.frames[case.masks == 2].mean()


@pytest.mark.parametrize("view", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_every_flip_and_transpose_of_the_image_gives_the_same_case(tmp_path, view):
    for name, turned in (("plain", None), ("turned", view)):
        write_study(tmp_path / name, view=turned)
    plain, turned = (normalise(find_dicom(tmp_path / name).studies[0].read()) for name in ("plain", "turned"))
    assert np.abs(plain.frames - turned.frames).max() < 1e-3
    assert np.mean(plain.masks != turned.masks) < 1e-3


def test_the_image_is_seen_from_the_apex(tmp_path):
    # Columns to the left, rows down and back: written like that, only the slices have to be turned round.
    assert np.dot(np.cross(COLUMN_AXIS, ROW_AXIS), [-0.53, 0.62, 0.57]) > 0.9, "the normal points to the base"
    write_study(tmp_path)
    assert np.array_equal(orient(find_dicom(tmp_path).studies[0].read()).images, beating_heart()[0][:, ::-1])


@pytest.mark.parametrize("view", [(1, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_orientation_without_masks_comes_from_the_header(tmp_path, view):
    write_study(tmp_path / "plain", masks=False)
    write_study(tmp_path / "turned", masks=False, view=view)
    plain, turned = (normalise(find_dicom(tmp_path / name).studies[0].read()) for name in ("plain", "turned"))
    assert np.abs(plain.frames - turned.frames).mean() < 0.01


@pytest.mark.slow
def test_without_masks_heart_and_frames_are_found_by_what_moves(tmp_path):
    write_study(tmp_path / "scans", masks=False)
    cine = find_dicom(tmp_path / "scans").studies[0].read()
    assert find_frames(cine) == (0, NUM_PHASES // 2)
    row, column = find_centre(cine)
    assert np.hypot(row - CENTRE[0] + 7, column - CENTRE[1] + 7) * PIXEL_MM < 15
    prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY)
    (case,) = load_cases(tmp_path / "out")
    assert np.isnan(case.info.ef)
    assert not case.masks.any()


def test_a_stack_may_be_one_series_per_slice_next_to_a_long_axis_series(tmp_path):
    write_study(tmp_path, series_per_slice=True)
    for t in range(NUM_PHASES):
        write_image(
            tmp_path / "long" / f"{t}",
            np.zeros((64, 64)),
            SeriesInstanceUID="1.2.3.77",
            InstanceNumber=t,
            SOPInstanceUID=f"1.2.3.77.{t}",
            ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
        )
    write_image(tmp_path / "localiser", np.zeros((64, 64)), SeriesInstanceUID="1.2.3.78", SOPInstanceUID="1.2.3.78.0")
    found = find_dicom(tmp_path)
    assert found.left_out == {"other-orientation": 1, "not-cine": 1}
    assert found.studies[0].read().images.shape == (NUM_PHASES, NUM_SLICES, ROWS, COLUMNS)


def test_an_axial_cine_stack_is_not_taken_for_short_axis(tmp_path):
    write_study(
        tmp_path,
        masks=False,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=lambda z, t: [0, 0, 9.0 * z],
    )
    assert refusal(tmp_path) == "no-short-axis-cine"


@pytest.mark.parametrize(
    "elements",
    [{"InstanceNumber": None}, {"TriggerTime": "0"}, {"TriggerTime": None}],
    ids=["by trigger time", "constant trigger time", "no trigger time"],
)
def test_phases_are_ordered_by_what_the_header_knows(tmp_path, elements):
    write_study(tmp_path, **elements)
    images = find_dicom(tmp_path).studies[0].read().images
    assert np.array_equal(images, beating_heart()[0])


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("ambiguous-phase-order", {"TriggerTime": "0", "InstanceNumber": None}),
        ("uneven-phases", {"skip": [(2, 3)]}),
        ("uneven-spacing", {"skip": [(3, None)]}),
        ("no-short-axis-cine", {"skip": [(2, None), (3, None), (4, None)]}),
        ("slices-not-aligned", {"ImagePositionPatient": lambda z, t: list(z * 9.0 * NORMAL + (z == 2) * 9 * ROW_AXIS)}),
        ("masks-misaligned", {"ImagePositionPatient": lambda z, t: list(400 + z * 9.0 * NORMAL)}),
    ],
)
def test_what_cannot_be_a_case_is_refused_with_its_reason(tmp_path, reason, changes):
    write_study(tmp_path, **changes)
    assert refusal(tmp_path) == reason


def test_constant_images_are_refused(tmp_path):
    write_study(tmp_path, RescaleSlope="1e-12", masks=False)
    cine = find_dicom(tmp_path).studies[0].read()
    cine.images[:] = 5
    with pytest.raises(Unusable, match="constant-image"):
        normalise(cine)


def test_masks_are_placed_by_their_affine_whatever_the_order_of_their_voxels(tmp_path):
    write_study(tmp_path)
    expected = find_dicom(tmp_path).studies[0].read().masks
    nifti = nibabel.load(tmp_path / "masks.nii.gz")
    other = nifti.as_reoriented(np.array([[2, -1], [0, -1], [1, 1]]))
    assert other.shape[:3] != nifti.shape[:3]
    nibabel.save(nibabel.Nifti1Image(np.asarray(other.dataobj), other.affine), tmp_path / "masks.nii.gz")
    assert np.array_equal(find_dicom(tmp_path).studies[0].read().masks, expected)
    assert np.array_equal(expected, beating_heart()[1])


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("masks-differ", lambda labels: labels[..., 0]),
        ("masks-differ", lambda labels: labels[..., :-1]),
        ("masks-implausible", lambda labels: labels * 2),
        ("masks-implausible", lambda labels: np.where(labels == 3, 2, labels)),
    ],
    ids=["3D", "one phase short", "unknown label", "no left ventricle"],
)
def test_unusable_masks_refuse_the_study(tmp_path, reason, change):
    write_study(tmp_path)
    nifti = nibabel.load(tmp_path / "masks.nii.gz")
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(nifti.dataobj)), nifti.affine), tmp_path / "masks.nii.gz")
    assert refusal(tmp_path) == reason


def test_one_labelled_phase_is_one_end_of_the_beat_and_the_images_show_the_other(tmp_path):
    write_study(tmp_path)
    nifti = nibabel.load(tmp_path / "masks.nii.gz")
    labels = np.asarray(nifti.dataobj)
    for phase, expected in ((0, (0, NUM_PHASES // 2)), (NUM_PHASES // 2, (0, NUM_PHASES // 2))):
        one = labels * (np.arange(NUM_PHASES) == phase).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(one, nifti.affine), tmp_path / "masks.nii.gz")
        (study,) = find_dicom(tmp_path).studies
        found = normalise(study.read())
        assert (found.ed, found.es) == expected and np.isnan(found.ef)
        assert (found.masks[0 if phase else 1] == NOT_DRAWN).all() and not (
            found.masks[int(phase > 0)] == NOT_DRAWN
        ).any()


def test_one_mask_file_above_two_studies_belongs_to_neither(tmp_path):
    write_study(tmp_path / "a", study="1.2.3", masks=False)
    write_study(tmp_path / "b", study="1.2.4", masks=False)
    write_study(tmp_path / "c", study="1.2.5")
    (tmp_path / "c" / "masks.nii.gz").rename(tmp_path / "masks.nii.gz")
    found = find_dicom(tmp_path)
    assert (len(found.studies), found.refused) == (0, {"ambiguous-masks": 3})


def test_rescaling_and_photometric_interpretation_are_applied(tmp_path):
    write_study(tmp_path / "plain", masks=False)
    write_study(
        tmp_path / "other",
        masks=False,
        RescaleSlope="-2",
        RescaleIntercept="7",
        study="1.2.4",
        PhotometricInterpretation="MONOCHROME1",
    )
    plain, other = (study.read().images for study in find_dicom(tmp_path).studies)
    assert np.array_equal(other, 2 * plain - 7)


def test_other_files_are_counted_and_the_study_goes_on(tmp_path):
    write_study(tmp_path / "study")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "folder.dcm").mkdir()
    (tmp_path / "link.dcm").symlink_to(tmp_path / "study" / "037.dcm")
    pixels = np.zeros((8, 8))
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "study" / "037.dcm").read_bytes())
    write_image(tmp_path / "ct.dcm", pixels, SOPClassUID=CTImageStorage)
    write_image(tmp_path / "deflated.dcm", pixels, transfer_syntax=DeflatedExplicitVRLittleEndian)
    write_image(tmp_path / "nowhere.dcm", pixels, ImagePositionPatient=None)
    write_image(tmp_path / "flat.dcm", pixels, PixelSpacing=[0, 1])
    write_image(tmp_path / "nobody.dcm", pixels, StudyInstanceUID=None)
    whole = (tmp_path / "study" / "037.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:200])
    found = find_dicom(tmp_path)
    assert len(found.studies) == 1
    counts = dict(found.left_out)
    assert counts.pop("not-dicom") + counts.pop("not-mr-image") + counts.pop("damaged-header", 0) == 4
    assert counts == {"duplicate": 2, "deflated": 1, "no-geometry": 2, "no-uid": 1}


def test_a_cut_image_is_left_out_and_missed(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "037.dcm"
    path.write_bytes(path.read_bytes()[:-500])
    found = find_dicom(tmp_path)
    assert (found.left_out, found.refused) == ({"unreadable-pixels": 1}, {"uneven-phases": 1})


def test_pixels_that_vanish_after_the_headers_were_read_refuse_the_study(tmp_path):
    write_study(tmp_path)
    (study,) = find_dicom(tmp_path).studies
    (tmp_path / "037.dcm").unlink()
    with pytest.raises(Unusable, match="unreadable-pixels"):
        study.read()


def test_cases_of_one_patient_share_a_group_and_studies_without_an_id_are_refused_unless_somebody_knows(tmp_path):
    for name, patient, study in (
        ("a", "ID-1", "1.2.3"),
        ("b", "ID-1", "1.2.4"),
        ("c", "", "1.2.5"),
        ("d", " ", "1.2.6"),
    ):
        write_study(tmp_path / "scans" / name, patient=patient, study=study)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY)
    groups = [case.info.group for case in load_cases(tmp_path / "out")]
    assert (len(groups), len(set(groups)), summary.refused) == (2, 1, {"no-patient-id": 2})
    prepare(tmp_path / "scans", tmp_path / "apart", "dicom", key=KEY, one_study_one_patient=True)
    groups = [case.info.group for case in load_cases(tmp_path / "apart")]
    assert (len(groups), len(set(groups))) == (4, 3)


def test_no_identifier_leaves_in_any_byte_of_output_log_or_error(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    study = tmp_path / "scans" / "CANARY-folder"
    planted = {
        "PatientName": "CANARY^Name",
        "PatientBirthDate": "19770707",
        "InstitutionName": "CANARY hospital",
        "StudyDescription": "CANARY text",
        "InstanceNumber": "88888888",
    }
    write_study(study, patient="CANARY-id", **planted)
    for path in study.glob("*.dcm"):  # a value that pydicom quotes in a warning
        path.write_bytes(path.read_bytes().replace(b"88888888", b"CANARY99"))
    write_study(tmp_path / "scans" / "CANARY-bad", study="1.2.4", patient="CANARY-2", skip=[(1, 1)])
    (tmp_path / "scans" / "CANARY.dcm").write_bytes((study / "037.dcm").read_bytes()[:200])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom")
    out, err = capfd.readouterr()
    texts = [out, err, caplog.text, repr(summary), *(str(warning.message) for warning in caught)]
    texts += [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    own = [path for path in files if path.parent.name == PRIVATE_NAME]  # names the refused patient for the site
    raw = b"".join(path.read_bytes() for path in files if path not in own)
    for canary in ("CANARY", "19770707", "1.2.3"):
        assert not any(canary in text for text in texts)
        assert canary.encode() not in raw
    listed = b"".join(path.read_bytes() for path in own)
    assert b"CANARY-2" in listed and b"CANARY-id" not in listed
    assert not any(word in listed for word in (b"CANARY^Name", b"19770707", b"hospital", b"CANARY text"))
    assert json.loads((tmp_path / "out" / "refused.json").read_text())["studies"] == {"uneven-phases": 1}


@pytest.mark.parametrize(
    ("manufacturer", "vendor"),
    [
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers", "Siemens"),
        ("Philips Medical Systems", "Philips"),
        ("GE MEDICAL SYSTEMS", "GE"),
        ("CANON_MEC", "Canon"),
        ("TOSHIBA_MEC", "Canon"),
        ("UIH", "United Imaging"),
        ("", "unknown"),
        ("Gemini", "unknown"),
        ("Hitachi", "unknown"),
    ],
)
def test_manufacturers_get_one_spelling(manufacturer, vendor):
    assert vendor_name(manufacturer) == vendor


@pytest.mark.parametrize(("written", "tesla"), [(1.5, 1.5), (15000, 1.5), (3, 3), (0, np.nan), (99, np.nan)])
def test_field_strength_is_tesla_or_unknown(written, tesla):
    assert field_strength(written) == pytest.approx(tesla, nan_ok=True)
