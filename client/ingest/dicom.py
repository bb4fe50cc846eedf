"""A folder of DICOM files -> studies with a short-axis cine, their pixels and masks.

Headers are read first, by an allow-list of elements and without pixels; pixels only of the images that were picked.
Well-formed classic MR images; what else comes is counted by reason code.
"""

import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, EnhancedMRImageStorage, MRImageStorage

from client.ingest.cine import Cine, Findings, Study
from client.ingest.header import Header
from client.ingest.nifti import read_nifti, relabel
from client.ingest.reasons import Unusable
from client.ingest.short_axis import Stack, find_stack
from client.ingest.vendor import UNKNOWN, field_strength, vendor_name
from shared.case import BACKGROUND, LV, MYO, RV
from shared.progress import track

MASKS_NAME = "masks.nii.gz"
LABELS = {BACKGROUND: BACKGROUND, RV: RV, MYO: MYO, LV: LV}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MIN_MASK_OVERLAP = 0.9
"""Share of the labelled volume that must lie within the images."""

StudyKey = tuple[str, str]
"""What the files call the patient and the study."""

HEADER_ELEMENTS = (
    "SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Manufacturer",
    "MagneticFieldStrength", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "TriggerTime", "InstanceNumber",
)  # fmt: skip
PIXEL_ELEMENTS = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "PixelData",
)  # fmt: skip
"""The allow-list: nothing else of a file is ever looked at."""


def find_dicom(source: Path) -> Findings:
    """Studies below a folder, grouped by patient and study, each with its short-axis stack picked."""
    left_out: Counter[str] = Counter()
    studies: dict[StudyKey, dict[str, Header]] = defaultdict(dict)
    mask_files = []
    for path in track(list(_files(source, left_out)), "reading headers"):
        if path.name == MASKS_NAME:
            mask_files.append(path)
            continue
        try:
            header = read_header(path)
        except Unusable as unusable:
            left_out[unusable.code] += 1
            continue
        # Without a PatientID a study is a patient of its own: nothing is merged on a guess.
        images = studies[header.PatientID or header.StudyInstanceUID, header.StudyInstanceUID]
        left_out["duplicate"] += header.SOPInstanceUID in images
        images.setdefault(header.SOPInstanceUID, header)
    masks = _masks_by_study(mask_files, studies)
    found, refused = [], Counter[str]()
    for (patient, study), images in sorted(studies.items()):
        try:
            stack, other_series = find_stack(list(images.values()))
            if len(masks[patient, study]) > 1:
                raise Unusable("ambiguous-masks")
        except Unusable as unusable:
            refused[unusable.code] += 1
            continue
        left_out += other_series
        mask_file = next(iter(masks[patient, study]), None)
        found.append(Study(patient, study, partial(read_stack, stack, mask_file)))
    return Findings(found, refused, +left_out)


def read_header(path: Path) -> Header:
    """The allowed elements of one classic MR image.

    Raises:
        Unusable: The file is something else, or says too little.
    """
    try:
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise Unusable("deflated")  # a small one may expand a thousandfold
        elements = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_ELEMENTS))
        return _header(path, elements)
    except Unusable:
        raise
    except InvalidDicomError:
        raise Unusable("not-dicom") from None
    except OSError:
        raise Unusable("unreadable") from None
    except Exception:
        # Whatever damaged bytes provoke in the parser; its own words may quote them.
        raise Unusable("damaged-header") from None


def _header(path: Path, elements: Dataset) -> Header:
    """Values checked and converted; pydicom parses many of them only here."""
    if elements.get("SOPClassUID") == EnhancedMRImageStorage:
        raise Unusable("enhanced-multiframe")
    if elements.get("SOPClassUID") != MRImageStorage:
        raise Unusable("not-mr-image")
    orientation = np.array(_numbers(elements, "ImageOrientationPatient", 6)).reshape(2, 3)
    pixel_spacing = _numbers(elements, "PixelSpacing", 2)
    rows, columns = (_numbers(elements, keyword, 1)[0] for keyword in ("Rows", "Columns"))
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > 0.01 or min(*pixel_spacing, rows, columns) <= 0:
        raise Unusable("no-geometry")
    study, series, instance = (_text(elements, f"{level}InstanceUID") for level in ("Study", "Series", "SOP"))
    if not (study and series and instance):
        raise Unusable("no-uid")
    return Header(
        path=path,
        PatientID=_text(elements, "PatientID"),
        StudyInstanceUID=study,
        SeriesInstanceUID=series,
        SOPInstanceUID=instance,
        Manufacturer=_text(elements, "Manufacturer"),
        MagneticFieldStrength=_number_or_nan(elements, "MagneticFieldStrength"),
        ImagePositionPatient=_numbers(elements, "ImagePositionPatient", 3),
        ImageOrientationPatient=tuple(orientation.flat),
        PixelSpacing=pixel_spacing,
        Rows=int(rows),
        Columns=int(columns),
        TriggerTime=_number_or_nan(elements, "TriggerTime"),
        InstanceNumber=_number_or_nan(elements, "InstanceNumber"),
    )


