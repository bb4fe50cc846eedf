"""The layout of the Sunnybrook Cardiac Data (MICCAI 2009 left ventricle challenge): DICOM series and contours as text.

    scd_patientdata.csv                                         PatientID, OriginalID, Gender, Age, Pathology
    SCD_IMAGES_01/SCD0000101/CINESAX_300/IM-0003-0048.dcm       one folder a patient, named by PatientID
    SCD_ManualContours/SC-HF-I-01/contours-manual/IRCCI-expert/IM-0001-0048-icontour-manual.txt
                                                                named by OriginalID, with or without the zero

The challenge's own folders, `SC-HF-I-1/DICOM/IM-0001-0048.dcm`, need no table. Radau et al., The MIDAS Journal 2009,
http://hdl.handle.net/10380/3070.

A contour file belongs to the image whose file name ends in the same number; the number before it is always 1. Each line
is a point, column and row in pixels. The middle of the first pixel is taken to be (1, 1), as in the challenge's MATLAB.
`icontour` is the endocardium at end-diastole and end-systole, `ocontour` the epicardium at end-diastole; papillary
muscles (`p1contour`, `p2contour`) count as cavity. Nobody drew the right ventricle: every case is drawn in part. The
base is left out at end-systole where it has moved away, and the ejection fraction is that of all contours, which is the
challenge's. The group in the name (HF-I, HF-NI, HYP, N) is the pathology.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedcmr.client.ingest.burned_in import is_annotated
from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.dicom.copies import without_copies
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.reader import FILES_PER_BATCH, read_file, read_stack
from fedcmr.client.ingest.dicom.segmentation import Segmentation
from fedcmr.client.ingest.files import plain_files
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.tables import read_rows
from fedcmr.client.ingest.patient import pathology_code, sex_code
from fedcmr.client.ingest.places import Place, Tally, common_folder
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.client.ingest.stack.short_axis import Stack, find_stack
from fedcmr.shared.case import LV, MYO
from fedcmr.shared.plain_files import read_plain
from fedcmr.shared.progress import track

TABLE_NAME = "scd_patientdata.csv"
COLUMNS = {"patient": ("patientid",), "original": ("originalid",), "sex": ("gender",)}
PATIENT = re.compile(r"SC-(HF-I|HF-NI|HYP|N)-0*([0-9]{1,9})", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"SCD\d+", re.IGNORECASE)
CONTOUR_FOLDER = "contours-manual"
CONTOUR = re.compile(r"IM-\d+-(\d+)-([io])contour-manual\.txt", re.IGNORECASE)
IMAGE_NUMBER = re.compile(r"(\d+)$")
MAX_CONTOUR_BYTES = 256 * 1024
SUBPIXELS = 8
"""Steps per pixel in which a contour is filled: a pixel is inside if half of its steps are."""

Contours = Mapping[tuple[int, str], Path]
"""Contour files by the image's number and "i" or "o"."""


def find_sunnybrook(source: Path, workers: Workers) -> Findings:
    """Patients whose images lie below a folder, with the contours that do.

    Raises:
        UserError: The table cannot be read, or a column is missing.
    """
    left_out, refused = Tally(), Tally()
    contours: dict[str, dict[tuple[int, str], Path]] = defaultdict(dict)
    images: dict[str, str] = {}
    tables = []
    for path in map(Path, plain_files(source, left_out)):
        folders = path.relative_to(source).parts[:-1]
        if CONTOUR_FOLDER in folders:
            patient = _patient_of(folders[: folders.index(CONTOUR_FOLDER)])
            if patient and (match := CONTOUR.fullmatch(path.name)):
                contours[patient][int(match[1]), match[2].lower()] = path
        elif path.name.lower() == TABLE_NAME:
            tables.append(path)
        elif patient := _patient_of(folders):
            images[str(path)] = patient
        else:
            left_out.add("not-mr-image", path)
    originals, sexes = _read_tables(tables)
    headers: list[Header] = []
    files = list(images)
    found_in = track(workers.map(read_file, files, batch_size=FILES_PER_BATCH), "reading headers", total=len(files))
    for file, found in zip(files, found_in, strict=True):
        if isinstance(found, Unusable):
            left_out.add(found.code, file)
        elif isinstance(found, Segmentation):
            left_out.add("other-segmentation", file)
        else:
            headers += found
    distinct = without_copies(headers, workers, lambda header: images[str(header.path)])
    for copy in distinct.copies:
        left_out.add("duplicate", copy)
    members: dict[str, list[Header]] = defaultdict(list)
    for header in distinct.images:
        members[images[str(header.path)]].append(header)
    studies = []
    for folder, own in sorted(members.items()):
        patient = originals.get(folder, folder)
        place = Place(common_folder(header.path for header in own), patient)
        if not PATIENT.fullmatch(patient):
            refused.add("not-in-table", place)
            continue
        try:
            if folder in distinct.conflicting:
                raise Unusable("conflicting-copies")
            stack, other_series = find_stack(own)
            if is_annotated(image for position in stack.images for image in position):
                raise Unusable("burned-in-annotation")
        except Unusable as unusable:
            refused.add(unusable.code, place)
            continue
        left_out.add_all(other_series, place)
        read = partial(read_sunnybrook, stack, contours.pop(patient, {}), patient, sexes.get(folder, ""))
        studies.append(Study(patient, patient, read, place=place))
    for patient, files_of in contours.items():
        for path in files_of.values():
            left_out.add("masks-without-frames", Place(str(path), patient))
    return Findings(studies, refused, left_out)


