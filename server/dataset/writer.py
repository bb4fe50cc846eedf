"""The synthetic data set as it leaves the study: cases, labels, datasheet, checksums; DICOM, NIfTI, nnU-Net on request.

The folder appears whole or not at all: everything is written next to it and renamed at the end. `SHA256SUMS` is
checked with `sha256sum --check SHA256SUMS`, and `cases.csv` makes the folder a data set like any other one.
"""

import csv
import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcmr.server.dataset.croissant import one_line, write_croissant
from fedcmr.server.dataset.datalist import write_datalist
from fedcmr.server.dataset.datasheet import Content, datasheet
from fedcmr.server.dataset.making import making_of
from fedcmr.server.dataset.nifti import export_nifti
from fedcmr.server.dataset.nnunet import export_nnunet
from fedcmr.shared.case import ED, ES, LV, Case, save_case, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import CHECKSUMS_NAME, DATASHEET_NAME
from fedcmr.shared.progress import track

LABELS_NAME = "labels.csv"
LABEL_COLUMNS = ("pseudonym", "vendor", "ef", "ef_requested", "ef_measured", "lv_ed_ml", "lv_es_ml")


def write_release(
    folder: Path,
    cases: Sequence[Case],
    requested_efs: Sequence[float] | None,
    measured_efs: Sequence[float],
    facts: Mapping[str, Any],
    dicom: bool = False,
    nifti: bool = False,
    nnunet: bool = False,
) -> None:
    """Write `folder`, replacing an earlier release there.

    Args:
        folder: For example RUN/synthetic.
        cases: Synthetic cases; `info.ef` is the label.
        requested_efs: Shape (len(cases),), the ejection fraction requested of each heart; None: the labels.
        measured_efs: Shape (len(cases),), `fedcmr.server.tasks.segmentation.training.measured_ef` of the images, NaN
            where it found no LV.
        facts: Facts for `datasheet`; see `study_facts`.
        dicom: Also write `dicom/`.
        nifti: Also write `nifti/`.
        nnunet: Also write `nnunet/` and `datalist.json`.

    Raises:
        UserError: `folder` holds something that is not a release.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / DATASHEET_NAME).is_file():
        raise UserError(f"{folder} holds other files: give a new or empty folder for the synthetic data set")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if dicom:
        from fedcmr.server.dataset.dicom import export_case  # with highdicom, which takes seconds
    for case in track(cases, "writing synthetic cases"):
        save_case(partial, case, private=False)
        if dicom:
            export_case(partial / "dicom", case, making_of(facts))
    if nifti:
        export_nifti(partial / "nifti", cases)
    if nnunet:
        export_nnunet(partial / "nnunet", cases, one_line(facts["terms"]))
        write_datalist(partial, cases)
    write_index(partial, [case.info for case in cases], private=False)
    requested = [case.info.ef for case in cases] if requested_efs is None else requested_efs
    _write_labels(partial / LABELS_NAME, cases, requested, measured_efs)
    text = datasheet(Content(cases, requested, measured_efs, dicom, nifti, nnunet), facts)
    (partial / DATASHEET_NAME).write_text(text, encoding="utf-8")
    write_croissant(partial, LABEL_COLUMNS, facts)
    (partial / CHECKSUMS_NAME).write_text(checksums(partial), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def cavity_ml(case: Case, phase: int) -> float:
    """LV volume in millilitres over the slices of the stack: the sum of area times slice spacing."""
    return float((case.masks[phase] == LV).sum() * np.prod(case.spacing_mm, dtype=np.float64) / 1000)


def checksums(folder: Path) -> str:
    """One `sha256  relative/path` line per file, as `sha256sum` writes and checks them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in paths
    )
    return "".join(f"{line}\n" for line in lines)


def _write_labels(
    path: Path, cases: Sequence[Case], requested_efs: Sequence[float], measured_efs: Sequence[float]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LABEL_COLUMNS)
        for case, requested, measured in zip(cases, requested_efs, measured_efs, strict=True):
            volumes = (f"{cavity_ml(case, phase):.2f}" for phase in (ED, ES))
            efs = ("" if math.isnan(value) else f"{value:.6g}" for value in (case.info.ef, requested, measured))
            writer.writerow([case.info.pseudonym, case.info.vendor, *efs, *volumes])
