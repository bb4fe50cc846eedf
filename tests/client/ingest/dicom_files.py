"""DICOM files to read in tests: one disc in a ring next to a second disc, beating, in every form that exports take."""

from pathlib import Path

import gdcm
import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage

NUM_PHASES, NUM_SLICES, ROWS, COLUMNS, PIXEL_MM, SLICE_MM = 8, 5, 88, 96, 2.0, 9.0
COLUMN_AXIS = np.array([0.8, 0.0, 0.6])
ROW_AXIS = np.array([0.36, 0.8, -0.48])
NORMAL = np.cross(COLUMN_AXIS, ROW_AXIS)  # from apex to base
CENTRE = (48, 50)


def beating_heart() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, shape (T, Z, H, W), slices from apex to base."""
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    masks = np.zeros((NUM_PHASES, NUM_SLICES, ROWS, COLUMNS), np.uint8)
    for t in range(NUM_PHASES):
        contraction = 0.5 - 0.5 * np.cos(2 * np.pi * t / NUM_PHASES)
        for z in range(NUM_SLICES):
            cavity = (7 + z) * (1 - 0.4 * contraction)
            from_lv = np.hypot(rows - CENTRE[0], columns - CENTRE[1])
            from_rv = np.hypot(rows - CENTRE[0] + 14, columns - CENTRE[1] + 14)
            masks[t, z, from_rv < (8 + z) * (1 - 0.25 * contraction)] = 1
            masks[t, z, from_lv < cavity + 4] = 2
            masks[t, z, from_lv < cavity] = 3
    noise = np.random.default_rng(0).normal(0, 4, masks.shape)
    return (np.array([60, 300, 110, 320])[masks] + noise).round().astype(np.int16), masks


def image_dataset(pixels: np.ndarray, **elements: object) -> Dataset:
    """A classic MR image; `elements` replace or, with None, remove what a good one has."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = elements.pop("transfer_syntax", ExplicitVRLittleEndian)
    values = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "PatientID": "ID-1",
        "PatientName": "Doe^Jane",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "Manufacturer": "Philips Healthcare",
        "MagneticFieldStrength": "1.5",
        "ImageOrientationPatient": [*COLUMN_AXIS, *ROW_AXIS],
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "PixelSpacing": [PIXEL_MM, PIXEL_MM],
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
    }
    for keyword, value in (values | elements).items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" not in elements:
        dataset.PixelData = pixels.astype("<i2").tobytes()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def write_image(path: Path, pixels: np.ndarray, **elements: object) -> None:
    """Write `image_dataset` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_dataset(pixels, **elements).save_as(path, enforce_file_format=True)


def write_study(
    folder: Path, *, patient="ID-1", study="1.2.3", masks=True, skip=(), series_per_slice=False, view=None, **elements
) -> None:
    """A study's export.

    Args:
        folder: Of the study.
        patient: PatientID.
        study: StudyInstanceUID.
        masks: Also write masks.nii.gz.
        skip: (slice, phase) pairs to leave out; None for all of a kind.
        series_per_slice: One series per slice instead of one for all.
        view: Transposes or flips pixels and axes together: (transposed, rows flipped, columns flipped).
        elements: Fixed values, or functions of (z, t).
    """
    images, labels = beating_heart()
    axes, origin = (
        {"row": ROW_AXIS, "column": COLUMN_AXIS},
        -PIXEL_MM * (CENTRE[0] * ROW_AXIS + CENTRE[1] * COLUMN_AXIS),
    )
    transposed, *flipped = view or (False, False, False)
    if transposed:
        images, axes = images.swapaxes(2, 3), {"row": COLUMN_AXIS, "column": ROW_AXIS}
    for axis, name, flip in ((2, "row", flipped[0]), (3, "column", flipped[1])):
        if flip:
            origin = origin + axes[name] * PIXEL_MM * (images.shape[axis] - 1)
            images, axes[name] = np.flip(images, axis), -axes[name]
    for z, t in np.ndindex(NUM_SLICES, NUM_PHASES):
        if any((z if a is None else a, t if b is None else b) == (z, t) for a, b in skip):
            continue
        number = z * NUM_PHASES + t + 1
        values = {
            "PatientID": patient,
            "StudyInstanceUID": study,
            "SOPInstanceUID": f"{study}.9.{number}",
            "SeriesInstanceUID": f"{study}.{z if series_per_slice else 0}",
            "InstanceNumber": number,
            "TriggerTime": f"{t * 90.5:.1f}",
            "ImagePositionPatient": list(origin + z * SLICE_MM * NORMAL),
            "ImageOrientationPatient": [*axes["column"], *axes["row"]],
        }
        values |= {key: value(z, t) if callable(value) else value for key, value in elements.items()}
        # Names say nothing about the order.
        write_image(folder / f"{(number * 37) % 101:03d}.dcm", images[t, z], **values)
    if masks:
        affine = np.eye(4)
        affine[:3] = np.column_stack(
            [
                COLUMN_AXIS * PIXEL_MM,
                ROW_AXIS * PIXEL_MM,
                NORMAL * SLICE_MM,
                -PIXEL_MM * (CENTRE[0] * ROW_AXIS + CENTRE[1] * COLUMN_AXIS),
            ]
        )
        nifti = nibabel.Nifti1Image(labels.transpose(3, 2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine)
        nibabel.save(nifti, folder / "masks.nii.gz")


def write_enhanced(path: Path, *, per_frame_only=False, order=None, change=None, legacy=False, **elements) -> None:
    """The study of `write_study` as one Enhanced MR file.

    Args:
        path: Of the file.
        per_frame_only: Repeat in every frame what frames could share.
        order: (slice, phase) of every frame; by default slice by slice.
        change: Called with the data set and its frames' groups before it is written.
        legacy: As a PACS converts classic images: their times in the unassigned attributes.
        elements: As for `write_image`.
    """
    images, _ = beating_heart()
    order = list(np.ndindex(NUM_SLICES, NUM_PHASES)) if order is None else order
    origin = -PIXEL_MM * (CENTRE[0] * ROW_AXIS + CENTRE[1] * COLUMN_AXIS)
    dataset = image_dataset(
        images[0, 0],
        **{
            "SOPClassUID": f"{MRImageStorage}.4" if legacy else EnhancedMRImageStorage,
            "NumberOfFrames": len(order),
            "SOPInstanceUID": "1.2.3.9",
            "SeriesInstanceUID": "1.2.3.0",
            "ImageOrientationPatient": None,
            "ImagePositionPatient": None,
            "PixelSpacing": None,
            **elements,
        },
    )
    orientation, measures, kind = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [*COLUMN_AXIS, *ROW_AXIS]
    measures.PixelSpacing = [PIXEL_MM, PIXEL_MM]
    kind.FrameType, kind.ComplexImageComponent = ["ORIGINAL", "PRIMARY", "CINE", "NONE"], "MAGNITUDE"
    shared = Dataset()
    frames = []
    for z, t in order:
        position, cardiac, content, frame = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [float(x) for x in origin + z * SLICE_MM * NORMAL]
        frame.PlanePositionSequence = Sequence([position])
        if legacy:
            cardiac.TriggerTime, cardiac.InstanceNumber = f"{t * 90.5:.1f}", str(z * NUM_PHASES + t + 1)
            frame.UnassignedPerFrameConvertedAttributesSequence = Sequence([cardiac])
        else:
            cardiac.NominalCardiacTriggerDelayTime = t * 90.5
            content.StackID, content.InStackPositionNumber, content.TemporalPositionIndex = "1", z + 1, t + 1
            frame.CardiacSynchronizationSequence = Sequence([cardiac])
        frame.FrameContentSequence = Sequence([content])
        frames.append(frame)
    for groups in frames if per_frame_only else [shared]:
        groups.PlaneOrientationSequence = Sequence([orientation])
        groups.PixelMeasuresSequence = Sequence([measures])
        groups.MRImageFrameTypeSequence = Sequence([kind])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = np.stack([images[t, z] for z, t in order]).astype("<i2").tobytes()
    if change is not None:
        change(dataset, frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def compress(source: Path, target: Path, syntax: str) -> None:
    """Write an image again in another transfer syntax; GDCM's name of it, such as "JPEGLosslessProcess14"."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(target))
    assert writer.Write()
