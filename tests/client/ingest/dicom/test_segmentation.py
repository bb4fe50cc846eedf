"""DICOM segmentations: written by highdicom, read here, compared with the same masks as NIfTI."""

import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, RLELossless

from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.dicom.segmentation import read_segmentations
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import LV, MYO, RV, load_cases

KEY = bytes(range(32))
NUM_PHASES, NUM_SLICES, ROWS, COLUMNS, PIXEL_MM, SLICE_MM = 6, 4, 72, 80, 2.0, 9.0
COLUMN_AXIS, ROW_AXIS = np.array([0.8, 0.0, 0.6]), np.array([0.36, 0.8, -0.48])
NORMAL = np.cross(COLUMN_AXIS, ROW_AXIS)  # from apex to base
CONTRACTION = (0.0, 0.2, 0.35, 0.3, 0.2, 0.1)
ED, ES = 0, 2
LEFT, RIGHT, WALL = codes.SCT.LeftVentricle, codes.SCT.RightVentricle, codes.SCT.LeftVentricleMyocardium


def beat() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, shape (T, Z, H, W)."""
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    masks = np.zeros((NUM_PHASES, NUM_SLICES, ROWS, COLUMNS), np.uint8)
    for t, z in np.ndindex(NUM_PHASES, NUM_SLICES):
        cavity = (7 + z) * (1 - CONTRACTION[t])
        masks[t, z, np.hypot(rows - 26, columns - 28) < (8 + z) * (1 - CONTRACTION[t] / 2)] = RV
        masks[t, z, np.hypot(rows - 38, columns - 42) < cavity + 4] = MYO
        masks[t, z, np.hypot(rows - 38, columns - 42) < cavity] = LV
    noise = np.random.default_rng(0).integers(0, 9, masks.shape)
    return (np.array([60, 300, 110, 320])[masks] + noise).astype(np.uint16), masks


def position(z: int) -> np.ndarray:
    return z * SLICE_MM * NORMAL - PIXEL_MM * (36 * ROW_AXIS + 40 * COLUMN_AXIS)


def make_image(z: int, t: int, pixels: np.ndarray, series: str = "1.2.3.0") -> Dataset:
    """A classic MR image, with all that highdicom copies from it."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": f"{series}.{z * NUM_PHASES + t + 1}",
        "PatientID": "CANARY-1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": series,
        "FrameOfReferenceUID": "1.2.3.7",
        "Modality": "MR",
        "PatientName": "CANARY^Jane",
        "PatientBirthDate": "",
        "PatientSex": "",
        "AccessionNumber": "",
        "StudyID": "",
        "StudyDate": "",
        "StudyTime": "",
        "ReferringPhysicianName": "",
        "Manufacturer": "SIEMENS",
        "ImagePositionPatient": [float(f"{x:.6f}") for x in position(z)],
        "PixelSpacing": [PIXEL_MM, PIXEL_MM],
        "ImageOrientationPatient": [*COLUMN_AXIS, *ROW_AXIS],
        "SliceThickness": 8,
        "Rows": ROWS,
        "Columns": COLUMNS,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "InstanceNumber": z * NUM_PHASES + t + 1,
        "TriggerTime": t * 120,
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.astype("<u2").tobytes()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


IMAGES, MASKS = beat()
STACK = [[make_image(z, t, IMAGES[t, z]) for z in range(NUM_SLICES)] for t in range(NUM_PHASES)]


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for phase in STACK:
        for image in phase:
            image.save_as(folder / f"{image.InstanceNumber:03d}.dcm", enforce_file_format=True)
    return folder


