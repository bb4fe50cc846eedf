"""Reason codes, and the check of a folder of prepared cases."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.ingest.vendor import UNKNOWN
from shared.case import CASE_SIZE, ED, ES, INDEX_NAME, LV, VENDORS, Case, load_case, read_index
from shared.errors import UserError
from shared.progress import track

REASONS = {
    # studies
    "no-short-axis-cine": "no stack of parallel short-axis slices with several phases each",
    "ambiguous-stack": "two series hold the same slices: export one of them",
    "ambiguous-phase-order": "neither TriggerTime nor InstanceNumber tells the phases apart",
    "uneven-phases": "slices with different numbers of phases: a file is missing or belongs elsewhere",
    "uneven-spacing": "slices at uneven distances: one is missing or belongs elsewhere",
    "slices-not-aligned": "slices are shifted against each other",
    "unreadable-pixels": "an image's pixels are cut, or stored in a way that cannot be decoded here",
    "constant-image": "the images, or those of end-diastole or end-systole alone, hold no contrast",
    "missing-file": "a frame, a mask or the whole folder of a listed patient is missing",
    "unreadable-nifti": "a NIfTI file is damaged",
    "masks-differ": "image and mask have different shapes or numbers of phases",
    "masks-misaligned": "the masks lie outside the images: their affine does not agree with the scans",
    "masks-implausible": "labels other than expected, fewer than two phases with a left ventricle, or equal ones",
    "heart-beyond-crop": "the left ventricle reaches beyond a case's 144 mm: the pixel spacing may be wrong",
    "ambiguous-masks": "one mask file for several studies: keep each beside its own scans",
    "unexpected-error": "the reader failed: please report the kind of scanner and export",
    # files, and series of a usable study
    "not-dicom": "files that are not DICOM",
    "damaged-header": "files that begin like DICOM and cannot be parsed",
    "unreadable": "files or folders that this account may not read",
    "no-regular-file": "links, devices and other things that are not plain files",
    "deflated": "files in a compressed transfer syntax that is refused unopened",
    "enhanced-multiframe": "Enhanced multi-frame files: export as classic MR images",
    "not-mr-image": "other objects: reports, masks, secondary captures, other modalities",
    "no-geometry": "images without a usable position, orientation or pixel spacing",
    "no-uid": "images that do not say which study, series or instance they are",
    "duplicate": "copies of an image that is already there",
    "not-cine": "series or slices with too few phases: localisers, late enhancement, perfusion",
    "other-orientation": "series of another orientation, or with too few slices: long axis, axial, outflow tract",
}
"""Every code with what it means, in words for the person who exports scans."""

MAX_EF_DIFFERENCE = 0.01
"""Resampled masks may miss the original ejection fraction by one point."""


class Unusable(Exception):  # noqa: N818
    """A study, series or file that cannot become a case; holds a code of `REASONS` and nothing of the patient."""

    def __init__(self, code: str) -> None:
        assert code in REASONS, code
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class CheckReport:
    """What a folder of cases holds.

    Attributes:
        num_cases: Rows of the index.
        num_patients: Distinct groups.
        vendors: Number of cases by vendor.
        field_strengths_t: Number of cases by field strength in tesla; None for unknown.
        num_slices: Smallest and largest.
        slice_spacing_mm: Smallest and largest.
        ef: Smallest and largest known, or None.
        num_labelled: Cases with masks.
    """

    num_cases: int
    num_patients: int
    vendors: dict[str, int]
    field_strengths_t: dict[float | None, int]
    num_slices: tuple[int, int]
    slice_spacing_mm: tuple[float, float]
    ef: tuple[float, float] | None
    num_labelled: int


def check(folder: Path) -> CheckReport:
    """Read every case of a folder and summarise it.

    Raises:
        UserError: The folder holds no case, or one that training could not use.
    """
    infos = read_index(folder)
    if not infos:
        raise UserError(f"{folder} holds no case: prepare it with 'fedcmr-client prepare' first")
    repeated = [name for name, count in Counter(info.pseudonym for info in infos).items() if count > 1]
    if repeated:
        raise UserError(f"{folder / INDEX_NAME} names {repeated[0]} twice: prepare the folder again")
    shapes, spacings, num_labelled = [], [], 0
    for info in track(infos, "checking cases"):
        case = load_case(folder, info)
        trouble = _trouble(case)
        if trouble:
            raise UserError(f"{folder / 'cases' / info.pseudonym}.npz: {trouble}: prepare the folder again")
        shapes.append(case.frames.shape[1])
        spacings.append(float(case.spacing_mm[0]))
        num_labelled += bool(case.masks.any())
    known = [info.ef for info in infos if not math.isnan(info.ef)]
    return CheckReport(
        num_cases=len(infos),
        num_patients=len({info.group for info in infos}),
        vendors=dict(Counter(info.vendor for info in infos)),
        field_strengths_t=dict(Counter(None if math.isnan(t) else t for t in (i.field_strength_t for i in infos))),
        num_slices=(min(shapes), max(shapes)),
        slice_spacing_mm=(min(spacings), max(spacings)),
        ef=(min(known), max(known)) if known else None,
        num_labelled=num_labelled,
    )


def _trouble(case: Case) -> str | None:
    """What makes a case useless for training, or None."""
    if case.info.vendor not in (*VENDORS, UNKNOWN):
        return f"expected a vendor of {', '.join(VENDORS)} or {UNKNOWN}"
    if case.frames.shape[2:] != (CASE_SIZE, CASE_SIZE):
        return (
            f"expected frames of {CASE_SIZE} x {CASE_SIZE} pixels, got {case.frames.shape[2]} x {case.frames.shape[3]}"
        )
    if any(float(np.ptp(frame)) == 0 for frame in case.frames):
        return "a frame without contrast"
    areas = (case.masks == LV).sum(axis=(1, 2, 3))
    if not case.masks.any():
        return None if math.isnan(case.info.ef) else "an ejection fraction without masks"
    if areas[ED] == 0 or areas[ES] == 0:
        return "masks without a left ventricle"
    if not abs(1 - areas[ES] / areas[ED] - case.info.ef) <= MAX_EF_DIFFERENCE:
        return f"the ejection fraction of {INDEX_NAME} is not that of the masks"
    return None
