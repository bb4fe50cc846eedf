"""A simulated hospital: who comes, who is scanned, and the export folder its data manager would hand over.

    FOLDER/<study>/**/*.dcm      one cine short-axis stack, classic MR Image Storage, one file per slice and phase
    FOLDER/<study>/masks.nii.gz  labels (x, y, z, phase): 1 RV, 2 myocardium, 3 LV cavity; RAS+ affine

The hospitals differ in scanner and field strength (`scanner.py`), in the mix of diseases, and in age and body size.
"""

import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.progress import track
from fedcmr.simulations.patients.population import Population, draw_patient
from fedcmr.simulations.processes import map_unordered, workers
from fedcmr.simulations.scanners.acquisition import SCANNERS, Acquisition, acquire
from fedcmr.simulations.scanners.dicom import write_dicom

POPULATIONS = {
    # A general cardiology department, a cardiomyopathy and heart-failure clinic, and a community hospital.
    "Siemens": Population(
        {"normal": 0.35, "dilated": 0.15, "hypertrophic": 0.15, "infarcted": 0.25, "rv_dilated": 0.10},
        age_years=(58, 14),
        bmi=(26, 4),
        female_share=0.42,
    ),
    "Philips": Population(
        {"normal": 0.20, "dilated": 0.30, "hypertrophic": 0.30, "infarcted": 0.10, "rv_dilated": 0.10},
        age_years=(49, 16),
        bmi=(24.5, 3.5),
        female_share=0.50,
    ),
    "GE": Population(
        {"normal": 0.30, "dilated": 0.15, "hypertrophic": 0.10, "infarcted": 0.35, "rv_dilated": 0.10},
        age_years=(66, 10),
        bmi=(29, 4.5),
        female_share=0.38,
    ),
}


def write_hospital(
    folder: Path,
    vendor: str,
    num_patients: int,
    num_slices: int,
    num_phases: int,
    seed: int,
    prefix: str,
    num_processes: int = 1,
) -> None:
    """Write a hospital's export, or resume: a finished study is kept, an unfinished one is written again.

    Args:
        folder: Receives one folder per study; created if missing.
        vendor: One of `SCANNERS`.
        num_patients: One study each.
        num_slices: Slices per stack, at least 2; wider apart where fewer would not reach the apex.
        num_phases: Cardiac phases over one RR interval.
        seed: With `vendor`, `prefix` and the patient's number it decides every pixel, whatever `num_processes`.
        prefix: Prefix of the studies' folder names and of the invented patient identifiers.
        num_processes: Worker processes; 1 writes in this one.

    Raises:
        UserError: The vendor is not simulated, or the folder cannot be written.
    """
    if vendor not in SCANNERS:
        raise UserError(f"hospitals.vendors: a simulated hospital is one of {', '.join(SCANNERS)}, got {vendor!r}")
    write = partial(_write_study, folder, vendor, num_slices, num_phases, seed, prefix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in track(_each(write, num_patients, num_processes), f"scanning patients ({prefix})", total=num_patients):
            pass
    except OSError as error:
        # pydicom puts a traceback into its own OSError's text; the reason then is nearly always a full disk.
        reason = error.strerror or "a DICOM file could not be stored, is the disk full?"
        raise UserError(f"{folder} cannot be written ({reason}): put it right, then run again") from None


def _each(write: "partial[None]", num_patients: int, num_processes: int) -> Iterator[None]:
    """Write every patient, here or in worker processes."""
    if num_processes == 1:
        yield from map(write, range(num_patients))
        return
    with workers(min(num_processes, num_patients)) as started:
        yield from map_unordered(started, write, range(num_patients))


def _write_study(
    folder: Path, vendor: str, num_slices: int, num_phases: int, seed: int, prefix: str, index: int
) -> None:
    """Draw, scan and write one patient, unless that is done; the folder gets its name when it is complete."""
    study = folder / f"{prefix}-{index:04d}"
    if study.is_dir():
        return
    unfinished = folder / f"{study.name}.partial"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    rng = np.random.default_rng([seed, zlib.crc32(f"{vendor}/{prefix}".encode()), index])
    scanner = SCANNERS[vendor]
    patient = draw_patient(rng, POPULATIONS[vendor])
    scan = acquire(patient, scanner, num_slices, num_phases, rng)
    write_dicom(unfinished, patient, scanner, scan, f"{prefix}-{seed}-{index:04d}", rng)
    _write_masks(unfinished / MASKS_NAME, scan)
    unfinished.rename(study)


def _write_masks(path: Path, scan: Acquisition) -> None:
    """The labels as NIfTI, in RAS+ mm: first two axes of DICOM's LPS turned round."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.stack.affine_lps()
    image = nib.Nifti1Image(scan.masks.transpose(3, 2, 1, 0), affine, dtype=np.uint8)
    image.header.set_xyzt_units("mm", "msec")
    image.header["pixdim"][4] = scan.interval_ms / len(scan.masks)
    nib.save(image, path)