def write_nifti_masks(folder: Path, masks: np.ndarray) -> None:
    affine = np.eye(4)
    affine[:3] = np.column_stack([COLUMN_AXIS * PIXEL_MM, ROW_AXIS * PIXEL_MM, NORMAL * SLICE_MM, position(0)])
    nifti = nibabel.Nifti1Image(masks.transpose(3, 2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine)
    nibabel.save(nifti, folder / "masks.nii.gz")


SEGMENTS = (("Left ventricular cavity", LEFT, LV), ("x1", WALL, MYO), ("x2", RIGHT, RV))


def make_seg(t: int, planes=None, *, kind="BINARY", segments=SEGMENTS, images=None, number=0, **more):
    """A segmentation of one phase by highdicom.

    Args:
        t: The phase.
        planes: Shape (Z, H, W, segments); by default the phase's own masks.
        kind: SegmentationType.
        segments: Label, coded property type and label of `fedcmr.shared.case` of each.
        images: Source images; by default the phase's.
        number: Tells segmentations of one phase apart.
        more: For highdicom.
    """
    if planes is None:
        planes = np.stack([MASKS[t] == label for _, _, label in segments], axis=-1).astype(np.uint8)
    if kind == "LABELMAP":
        planes = (planes * np.arange(1, len(segments) + 1)).max(axis=-1).astype(np.uint8)
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=index,
            segment_label=label,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=code,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for index, (label, code, _) in enumerate(segments, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return highdicom.seg.Segmentation(
            # A copy: the segmentation shares its source's elements, and some tests change them.
            source_images=deepcopy(STACK[t] if images is None else images),
            pixel_array=planes,
            segmentation_type=kind,
            segment_descriptions=descriptions,
            series_instance_uid=f"1.2.3.5{number}",
            series_number=5,
            sop_instance_uid=f"1.2.3.5{number}.{t + 1}",
            instance_number=t + 1,
            manufacturer="CANARY",
            manufacturer_model_name="x",
            software_versions="1",
            device_serial_number="1",
            **more,
        )


def read_masks(folder: Path) -> np.ndarray | None:
    found = find_dicom(folder)
    assert len(found.studies) == 1
    return found.studies[0].read().masks


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentations_of_two_phases_give_the_case_of_the_same_masks_as_nifti(tmp_path, kind):
    labelled = MASKS.copy()
    labelled[[t for t in range(NUM_PHASES) if t not in (ED, ES)]] = 0
    write_nifti_masks(write_images(tmp_path / "nifti"), labelled)
    write_images(tmp_path / "seg")
    for t in (ED, ES):
        make_seg(t, kind=kind).save_as(tmp_path / "seg" / f"CANARY{t}.dcm")
    for name in ("nifti", "seg"):
        summary = prepare(tmp_path / name, tmp_path / "out" / name, "dicom", key=KEY)
        assert (summary.num_cases, summary.refused, summary.left_out) == (1, {}, {})
    (nifti,), (seg,) = (load_cases(tmp_path / "out" / name) for name in ("nifti", "seg"))
    assert str(seg.info) == str(nifti.info)
    volumes = [sum(label == LV for label in MASKS[t].ravel().tolist()) for t in (ED, ES)]
    assert seg.info.ef == pytest.approx(1 - volumes[1] / volumes[0], abs=1e-5)
    assert np.array_equal(seg.frames, nifti.frames)
    assert np.array_equal(seg.masks, nifti.masks)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"CANARY" not in written


@pytest.mark.slow
def test_an_ejection_fraction_is_found_by_the_patients_number_in_the_header(tmp_path):
    write_images(tmp_path / "scans")
    (tmp_path / "table.csv").write_text("PatientID,ef_percent\nCANARY-1,37.5\n")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom", ef_table=tmp_path / "table.csv", key=KEY)
    (case,) = load_cases(tmp_path / "out")
    assert (case.info.ef, case.masks.any(), summary.warnings) == (0.375, False, {})


def test_a_compressed_segmentation_is_read(tmp_path):
    write_images(tmp_path)
    make_seg(ED, kind="FRACTIONAL", transfer_syntax_uid=RLELossless).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_masks(tmp_path)[ED], MASKS[ED])


def test_of_fractions_a_half_and_more_counts(tmp_path):
    write_images(tmp_path)
    planes = np.where(MASKS[ED][..., None] == [LV, MYO, RV], 0.6, 0.4)
    planes[0, 0, 0] = 0.51  # all three at the same place: the wall lies over both
    seg = make_seg(ED, planes, kind="FRACTIONAL", max_fractional_value=200)
    seg.save_as(tmp_path / "seg.dcm")
    expected = MASKS[ED].copy()
    expected[0, 0, 0] = MYO
    assert np.array_equal(read_masks(tmp_path)[ED], expected)


def test_a_left_ventricle_drawn_to_its_outer_wall_leaves_the_cavity(tmp_path):
    write_images(tmp_path)
    planes = np.stack([np.isin(MASKS[ED], (LV, MYO)), MASKS[ED] == MYO], axis=-1).astype(np.uint8)
    make_seg(ED, planes, segments=(("a", LEFT, LV), ("b", WALL, MYO))).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_masks(tmp_path)[ED], np.where(MASKS[ED] == RV, 0, MASKS[ED]))


