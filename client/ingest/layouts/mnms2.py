"""The layout of M&Ms-2: one CSV, and `NNN/NNN_SA_ED.nii.gz`, `NNN_SA_ES.nii.gz`, each with its `..._gt.nii.gz`.

Martín-Isla et al., IEEE JBHI 2023, https://doi.org/10.1109/JBHI.2023.3267857. Two 3D phases a patient; the whole cine
(`SA_CINE`) and the long axis (`LA_*`) next to them are not read. Its masks count from the left ventricle: 1 LV,
2 myocardium, 3 RV. The CSV, `dataset_information.csv`, has the columns SUBJECT_CODE, DISEASE, VENDOR, SCANNER
and FIELD; codes stand there without the zeros that the folders' names begin with. The sex is not given.
"""

import math
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.mnms import LABELS
from fedcmr.client.ingest.layouts.nifti import axes_of, read_phases, spacing_of
from fedcmr.client.ingest.layouts.tables import read_rows
from fedcmr.client.ingest.patient import agreed, pathology_code
from fedcmr.client.ingest.vendor import field_strength, says_vendor, vendor_name

TABLE_NAME = "dataset_information.csv"
COLUMNS = {"SUBJECT_CODE": ("subject_code",), "VENDOR": ("vendor",), "FIELD": ("field",)}
PATHOLOGY_COLUMN = {"DISEASE": ("disease",)}
"""Columns that may be missing."""
PHASES = ("ED", "ES")


def find_mnms2(source: Path) -> Findings:
    """Patients that the table lists.

    Raises:
        UserError: There is no such table, or a column is missing.
    """
    rows = read_rows(source / TABLE_NAME, COLUMNS | PATHOLOGY_COLUMN, list(COLUMNS))
    folders = {path.parent.name: path.parent for path in sorted(source.rglob("*_SA_E[DS].nii.gz"))}
    described: dict[str, set[tuple[str, str]]] = defaultdict(set)
    pathologies: dict[str, set[str]] = defaultdict(set)
    for _, row in rows:
        if row["SUBJECT_CODE"]:
            code = row["SUBJECT_CODE"].zfill(3)
            described[code].add((row["VENDOR"], row["FIELD"]))
            pathologies[code].add(pathology_code(row.get("DISEASE", "")))
    studies, refused = [], Counter[str]()
    for code, descriptions in sorted(described.items()):
        if len(descriptions) > 1:
            refused["conflicting-rows"] += 1
        elif code not in folders:
            refused["missing-file"] += 1
        else:
            vendor, field = descriptions.pop()
            read = partial(read_mnms2, folders[code], vendor, field, agreed(pathologies[code]))
            studies.append(Study(code, code, read))
    return Findings(studies, refused)


def read_mnms2(folder: Path, vendor: str, field: str, pathology: str = "") -> Cine:
    """Both phases of one patient.

    Args:
        folder: The patient's.
        vendor: As the table names it.
        field: Tesla, as the table writes it.
        pathology: As in `Cine`.

    Raises:
        Unusable: A file is missing or damaged, or they do not fit.
    """
    frames = [folder / f"{folder.name}_SA_{phase}.nii.gz" for phase in PHASES]
    images, masks, affine = read_phases(
        frames, [path.with_name(path.name.replace(".nii.gz", "_gt.nii.gz")) for path in frames], LABELS
    )
    x_mm, y_mm, z_mm = spacing_of(affine)
    return Cine(
        images=images,
        masks=masks,
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=axes_of(affine),
        vendor=vendor_name(vendor),
        says_vendor=says_vendor([vendor]),
        field_strength_t=field_strength(_number(field)),
        pathology=pathology,
    )


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


MNMS2 = Layout(
    lambda source, options, workers: find_mnms2(source),
    expects="NNN/NNN_SA_ED.nii.gz, NNN_SA_ES.nii.gz, each with ..._gt.nii.gz, and dataset_information.csv",
    public_set="M&Ms-2",
)
