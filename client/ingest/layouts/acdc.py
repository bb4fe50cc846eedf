"""The layout of ACDC: `patientNNN/patientNNN_frameMM.nii.gz` with `..._gt.nii.gz`, two frames a patient, `Info.cfg`.

Bernard et al., IEEE TMI 2018, https://doi.org/10.1109/TMI.2018.2837502. The headers hold no position or orientation,
the spacing may be nominal, and neither the field strength (1.5 T or 3 T) nor the sex is given.
"""

import math
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import read_phases, spacing_of
from fedcmr.client.ingest.patient import pathology_code
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import BACKGROUND, LV, MYO, RV
from fedcmr.shared.plain_files import read_plain

NUM_FOLDS = 5
MAX_FIELD_OF_VIEW_MM, USUAL_FIELD_OF_VIEW_MM = 500.0, 384.0
"""No MR scanner sees more than the first along a side; a usual stack, 256 pixels of nominal 1.5 mm, sees the second."""
LABELS = {0: BACKGROUND, 1: RV, 2: MYO, 3: LV}
INFO_NAME = "Info.cfg"
MAX_INFO_BYTES = 64 * 1024


def find_acdc(source: Path, folds: Collection[int] | None = None) -> Findings:
    """Patients of an ACDC folder.

    Args:
        source: The folder that holds the patients' folders, or one above it.
        folds: Keep patients NNN with (NNN - 1) % 5 in this; None keeps all.
    """
    studies = []
    for folder in sorted({*source.glob("patient*"), *source.glob("*/patient*")}):
        match = re.fullmatch(r"patient(\d+)", folder.name)
        if match is None or not folder.is_dir():
            continue
        if folds is None or (int(match[1]) - 1) % NUM_FOLDS in folds:
            studies.append(Study(match[1], match[1], partial(read_acdc, folder)))
    return Findings(studies)


def read_acdc(folder: Path) -> Cine:
    """Both frames of one patient.

    Raises:
        Unusable: A frame is missing or damaged, or its mask does not fit.
    """
    masks = sorted(folder.glob(f"{folder.name}_frame[0-9]*_gt.nii.gz"))
    if len(masks) != 2:
        raise Unusable("missing-file")
    frames = [path.with_name(path.name.replace("_gt.nii.gz", ".nii.gz")) for path in masks]
    images, labels, affine = read_phases(frames, masks, LABELS)
    x_mm, y_mm, z_mm = spacing_of(affine)
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
        pathology=_group(folder / INFO_NAME),
    )


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
