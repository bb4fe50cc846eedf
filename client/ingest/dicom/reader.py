"""A folder of DICOM files -> studies with a short-axis cine, their pixels and masks.

Headers are read first, by an allow-list of elements and without pixels; pixels only of the images that were picked.
Every file is parsed in a child process; what is no usable MR image is counted by reason code.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.burned_in import is_annotated
from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.dicom.copies import without_copies
from fedcmr.client.ingest.dicom.elements import Elements, wanted
from fedcmr.client.ingest.dicom.enhanced import FRAME_ELEMENTS, frame_headers
from fedcmr.client.ingest.dicom.grouping import StudyKey, group_studies, place_of
from fedcmr.client.ingest.dicom.header import Header, shared_value
from fedcmr.client.ingest.dicom.parser import Parsed, parse
from fedcmr.client.ingest.dicom.pixels import FORMAT_ELEMENTS, MAX_ROWS, pixel_format, read_grid
from fedcmr.client.ingest.dicom.segmentation import (
    SEGMENTATION_CLASSES,
    Segmentation,
    choose,
    read_segmentation_header,
    read_segmentations,
)
from fedcmr.client.ingest.files import nifti_stem, plain_files
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import read_nifti, relabel
from fedcmr.client.ingest.patient import agreed_sex
from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.client.ingest.stack.short_axis import Stack, find_stack
from fedcmr.client.ingest.vendor import agreed_field_strength, agreed_vendor, says_vendor
from fedcmr.shared.case import BACKGROUND, LV, MYO, NOT_DRAWN, RV, is_heart
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.orientation import LPS_TO_RAS
from fedcmr.shared.progress import track
from fedcmr.shared.provenance import EXPORTER

LABELS = {BACKGROUND: BACKGROUND, RV: RV, MYO: MYO, LV: LV, NOT_DRAWN: NOT_DRAWN}
MIN_MASK_OVERLAP = 0.9
"""Share of the labelled volume that must lie within the images."""
MR_IMAGE, ENHANCED_MR, ENHANCED_COLOR_MR, LEGACY_ENHANCED_MR = (
    f"1.2.840.10008.5.1.4.1.1.4{suffix}" for suffix in ("", ".1", ".3", ".4")
)
DIRECTORY = "1.2.840.10008.1.3.10"
FILES_PER_BATCH = 64
MAX_AXES_ERROR = 0.01

HEADER_ELEMENTS = {
    **wanted(
        "SOPClassUID",
        "SOPInstanceUID",
        "SpecificCharacterSet",
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Manufacturer",
        "MagneticFieldStrength",
        "ImageType",
        "ScanningSequence",
        "EchoTime",
        "InversionTime",
        "TriggerTime",
        "SeriesNumber",
        "SeriesTime",
        "AcquisitionTime",
        "InstanceNumber",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "Rows",
        "Columns",
        "BurnedInAnnotation",
        "PatientSex",
        "CardiacNumberOfImages",
        "SyntheticData",
    ),
    **FORMAT_ELEMENTS,
    **FRAME_ELEMENTS,
}
"""The allow-list: nothing else of a file is ever kept."""
PERSON_ELEMENTS = wanted("PatientName", "PatientBirthDate", "IssuerOfPatientID")
"""Become digests where they are read."""
PLACE_ELEMENTS = wanted("AccessionNumber")
"""For the site's own list of what was refused, and nowhere else."""