def read_stack(stack: Stack, mask_file: Path | None) -> Cine:
    """The pixels of a stack, and its masks where there are some.

    Raises:
        Unusable: Pixels cannot be decoded, or the masks do not fit.
    """
    images = np.stack([[read_pixels(image) for image in phases] for phases in zip(*stack.images, strict=True)])
    first = stack.images[0][0]
    vendors = {vendor_name(image.Manufacturer) for position in stack.images for image in position}
    steps = stack.affine[:3, [2, 1, 0]].T  # along slices, rows, columns
    z_mm, y_mm, x_mm = np.linalg.norm(steps, axis=1)
    return Cine(
        images=images,
        masks=None if mask_file is None else read_masks(mask_file, stack.affine, images.shape),
        spacing_mm=(float(z_mm), float(y_mm), float(x_mm)),
        axes=steps / np.linalg.norm(steps, axis=1, keepdims=True),
        vendor=vendors.pop() if len(vendors) == 1 else UNKNOWN,
        field_strength_t=field_strength(first.MagneticFieldStrength),
    )


def read_pixels(image: Header) -> NDArray[np.float32]:
    """One image, rescaled (PS3.3 C.7.6.1 and C.11.1.1.2), white is bright; shape (Rows, Columns)."""
    try:
        elements = pydicom.dcmread(image.path, specific_tags=list(PIXEL_ELEMENTS))
        pixels = elements.pixel_array.astype(np.float32)
        slope = float(elements.get("RescaleSlope", 1.0))
        intercept = float(elements.get("RescaleIntercept", 0.0))
    except (InvalidDicomError, OSError, EOFError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise Unusable("unreadable-pixels") from None
    pixels = pixels * slope + intercept
    if pixels.shape != (image.Rows, image.Columns) or slope == 0 or not np.isfinite(pixels).all():
        raise Unusable("unreadable-pixels")
    return -pixels if elements.get("PhotometricInterpretation") == "MONOCHROME1" else pixels


def read_masks(path: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A 4D NIfTI's labels on the images' grid: nearest voxel through both affines, never by array order.

    Args:
        path: Labels of `shared.case`, phases in temporal order.
        affine: Of the images, (column, row, slice, 1) to LPS.
        shape: Of the images, (T, Z, H, W).

    Raises:
        Unusable: It has other phases or labels, or its labels lie outside the images.
    """
    labels, mask_affine = read_nifti(path)
    if labels.ndim != 4 or labels.shape[3] != shape[0]:
        raise Unusable("masks-differ")
    labels = relabel(labels, LABELS)
    to_mask = np.linalg.inv(mask_affine) @ LPS_TO_RAS @ affine
    z, y, x = np.indices(shape[1:], dtype=np.float32)
    voxel = np.tensordot(to_mask[:3, :3], np.stack([x, y, z]), 1) + to_mask[:3, 3, None, None, None]
    index = np.rint(voxel).astype(np.intp)
    size = np.array(labels.shape[:3])[:, None, None, None]
    inside = ((index >= 0) & (index < size)).all(axis=0)
    i, j, k = np.where(inside, index, 0)
    masks = np.where(inside, labels[i, j, k].transpose(3, 0, 1, 2), BACKGROUND)
    volume = np.count_nonzero(labels) * abs(np.linalg.det(mask_affine[:3, :3]))
    if np.count_nonzero(masks) * abs(np.linalg.det(affine[:3, :3])) < MIN_MASK_OVERLAP * volume:
        raise Unusable("masks-misaligned")
    return masks.astype(np.uint8)


def _files(source: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Plain files below a folder in a fixed order; links are not followed."""
    for folder, folders, names in os.walk(source, onerror=lambda _: left_out.update(["unreadable"])):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
            else:
                left_out["no-regular-file"] += 1


def _masks_by_study(files: Sequence[Path], studies: dict[StudyKey, dict[str, Header]]) -> dict[StudyKey, list[Path]]:
    """Mask files by the study whose scans lie in the mask's folder or below it."""
    above = {
        key: {folder for image in images.values() for folder in image.path.parents} for key, images in studies.items()
    }
    masks: dict[StudyKey, list[Path]] = {key: [] for key in studies}
    for file in files:
        owners = [key for key in studies if file.parent in above[key]]
        for owner in owners:
            # A file that covers several studies belongs to none: named once per owner, it is ambiguous for each.
            masks[owner] += [file] * len(owners)
    return masks


def _text(elements: Dataset, keyword: str) -> str:
    """An element as text, empty where it is missing."""
    return str(elements.get(keyword) or "").strip()


def _numbers(elements: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """An element as `count` finite numbers.

    Raises:
        Unusable: It is missing or is something else.
    """
    try:
        numbers = tuple(float(value) for value in np.atleast_1d(elements.get(keyword)))
    except (TypeError, ValueError, OverflowError):
        raise Unusable("no-geometry") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise Unusable("no-geometry")
    return numbers


def _number_or_nan(elements: Dataset, keyword: str) -> float:
    """An element as one number, NaN where it is none."""
    try:
        return _numbers(elements, keyword, 1)[0]
    except Unusable:
        return math.nan