@pytest.mark.parametrize(
    ("label", "code", "structure"),
    [
        ("anything", codes.SCT.LeftVentricle, LV),
        ("anything", codes.SCT.LeftVentricleMyocardium, MYO),
        ("anything", codes.SCT.RightVentricle, RV),
        ("anything", ("74281007", "SCT", "Myocardium"), MYO),
        ("anything", ("T-32600", "SRT", "Left ventricle"), LV),
        ("anything", ("T-32500", "SRT", "Right"), RV),
        ("anything", ("T-32620", "SRT", "Myocardium"), MYO),
        ("LV_Myo", codes.SCT.LeftVentricle, MYO),
        ("  RV-blood pool ", codes.SCT.Heart, RV),
        ("heart_ventricle_left", codes.SCT.Heart, LV),
        ("Left Ventricular Myocardium", codes.SCT.Heart, MYO),
    ],
)
def test_a_segment_is_known_by_its_label_else_by_its_code(tmp_path, label, code, structure):
    write_images(tmp_path)
    code = highdicom.sr.CodedConcept(*code) if isinstance(code, tuple) and len(code) == 3 else code
    make_seg(ED, segments=((label, code, structure),)).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_masks(tmp_path)[ED], np.where(MASKS[ED] == structure, structure, 0))


def test_structures_and_slices_in_files_of_their_own_add_up(tmp_path):
    write_images(tmp_path)
    for number, segment in enumerate(SEGMENTS):
        make_seg(ED, segments=(segment,), number=number).save_as(tmp_path / f"seg{number}.dcm")
    for z in range(NUM_SLICES):
        planes = np.stack([MASKS[ES][z : z + 1] == label for _, _, label in SEGMENTS], axis=-1).astype(np.uint8)
        seg = make_seg(ES, planes, images=[STACK[ES][z]], number=4 + z)
        seg.save_as(tmp_path / f"slice{z}.dcm")
    masks = read_masks(tmp_path)
    assert np.array_equal(masks[[ED, ES]], MASKS[[ED, ES]])
    assert not np.delete(masks, [ED, ES], axis=0).any()


def _edit(seg: Dataset, change) -> Dataset:
    for group in [*seg.PerFrameFunctionalGroupsSequence, *seg.SharedFunctionalGroupsSequence]:
        change(group)
    return seg


def _drop(*keywords):
    def drop(group):
        for keyword in keywords:
            if keyword in group:
                delattr(group, keyword)

    return drop


def test_frames_that_name_no_image_are_placed_by_position_and_the_images_that_the_object_names(tmp_path):
    write_images(tmp_path)
    _edit(make_seg(ES), _drop("DerivationImageSequence")).save_as(tmp_path / "seg.dcm")
    masks = read_masks(tmp_path)
    assert np.array_equal(masks[ES], MASKS[ES])
    assert not np.delete(masks, ES, axis=0).any()


