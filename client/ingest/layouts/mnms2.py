"""The layout of M&Ms-2: one CSV, and `NNN/NNN_SA_ED.nii.gz`, `NNN_SA_ES.nii.gz`, each with its `..._gt.nii.gz`.

Martín-Isla et al., IEEE JBHI 2023, https://doi.org/10.1109/JBHI.2023.3267857. Two 3D phases a patient; the whole cine
(`SA_CINE`) and the long axis (`LA_*`) next to them are not read. Its masks count from the left ventricle: 1 LV,
2 myocardium, 3 RV. The CSV, `dataset_information.csv`, has the columns SUBJECT_CODE, DISEASE, VENDOR, SCANNER
and FIELD; codes stand there without the zeros that the folders' names begin with. The sex is not given.
"""

import math
import os
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.files import find_named, nifti_files
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.mnms import LABELS, sibling
from fedcmr.client.ingest.layouts.nifti import patient_axes, read_phases, spacing_of
from fedcmr.client.ingest.layouts.tables import read_rows, whole_number
from fedcmr.client.ingest.patient import agreed, pathology_code
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.vendor import field_strength, says_vendor, vendor_name

TABLE_NAME = "dataset_information.csv"
COLUMNS = {"SUBJECT_CODE": ("subject_code",), "VENDOR": ("vendor",), "FIELD": ("field",)}
PATHOLOGY_COLUMN = {"DISEASE": ("disease",)}
"""Columns that may be missing."""
PHASES = ("ED", "ES")
FRAME = re.compile(r"(.+)_SA_(ED|ES)", re.IGNORECASE)
OTHER = re.compile(r".+_(SA|LA)_(ED|ES|CINE)(_gt)?", re.IGNORECASE)


def find_mnms2(source: Path) -> Findings:
    """Patients that the table lists.

    Raises:
        UserError: There is no such table, or a column is missing.
    """
    rows = read_rows(find_named(source, TABLE_NAME), COLUMNS | PATHOLOGY_COLUMN, list(COLUMNS))
    left_out, refused = Tally(), Tally()
    files = nifti_files(source, _frame, left_out, refused, known=(".csv",))
    folders: dict[str, set[Path]] = defaultdict(set)
    for name, path in files.items():
        folders[name.rsplit("_", 1)[0]].add(path.parent)
    described: dict[str, set[tuple[str, str]]] = defaultdict(set)
    pathologies: dict[str, set[str]] = defaultdict(set)
    for _, row in rows:
        if row["SUBJECT_CODE"]:
            number = whole_number(row["SUBJECT_CODE"])
            code = (row["SUBJECT_CODE"] if number is None else str(number)).zfill(3)
            described[code].add((row["VENDOR"], row["FIELD"]))
            pathologies[code].add(pathology_code(row.get("DISEASE", "")))
    studies = []
    for code, descriptions in sorted(described.items()):
        places = folders.pop(code, set())
        place = Place(os.path.commonpath(places) if places else "", code)
        if len(descriptions) > 1:
            refused.add("conflicting-rows", place)
        elif not places:
            refused.add("missing-file", place)
        elif len(places) > 1:
            refused.add("same-name", place)
        else:
            vendor, field = descriptions.pop()
            read = partial(read_mnms2, places.pop(), vendor, field, agreed(pathologies[code]), code)
            studies.append(Study(code, code, read, place=place))
    for code, places in sorted(folders.items()):
        left_out.add("not-in-table", Place(os.path.commonpath(places), code))
    return Findings(studies, refused, left_out)


def read_mnms2(folder: Path, vendor: str, field: str, pathology: str = "", code: str = "") -> Cine:
    """Both phases of one patient.

    Args:
        folder: The patient's.
        vendor: As the table names it.
        field: Tesla, as the table writes it.
        pathology: As in `Cine`.
        code: What the files' names begin with; by default the folder's name.

    Raises:
        Unusable: A file is missing or damaged, or they do not fit.
    """
    frames = [sibling(folder / f"{code or folder.name}.nii.gz", f"_SA_{phase}") for phase in PHASES]
    images, masks, first = read_phases(frames, [sibling(path, "_gt") for path in frames], LABELS)
    x_mm, y_mm, z_mm = spacing_of(first.affine)
    return Cine(
        images=images,
        masks=masks,
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=patient_axes(first),
        vendor=vendor_name(vendor),
        says_vendor=says_vendor([vendor]),
        field_strength_t=field_strength(_number(field)),
        pathology=pathology,
    )


def _frame(stem: str) -> str | None:
    """The code of a frame's patient and its phase, in one spelling; empty for a mask, and for what is not read."""
    match = FRAME.fullmatch(stem)
    return f"{match[1]}_{match[2].upper()}" if match else ("" if OTHER.fullmatch(stem) else None)


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan


MNMS2 = Layout(
    lambda source, options, workers: find_mnms2(source),
    expects="NNN/NNN_SA_ED.nii.gz, NNN_SA_ES.nii.gz, each with ..._gt.nii.gz, and dataset_information.csv",
    public_set="M&Ms-2",
)
