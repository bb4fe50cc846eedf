"""The check of a folder of prepared cases."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.ingest.normalise import MAX_EF_DIFFERENCE
from client.ingest.vendor import UNKNOWN
from shared.case import CASE_SIZE, ED, ES, INDEX_NAME, LV, VENDORS, Case, load_case, read_index
from shared.errors import UserError
from shared.progress import track


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
