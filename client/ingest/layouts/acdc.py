"""The layout of ACDC: `patientNNN/patientNNN_frameMM.nii.gz` with `..._gt.nii.gz`, two frames a patient, `Info.cfg`.

Bernard et al., IEEE TMI 2018, https://doi.org/10.1109/TMI.2018.2837502. The headers hold no position or orientation,
the spacing may be nominal, and neither the field strength (1.5 T or 3 T) nor the sex is given.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Collection
from functools import partial
from pathlib import Path

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.files import find_named, is_system, nifti_stem, plain_files
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import read_phases, spacing_of
from fedcmr.client.ingest.patient import pathology_code
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import BACKGROUND, LV, MYO, RV
from fedcmr.shared.plain_files import read_plain

NUM_FOLDS = 5
MAX_FIELD_OF_VIEW_MM, USUAL_FIELD_OF_VIEW_MM = 500.0, 384.0
"""No MR scanner sees more than the first along a side; a usual stack, 256 pixels of nominal 1.5 mm, sees the second."""
LABELS = {0: BACKGROUND, 1: RV, 2: MYO, 3: LV}
INFO_NAME = "Info.cfg"
OTHER_SUFFIXES = (".cfg", ".md", ".txt", ".pdf")
PATIENT = re.compile(r"patient(\d+)", re.IGNORECASE)
FRAME = re.compile(r"(patient\d+)_frame\d+(?:_gt)?", re.IGNORECASE)
MAX_INFO_BYTES = 64 * 1024


def find_acdc(source: Path, folds: Collection[int] | None = None) -> Findings:
    """Patients of an ACDC folder.

    Args:
        source: The folder that holds the patients' folders, or one above it.
        folds: Keep patients NNN with (NNN - 1) % 5 in this; None keeps all.
    """
    left_out, refused = Tally(), Tally()
    folders: dict[str, set[Path]] = defaultdict(set)
    for path in map(Path, plain_files(source, left_out)):
        match, stem = PATIENT.fullmatch(path.parent.name), nifti_stem(path.name)
        if match is not None and (stem is None or stem.lower().startswith("patient")):
            folders[match[1]].add(path.parent)
        elif path.suffix.lower() not in OTHER_SUFFIXES:
            left_out.add("other-file", path)
    for folder in {*source.glob("*"), *source.glob("*/*")}:  # also an empty one: its patient is missing
        if (match := PATIENT.fullmatch(folder.name)) and not is_system(folder.parent.name) and folder.is_dir():
            folders[match[1]] = folders[match[1]] or {folder}
    studies = []
    for number, places in sorted(folders.items()):
        if folds is not None and (int(number) - 1) % NUM_FOLDS not in folds:
            continue
        if len(places) > 1:
            refused.add("same-name", Place(os.path.commonpath(places), number))
        else:
            folder = places.pop()
            studies.append(Study(number, number, partial(read_acdc, folder), place=Place(str(folder), number)))
    return Findings(studies, refused, left_out)


def read_acdc(folder: Path) -> Cine:
    """Both frames of one patient.

    Raises:
        Unusable: A frame is missing or damaged, or its mask does not fit.
    """
    # Of a file that somebody unpacked next to itself the compressed one counts.
    files = {
        stem.lower(): path for path in sorted(folder.iterdir(), reverse=True) if (stem := _stem(path, folder.name))
    }
    masks = sorted(stem for stem in files if stem.endswith("_gt"))
    if len(masks) != 2 or not all(stem.removesuffix("_gt") in files for stem in masks):
        raise Unusable("missing-file")
    images, labels, first = read_phases(
        [files[stem.removesuffix("_gt")] for stem in masks], [files[stem] for stem in masks], LABELS
    )
    x_mm, y_mm, z_mm = spacing_of(first.affine)
    field_of_view_mm = max(images.shape[3] * x_mm, images.shape[2] * y_mm)
    if field_of_view_mm > MAX_FIELD_OF_VIEW_MM:  # a finer matrix under a nominal spacing that cannot be
        x_mm, y_mm = (mm * USUAL_FIELD_OF_VIEW_MM / field_of_view_mm for mm in (x_mm, y_mm))
    # Transposed (z, y, x), every ACDC stack is seen from the apex.
    return Cine(
        images=images,
        masks=labels,
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=None,
        vendor="Siemens",
        field_strength_t=math.nan,
        pathology=_group(find_named(folder, INFO_NAME)),
    )


def _stem(path: Path, patient: str) -> str:
    """The name of a patient's frame or of its mask without the suffix; empty for another file."""
    stem = None if is_system(path.name) else nifti_stem(path.name)
    match = None if stem is None else FRAME.fullmatch(stem)
    return match[0] if match and match[1].lower() == patient.lower() else ""


def _group(path: Path) -> str:
    """The pathology of the line `Group: DCM`; empty where the file is missing, damaged or says it otherwise."""
    try:
        lines = read_plain(path, MAX_INFO_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((pathology_code(line.removeprefix("Group:")) for line in lines if line.startswith("Group:")), "")


ACDC = Layout(
    lambda source, options, workers: find_acdc(source, options.folds),
    expects="patientNNN/patientNNN_frameMM.nii.gz and ..._gt.nii.gz, two frames a patient",
    takes=("folds",),
    public_set="ACDC",
)