def test_frames_without_position_lie_on_the_image_that_they_name(tmp_path):
    write_images(tmp_path)
    geometry = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    _edit(make_seg(ES), _drop(*geometry)).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_masks(tmp_path)[ES], MASKS[ES])


def test_a_phase_may_be_told_by_the_temporal_position_alone(tmp_path):
    write_images(tmp_path)
    seg = _edit(make_seg(ES), _drop("DerivationImageSequence"))
    for image in (image for phase in STACK for image in phase):  # the object names every image of the cine
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence.append(item)
    seg.save_as(tmp_path / "seg.dcm")
    with pytest.raises(Unusable, match="segmentation-of-no-phase"):
        read_masks(tmp_path)
    for group in seg.PerFrameFunctionalGroupsSequence:
        group.FrameContentSequence[0].TemporalPositionIndex = ES + 1
    seg.save_as(tmp_path / "seg.dcm")
    masks = read_masks(tmp_path)
    assert np.array_equal(masks[ES], MASKS[ES])
    assert not np.delete(masks, ES, axis=0).any()


def test_a_segmentation_on_another_grid_is_placed_by_its_position(tmp_path):
    write_images(tmp_path)
    planes = np.stack([MASKS[ED] == label for _, _, label in SEGMENTS], axis=-1).astype(np.uint8)
    cropped = planes[:, 10:66, 12:74]
    # Seen from the other side: rows and columns swapped, as a viewer may store it.
    corner = 10 * PIXEL_MM * ROW_AXIS + 12 * PIXEL_MM * COLUMN_AXIS
    seg = make_seg(
        ED,
        cropped.swapaxes(1, 2),
        plane_positions=[highdicom.PlanePositionSequence("PATIENT", position(z) + corner) for z in range(NUM_SLICES)],
        plane_orientation=highdicom.PlaneOrientationSequence("PATIENT", [*ROW_AXIS, *COLUMN_AXIS]),
        pixel_measures=highdicom.PixelMeasuresSequence((PIXEL_MM, PIXEL_MM), 8.0, SLICE_MM),
    )
    seg.save_as(tmp_path / "seg.dcm")
    masks = read_masks(tmp_path)
    inside = np.zeros_like(MASKS[ED])
    inside[:, 10:66, 12:74] = MASKS[ED][:, 10:66, 12:74]
    assert np.array_equal(masks[ED], inside)


def test_frames_of_an_enhanced_image_are_named_by_their_numbers(tmp_path):
    write_images(tmp_path)
    classic = find_dicom(tmp_path).studies[0].read.args[0]
    frames = {(z, t): t * NUM_SLICES + z for z, t in np.ndindex(NUM_SLICES, NUM_PHASES)}
    names = {image.SOPInstanceUID: place for place, image in _places(classic)}
    images = [
        [replace(image, SOPInstanceUID="1.2.9", frame=frames[z, t]) for t, image in enumerate(position)]
        for z, position in enumerate(classic.images)
    ]
    seg = make_seg(ES)
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        if source.ReferencedSOPInstanceUID in names:  # segments of one plane share the item
            source.ReferencedFrameNumber = frames[names[source.ReferencedSOPInstanceUID]] + 1
            source.ReferencedSOPInstanceUID = "1.2.9"
    seg.save_as(tmp_path / "seg.dcm")
    masks = read_segmentations([tmp_path / "seg.dcm"], replace(classic, images=images))
    assert np.array_equal(masks[ES], MASKS[ES])
    assert not np.delete(masks, ES, axis=0).any()


def _places(stack):
    return [((z, t), image) for z, position in enumerate(stack.images) for t, image in enumerate(position)]


