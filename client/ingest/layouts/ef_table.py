"""A table of ejection fractions, one per patient, for scans without masks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedcmr.client.deidentify import same_patient
from fedcmr.client.ingest.cine import Cine, Study
from fedcmr.client.ingest.files import same_name
from fedcmr.client.ingest.layouts.tables import ejection_fraction, read_rows
from fedcmr.shared.errors import UserError

COLUMNS = {
    "patient": ("patient", "patientid", "patient_id", "patient id"),
    "ef_fraction": ("ef_fraction",),
    "ef_percent": ("ef_percent",),
}


def read_ef_table(path: Path) -> dict[str, float]:
    """Ejection fractions by patient, as fractions.

    The first line names the columns: `patient`, spelt as the scans do (PatientID of DICOM), and either `ef_fraction`
    or `ef_percent`. Other columns are not looked at.

    Raises:
        UserError: The table cannot be read; or a cell is missing, no number, out of range or a formula, or a patient
            comes twice. The message names the line and never the value.
    """
    rows = read_rows(path, COLUMNS, ["patient"])
    units = [unit for unit in ("ef_fraction", "ef_percent") if unit in rows[0][1]]
    if len(units) != 1:
        raise UserError(
            f"{path} line 1: expected either a column ef_fraction (0.55) or a column ef_percent (55), "
            f"got {'both' if units else 'neither'}"
        )
    table: dict[str, float] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        patient = same_name(row["patient"])
        if not patient:
            raise UserError(f"{path} line {line}: column patient is empty: enter an identifier or leave out the row")
        if patient in table:
            raise UserError(f"{path} line {line}: the patient of line {lines[patient]} again: keep one row per patient")
        place = f"{path} line {line}: column {units[0]}"
        table[patient] = ejection_fraction(row[units[0]], place, percent=units[0] == "ef_percent")
        lines[patient] = line
    return table


def with_ejection_fractions(studies: Sequence[Study], table: Mapping[str, float]) -> list[Study]:
    """The same studies, each of which reads its patient's ejection fraction with the scans.

    A patient with several studies gets none: their ventricles may have differed, and one number cannot tell of which
    it is. Nor can it where several patients' numbers are the same.
    """
    counts = Counter(same_patient(study.spelt) for study in studies)
    labelled = []
    for study in studies:
        alone = counts[same_patient(study.spelt)] == 1
        ef = next((table[name] for name in names_of(study) if alone and name in table), math.nan)
        labelled.append(replace(study, read=partial(_read, study, ef)))
    return labelled


def names_of(study: Study) -> tuple[str, ...]:
    """What a table may call a study's patient."""
    return same_name(study.spelt), same_patient(study.spelt), same_name(study.patient)


def _read(study: Study, ef: float) -> Cine:
    """The scans with an ejection fraction, in case they have no masks."""
    return replace(study.read(), ef=ef)