def find_dicom(
    source: Path, workers: Workers | None = None, one_study_one_patient: bool = False, issuers_differ: bool = False
) -> Findings:
    """Studies below a folder, grouped by patient and study, each with its short-axis stack picked.

    Args:
        source: The folder.
        workers: Children to read the headers in; by default one, for this call.
        one_study_one_patient: As in `group_studies`.
        issuers_differ: Likewise.
    """
    if workers is None:
        with Workers() as one:
            return find_dicom(source, one, one_study_one_patient, issuers_differ)
    left_out = Tally()
    files = list(plain_files(source, left_out))
    mask_files = [Path(path) for path in files if _is_mask_file(path)]
    files = [path for path in files if not _is_mask_file(path)]
    packed = {path.parent for path in mask_files if path.name.lower().endswith(".gz")}
    # Of masks that somebody unpacked next to themselves the compressed file counts.
    unpacked = [path for path in mask_files if path.parent in packed and not path.name.lower().endswith(".gz")]
    for path in unpacked:
        left_out.add("duplicate", path)
    mask_files = [path for path in mask_files if path not in unpacked]
    images: list[Header] = []
    segmentations: dict[str, list[Segmentation]] = defaultdict(list)
    found_in = track(workers.map(read_file, files, batch_size=FILES_PER_BATCH), "reading headers", total=len(files))
    for file, found in zip(files, found_in, strict=True):
        if isinstance(found, Unusable):
            left_out.add(found.code, file)
        elif isinstance(found, Segmentation):
            segmentations[found.StudyInstanceUID].append(found)
        else:
            images += found
    distinct = without_copies(images, workers)
    for copy in distinct.copies:
        left_out.add("duplicate", copy)
    grouped = group_studies(distinct.images, one_study_one_patient, issuers_differ, distinct.conflicting)
    masks = _masks_by_study(mask_files, grouped.studies)
    studies, refused = [], grouped.refused
    for (patient, study), members in sorted(grouped.studies.items()):
        place = place_of(members)
        try:
            stack, other_series = find_stack(members)
            if is_annotated(image for position in stack.images for image in position):
                raise Unusable("burned-in-annotation")
            chosen, others = choose(segmentations.pop(study, []), stack)
            if len(masks[patient, study]) + bool(chosen) > 1:
                raise Unusable("ambiguous-masks")
        except Unusable as unusable:
            refused.add(unusable.code, place)
            continue
        left_out.add_all(other_series, place)
        for other in others:
            left_out.add("other-segmentation", replace(place, path=str(other)))
        mask_file = next(iter(masks[patient, study]), None)
        key, warnings = (patient, study), grouped.warnings[patient, study]
        read = partial(read_stack, stack, mask_file, chosen)
        # YES may also mark a patient's image with a synthetic part (PS3.3 C.12.1); this project makes all of it.
        says_so = all(image.SyntheticData == ("YES",) for image in members)
        is_ours = all(image.Manufacturer == EXPORTER for image in members)
        if says_so and not is_ours:
            warnings += ("synthetic-data",)
        identity, ours = grouped.identities[key], says_so and is_ours
        studies.append(Study(patient, study, read, grouped.spellings[key], warnings, ours, identity, place))
    for unused in segmentations.values():
        for segmentation in unused:
            left_out.add("other-segmentation", Place(str(segmentation.path), study=segmentation.StudyInstanceUID))
    return Findings(studies, refused, left_out)


def _is_mask_file(path: str) -> bool:
    """Whether a file holds a study's masks: `masks.nii.gz`, perhaps unpacked or in capitals."""
    stem = nifti_stem(Path(path).name)
    return stem is not None and stem.lower() == nifti_stem(MASKS_NAME)


def read_file(path: Path | str) -> list[Header] | Segmentation:
    """The images of one file, a header each; or, if it is one, the header of a segmentation.

    Raises:
        Unusable: The file is something else, is damaged, or says too little.
    """
    parsed = parse(path, {**HEADER_ELEMENTS, **PERSON_ELEMENTS, **PLACE_ELEMENTS})
    elements = parsed.elements
    sop_class = elements.text("SOPClassUID") or parsed.media_class
    if sop_class in SEGMENTATION_CLASSES:
        try:
            return read_segmentation_header(Path(path))
        except OSError:
            raise Unusable("unreadable") from None
    if sop_class == DIRECTORY:
        raise Unusable("dicomdir")
    if sop_class == ENHANCED_COLOR_MR:
        raise Unusable("not-grayscale")
    if sop_class not in (MR_IMAGE, ENHANCED_MR, LEGACY_ENHANCED_MR):
        raise Unusable("not-mr-image")
    file = _file_header(Path(path), parsed)
    assert file.pixel_format is not None
    if sop_class != MR_IMAGE:
        headers = frame_headers(elements, file)
    elif file.pixel_format.NumberOfFrames == 1:
        headers = [_image_header(elements, file)]
    else:
        raise Unusable("unplaced-frames")  # the classic object has one frame, and one position (PS3.3 A.4)
    for header in headers:
        _check_geometry(header)
    return headers