def read_sunnybrook(stack: Stack, contours: Contours, patient: str, sex: str = "") -> Cine:
    """The pixels of a patient's stack, and the labels within its contours.

    Args:
        stack: Its images.
        contours: Its contours; none for a case without masks.
        patient: Its name, which says the pathology.
        sex: As in `Cine`; where it is empty, the images say it.

    Raises:
        Unusable: Pixels or contours cannot be read, or the contours are of other images.
    """
    cine = read_stack(stack, None)
    match = PATIENT.fullmatch(patient)
    assert match is not None
    masks = _read_masks(stack, contours, cine.images.shape) if contours else None
    return replace(cine, masks=masks, pathology=pathology_code(match[1]), sex=sex or cine.sex)


def _read_masks(stack: Stack, contours: Contours, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Labels (T, Z, H, W); the muscle is what lies between two contours of one image."""
    places = _places(stack)
    masks = np.zeros(shape, np.uint8)
    matched = {number for number, _ in contours} & set(places)
    if not matched:
        raise Unusable("masks-differ")
    for number in matched:
        phase = masks[places[number]]
        files = {side: contours[number, side] for side in "io" if (number, side) in contours}
        inside = {side: read_contour(file, phase.shape) for side, file in files.items()}
        if len(inside) == 2:  # between an outer contour and no inner one, muscle and cavity cannot be told apart
            phase[inside["o"]] = MYO
        if "i" in inside:
            phase[inside["i"]] = LV
    return masks


def _places(stack: Stack) -> dict[int, tuple[int, int]]:
    """Phase and slice by the number at the end of the image's file name.

    Raises:
        Unusable: Two images have the same, or one has none.
    """
    numbers = {
        (t, z): IMAGE_NUMBER.search(image.path.stem)
        for z, position in enumerate(stack.images)
        for t, image in enumerate(position)
    }
    places = {int(match[1]): place for place, match in numbers.items() if match}
    if len(places) < len(numbers):
        raise Unusable("ambiguous-masks")
    return places


def read_contour(path: Path, shape: Sequence[int]) -> NDArray[np.bool_]:
    """The pixels inside a contour, shape (H, W): those of which half lies inside.

    Raises:
        Unusable: The file is no list of points, or they lie outside the image.
    """
    try:
        lines = read_plain(path, MAX_CONTOUR_BYTES).decode("ascii").split("\n")
        points = np.array([[float(word) for word in line.split()] for line in lines if line.strip()], np.float64)
    except (OSError, ValueError):
        raise Unusable("unreadable-contour") from None
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise Unusable("unreadable-contour")
    height, width = shape
    if points.min() < 0 or (points > (width + 1, height + 1)).any():
        raise Unusable("masks-misaligned")
    # A pixel reaches half a side around its middle; a step's own middle is half a step from its corner.
    steps = (points - 0.5) * SUBPIXELS - 0.5
    canvas = Image.new("L", (width * SUBPIXELS, height * SUBPIXELS))
    # Steps on the line itself count half: otherwise the line's width would enlarge what it surrounds.
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in steps.tolist()], fill=2, outline=1)
    filled = np.asarray(canvas).reshape(height, SUBPIXELS, width, SUBPIXELS)
    return filled.sum(axis=(1, 3), dtype=np.int64) >= SUBPIXELS**2


def _patient_of(folders: Sequence[str]) -> str:
    """The innermost folder that is named like a patient, in one spelling; empty for none."""
    for name in reversed(folders):
        if match := PATIENT.fullmatch(name):
            return f"SC-{match[1].upper()}-{int(match[2])}"
        if IMAGE_FOLDER.fullmatch(name) and "_" not in name:
            return name.upper()
    return ""


def _read_tables(paths: Sequence[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Patients by the folder of their images, and likewise their sex."""
    originals, sexes = {}, {}
    for path in paths:
        for _, row in read_rows(path, COLUMNS, ["patient", "original"]):
            if patient := _patient_of([row["original"]]):
                originals[row["patient"].upper()] = patient
                sexes[row["patient"].upper()] = sex_code(row.get("sex", ""))
    return originals, sexes


SUNNYBROOK = Layout(
    lambda source, options, workers: find_sunnybrook(source, workers),
    expects="""\
SC-HF-I-1/DICOM/IM-0001-NNNN.dcm, or SCD0000101/.../IM-SSSS-NNNN.dcm with scd_patientdata.csv; contours in
SC-HF-I-1/contours-manual/IRCCI-expert/IM-0001-NNNN-icontour-manual.txt and -ocontour-manual.txt""",
    public_set="Sunnybrook",
)