def test_segmentations_of_other_images_or_other_organs_are_left_out_and_the_study_goes_on(tmp_path):
    write_images(tmp_path)
    other = [make_image(z, 0, IMAGES[0, z], series="1.2.3.8") for z in range(NUM_SLICES)]  # say, late enhancement
    make_seg(ED, images=other).save_as(tmp_path / "a.dcm")
    make_seg(ED, segments=(("liver", codes.SCT.Liver, LV),), number=1).save_as(tmp_path / "b.dcm")
    elsewhere = make_seg(ED, number=2)
    elsewhere.StudyInstanceUID = "1.2.4"
    elsewhere.save_as(tmp_path / "c.dcm")
    found = find_dicom(tmp_path)
    assert found.left_out == {"other-segmentation": 3}
    assert found.studies[0].read().masks is None


def test_frames_of_other_images_are_passed_over(tmp_path):
    write_images(tmp_path)
    seg = make_seg(ED)
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        if source.ReferencedSOPInstanceUID == STACK[ED][1].SOPInstanceUID:
            source.ReferencedSOPInstanceUID = "1.2.3.8.1"
    seg.save_as(tmp_path / "seg.dcm")
    expected = MASKS[ED].copy()
    expected[1] = 0
    assert np.array_equal(read_masks(tmp_path)[ED], expected)


def _longer(seg):
    seg.NumberOfFrames += 1


def _cut(seg):
    seg.PixelData = seg.PixelData[:-200]


def _far(seg):
    for group in seg.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0]
        place.ImagePositionPatient = list(np.asarray(place.ImagePositionPatient, float) + 12 * NORMAL)


def _next_to(seg):
    for group in seg.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0]
        place.ImagePositionPatient = list(np.asarray(place.ImagePositionPatient, float) + 120 * ROW_AXIS)


def _tilted(seg):
    axes = np.concatenate([0.9 * COLUMN_AXIS + np.sqrt(1 - 0.9**2) * NORMAL, ROW_AXIS])  # 26 degrees
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = list(axes)


def _long(seg):
    seg.PixelData = seg.PixelData * 2


def _huge(seg):
    seg.Rows = seg.Columns = 65535


def _no_groups(seg):
    del seg.PerFrameFunctionalGroupsSequence


def _no_number(seg):
    for group in seg.PerFrameFunctionalGroupsSequence:
        del group.SegmentIdentificationSequence


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        *[("unreadable-segmentation", one) for one in (_longer, _cut, _long, _huge, _no_groups, _no_number)],
        *[("masks-misaligned", one) for one in (_far, _next_to, _tilted)],
    ],
)
def test_a_segmentation_that_does_not_fit_refuses_the_study_with_a_reason(tmp_path, reason, damage):
    write_images(tmp_path)
    seg = make_seg(ED)
    damage(seg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(tmp_path / "seg.dcm", seg)
    with pytest.raises(Unusable) as error:
        read_masks(tmp_path)
    assert error.value.code == reason


def test_two_readers_masks_of_one_phase_and_masks_in_two_formats_are_ambiguous(tmp_path):
    write_images(tmp_path / "two")
    make_seg(ED).save_as(tmp_path / "two" / "a.dcm")
    make_seg(ED, number=1).save_as(tmp_path / "two" / "same.dcm")
    assert np.array_equal(read_masks(tmp_path / "two")[ED], MASKS[ED])
    planes = np.stack([np.roll(MASKS[ED], 1, axis=1) == label for _, _, label in SEGMENTS], axis=-1).astype(np.uint8)
    make_seg(ED, planes, number=2).save_as(tmp_path / "two" / "b.dcm")
    with pytest.raises(Unusable, match="ambiguous-masks"):
        read_masks(tmp_path / "two")
    write_nifti_masks(write_images(tmp_path / "both"), MASKS)
    make_seg(ED).save_as(tmp_path / "both" / "a.dcm")
    assert find_dicom(tmp_path / "both").refused == {"ambiguous-masks": 1}