def _file_header(path: Path, parsed: Parsed) -> Header:
    """What holds for all images of a file."""
    elements = parsed.elements
    study, series, instance = (elements.text(f"{level}InstanceUID") for level in ("Study", "Series", "SOP"))
    if not (study and series and instance):
        raise Unusable("no-uid")
    rows, columns = (elements.number(keyword) for keyword in ("Rows", "Columns"))
    if not (rows >= 1 and columns >= 1):
        raise Unusable("no-geometry")
    if max(rows, columns) > MAX_ROWS:
        raise Unusable("too-large")
    return Header(
        path=path,
        PatientID=shared_value(elements.text("PatientID")),
        StudyInstanceUID=shared_value(study),
        SeriesInstanceUID=shared_value(series),
        SOPInstanceUID=shared_value(instance),
        Manufacturer=shared_value(elements.text("Manufacturer")),
        MagneticFieldStrength=elements.number("MagneticFieldStrength"),
        ImagePositionPatient=(),
        ImageOrientationPatient=(),
        PixelSpacing=(),
        Rows=int(rows),
        Columns=int(columns),
        TriggerTime=elements.number("TriggerTime"),
        InstanceNumber=elements.number("InstanceNumber"),
        ImageType=shared_value(elements.codes("ImageType")),
        ScanningSequence=shared_value(elements.codes("ScanningSequence")),
        EchoTime=elements.number("EchoTime"),
        InversionTime=elements.number("InversionTime"),
        SeriesNumber=elements.number("SeriesNumber"),
        BurnedInAnnotation=shared_value(elements.text("BurnedInAnnotation").upper()),
        PatientSex=shared_value(elements.text("PatientSex")),
        person=shared_value((_digest(elements.text("PatientName")), _digest(elements.text("PatientBirthDate")))),
        issuer=shared_value(_issuer(elements)),
        SyntheticData=shared_value(elements.codes("SyntheticData")),
        CardiacNumberOfImages=elements.number("CardiacNumberOfImages"),
        pixel_format=shared_value(pixel_format(parsed, int(rows), int(columns))),
        pixel_offset=parsed.pixel_offset,
        AcquisitionTime=_first_number(elements, "AcquisitionTime", "SeriesTime"),
        AccessionNumber=shared_value(elements.text("AccessionNumber")),
    )


def _first_number(elements: Elements, *keywords: str) -> float:
    """The first of several elements that is a number; NaN where none is."""
    numbers = (elements.number(keyword) for keyword in keywords)
    return next((number for number in numbers if not math.isnan(number)), math.nan)


def _issuer(elements: Elements) -> str:
    """Digest of who issued the PatientID: IssuerOfPatientID (0010,0021), or the fourth part of a number in HL7's form.

    In `HOSP&1.2.3&ISO` the name counts, as in IssuerOfPatientID (HL7 v2, CX and HD).
    """
    parts = elements.text("PatientID").split("^")
    text = elements.text("IssuerOfPatientID") or (parts[3] if len(parts) > 3 else "")
    return _digest(text.split("&")[0])


def _digest(text: str) -> str:
    """Equal for equal words, whatever stands between them; empty for none, and for a placeholder."""
    if is_placeholder(text):
        return ""
    words = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _image_header(elements: Elements, file: Header) -> Header:
    """The header of a classic image."""
    position = elements.numbers("ImagePositionPatient", 3)
    orientation = elements.numbers("ImageOrientationPatient", 6)
    spacing = elements.numbers("PixelSpacing", 2)
    if position is None or orientation is None or spacing is None:
        raise Unusable("no-geometry")
    return replace(
        file,
        ImagePositionPatient=position,
        ImageOrientationPatient=shared_value(orientation),
        PixelSpacing=shared_value(spacing),
    )


