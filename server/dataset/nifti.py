"""Synthetic cases as NIfTI, in the layout that `fedcmr-client prepare --format plain` reads.

    frames/<pseudonym>.nii.gz   float32 in [0, 1], axes (x, y, z, phase): end-diastole, end-systole
    masks/<pseudonym>.nii.gz    uint8 of the same axes: 0 background, 1 RV, 2 myocardium, 3 LV cavity; 255, which a
                                prepared case has where nobody drew, does not occur in a synthetic one
    cases.csv                   name, vendor (the style), ef_fraction (of the masks)

Every header says that it is synthetic.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedcmr.server.dataset.geometry import ras_affine
from fedcmr.shared.case import Case

LABELS = "rv=1,myo=2,lv=3"
"""Value of `prepare --labels` for these masks."""
DESCRIPTION = b"SYNTHETIC image by fedcmr, not a person"
"""The header's `descrip`, at most 79 bytes."""
ALIGNED = 2
"""NIFTI_XFORM_ALIGNED_ANAT: the axes are anatomical. Code 1 would mean scanner coordinates."""


def export_nifti(folder: Path, cases: Sequence[Case]) -> None:
    """Write `frames/`, `masks/` and `cases.csv` of all cases."""
    for name in ("frames", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in cases:
        write_nifti(folder / "frames" / f"{case.info.pseudonym}.nii.gz", case.frames, case)
        write_nifti(folder / "masks" / f"{case.info.pseudonym}.nii.gz", case.masks, case)
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "vendor", "ef_fraction"])
        writer.writerows([case.info.pseudonym, case.info.vendor, f"{case.info.ef:.6g}"] for case in cases)


def write_nifti(path: Path, array: NDArray[np.float32] | NDArray[np.uint8], case: Case) -> None:
    """Write the frames or masks of a case, shape (2, Z, H, W), as (x, y, z, phase) where the case lies."""
    image = nibabel.Nifti1Image(array.T, ras_affine(case))
    image.set_qform(image.affine, ALIGNED)
    image.set_sform(image.affine, ALIGNED)
    image.header.set_xyzt_units("mm")  # the times of the two phases are unknown
    image.header["descrip"] = DESCRIPTION
    image.header["cal_min"], image.header["cal_max"] = 0, 1 if array.dtype == np.float32 else 0
    nibabel.save(image, path)
