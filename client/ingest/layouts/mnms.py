"""The layout of M&Ms: one CSV, and `CODE/CODE_sa.nii.gz` with `CODE_sa_gt.nii.gz`, 4D, labelled at two phases.

Campello et al., IEEE TMI 2021, https://doi.org/10.1109/TMI.2021.3090082. Its masks count from the left ventricle: 1 LV,
2 myocardium, 3 RV. The field strength is not given; the CSV's columns `Pathology` and `Sex` may be missing.
"""

import csv
import io
import math
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import axes_of, read_nifti, relabel, spacing_of
from fedcmr.client.ingest.layouts.tables import MAX_BYTES
from fedcmr.client.ingest.patient import agreed, pathology_code, sex_code
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.vendor import says_vendor, vendor_name
from fedcmr.shared.case import BACKGROUND, LV, MYO, RV
from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import read_plain

LABELS = {0: BACKGROUND, 1: LV, 2: MYO, 3: RV}
COLUMNS = ("External code", "VendorName", "ED", "ES")


def find_mnms(source: Path) -> Findings:
    """Patients that the CSV lists.

    Raises:
        UserError: There is no such CSV, or more than one.
    """
    tables = [rows for path in sorted(source.glob("*.csv")) if (rows := _read_table(path)) is not None]
    if len(tables) != 1:
        raise UserError(f"{source}: expected one CSV with the columns {', '.join(COLUMNS)}, got {len(tables)}")
    images = {path.name.removesuffix("_sa.nii.gz"): path for path in source.rglob("*_sa.nii.gz")}
    described: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in tables[0]:
        described[row["External code"]].append(row)
    studies, refused = [], Counter[str]()
    for code, rows in described.items():
        row = rows[0]
        if len({tuple(one[column] for column in COLUMNS) for one in rows}) > 1:
            refused["conflicting-rows"] += 1
        elif code in images and row["ED"].isdecimal() and row["ES"].isdecimal():
            phases = int(row["ED"]), int(row["ES"])
            sex = agreed(sex_code(one.get("Sex", "")) for one in rows)
            pathology = agreed(pathology_code(one.get("Pathology", "")) for one in rows)
            read = partial(read_mnms, images[code], row["VendorName"], phases, sex, pathology)
            studies.append(Study(code, code, read))
        else:
            refused["missing-file"] += 1
    return Findings(studies, refused)


def read_mnms(path: Path, vendor: str, phases: tuple[int, int], sex: str = "", pathology: str = "") -> Cine:
    """The two labelled phases of one patient.

    Args:
        path: The `CODE_sa.nii.gz`.
        vendor: As the CSV names it.
        phases: Indices of the labelled phases, from 0.
        sex: As in `Cine`.
        pathology: As in `Cine`.

    Raises:
        Unusable: The stack or its mask is missing or damaged, or they do not fit.
    """
    images, affine = read_nifti(path)
    masks, _ = read_nifti(path.with_name(path.name.replace("_sa.nii.gz", "_sa_gt.nii.gz")))
    if images.shape != masks.shape or images.ndim != 4 or max(phases) >= images.shape[3]:
        raise Unusable("masks-differ")
    x_mm, y_mm, z_mm = spacing_of(affine)
    return Cine(
        images=images[..., list(phases)].T.astype(np.float32),
        masks=relabel(masks[..., list(phases)].T, LABELS),
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=axes_of(affine),
        vendor=vendor_name(vendor),
        says_vendor=says_vendor([vendor]),
        field_strength_t=math.nan,
        sex=sex,
        pathology=pathology,
    )


def _read_table(path: Path) -> list[dict[str, str]] | None:
    """The rows of the data set's CSV; None for another file."""
    try:
        text = read_plain(path, MAX_BYTES).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text, newline=""))
        rows = [{key: value or "" for key, value in row.items() if key} for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    return rows if rows and set(COLUMNS) <= set(rows[0]) else None


MNMS = Layout(
    lambda source, options, workers: find_mnms(source),
    expects="CODE/CODE_sa.nii.gz and CODE_sa_gt.nii.gz, and the data set's CSV",
    public_set="M&Ms",
)