def _check_geometry(image: Header) -> None:
    """Refuse axes that are not perpendicular unit vectors (PS3.3 C.7.6.2.1.1) and pixels without a size."""
    x, y, z, u, v, w = image.ImageOrientationPatient
    products = (x * x + y * y + z * z - 1, u * u + v * v + w * w - 1, x * u + y * v + z * w)
    if max(map(abs, products)) > MAX_AXES_ERROR or min(image.PixelSpacing) <= 0:
        raise Unusable("no-geometry")


def read_stack(stack: Stack, mask_file: Path | None, segmentations: Sequence[Path] = ()) -> Cine:
    """The pixels of a stack, and its masks where there are some.

    Raises:
        Unusable: Pixels cannot be decoded, or the masks do not fit.
    """
    pixels = read_grid(stack.images)
    images = [image for position in stack.images for image in position]
    masks = read_segmentations(segmentations, stack) if segmentations else None
    if mask_file is not None:
        masks = read_masks(mask_file, stack.affine, pixels.shape)
    steps = stack.affine[:3, [2, 1, 0]].T  # along slices, rows, columns
    z_mm, y_mm, x_mm = np.linalg.norm(steps, axis=1)
    return Cine(
        images=pixels,
        masks=masks,
        spacing_mm=(float(z_mm), float(y_mm), float(x_mm)),
        axes=steps / np.linalg.norm(steps, axis=1, keepdims=True),
        vendor=agreed_vendor(image.Manufacturer for image in images),
        field_strength_t=agreed_field_strength(image.MagneticFieldStrength for image in images),
        sex=agreed_sex(image.PatientSex for image in images),
        says_vendor=says_vendor(image.Manufacturer for image in images),
    )


def read_masks(path: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A 4D NIfTI's labels on the images' grid: nearest voxel through both affines, never by array order.

    Args:
        path: Labels of `fedcmr.shared.case`, phases in temporal order.
        affine: Affine of the images, (column, row, slice, 1) to LPS millimetres.
        shape: Shape of the images, (T, Z, H, W).

    Raises:
        Unusable: It has other phases or labels, or its labels lie outside the images.
    """
    volume = read_nifti(path, labels=True)
    labels, mask_affine = volume.array, volume.affine
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
    volume = np.count_nonzero(is_heart(labels)) * abs(np.linalg.det(mask_affine[:3, :3]))
    if np.count_nonzero(is_heart(masks)) * abs(np.linalg.det(affine[:3, :3])) < MIN_MASK_OVERLAP * volume:
        raise Unusable("masks-misaligned")
    return masks.astype(np.uint8)


def _masks_by_study(files: Sequence[Path], studies: Mapping[StudyKey, Sequence[Header]]) -> dict[StudyKey, list[Path]]:
    """Mask files by the study whose scans lie in the mask's folder or below it."""
    folders = {key: {image.path.parent for image in images} for key, images in studies.items()}
    above = {key: {one for folder in own for one in (folder, *folder.parents)} for key, own in folders.items()}
    masks: dict[StudyKey, list[Path]] = {key: [] for key in studies}
    for file in files:
        owners = [key for key in studies if file.parent in above[key]]
        for owner in owners:
            # A file that covers several studies belongs to none: named once per owner, it is ambiguous for each.
            masks[owner] += [file] * len(owners)
    return masks


DICOM = Layout(
    lambda source, options, workers: find_dicom(source, workers, options.one_study_one_patient, options.issuers_differ),
    expects="""\
any folders of any files, as exported; masks as DICOM segmentations among them, or as masks.nii.gz (x, y, z,
phase; 1 RV, 2 myocardium, 3 LV cavity, 255 where nobody drew) in a study's own folder""",
    takes=("one_study_one_patient", "issuers_differ"),
)
