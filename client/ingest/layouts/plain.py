"""A plain layout for NIfTI files of one's own.

    frames/NAME.nii.gz                          a cine, axes (x, y, z, phase), or
    frames/NAME_ed.nii.gz, NAME_es.nii.gz       its end-diastolic and end-systolic phases, axes (x, y, z)
    masks/                                      files of the same names; optional, as a whole or for some patients
    cases.csv                                   optional; columns name, patient, vendor, field_strength_t, and
                                                ef_fraction or ef_percent

NAME is a patient; where the table's column `patient` says so, several names are one. What a mask's numbers mean is said
on the command line: `--labels rv=1,myo=2,lv=3`.

Masks may be there in part. `--labels lv=1` says that the cavity alone was drawn; of NAME_ed and NAME_es one may have a
mask; a phase of a 4D mask without any label counts as not labelled; `undrawn=255` names a number of pixels about which
nothing is known. What nobody drew is unknown and not background: see `fedcmr.client.ingest.drawn`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.deidentify import same_patient
from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import axes_of, read_nifti, relabel, spacing_of
from fedcmr.client.ingest.layouts.tables import ejection_fraction, plain_number, read_rows
from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.stack.short_axis import MAX_TILT_DEG
from fedcmr.client.ingest.vendor import field_strength, says_vendor, vendor_name
from fedcmr.shared.case import BACKGROUND, LV, MYO, NOT_DRAWN, RV, UNKNOWN, is_heart
from fedcmr.shared.errors import UserError
from fedcmr.shared.orientation import BASE_TO_APEX

TABLE_NAME = "cases.csv"
COLUMNS = {
    "name": ("name",),
    "patient": ("patient", "patientid", "patient_id"),
    "vendor": ("vendor", "manufacturer"),
    "field_strength_t": ("field_strength_t",),
    "ef_fraction": ("ef_fraction",),
    "ef_percent": ("ef_percent",),
}
SUFFIXES = (".nii.gz", ".nii")
STRUCTURES = {"background": BACKGROUND, "rv": RV, "myo": MYO, "lv": LV, "undrawn": NOT_DRAWN}
PHASES = ("ed", "es")
MAX_GRID_DIFFERENCE = 0.1
"""Largest distance between the corners of an image and of its mask, as a share of the smallest voxel side."""


@dataclass(frozen=True)
class Described:
    """What the table says of a name.

    Attributes:
        patient: Whose scan it is, in one spelling.
        vendor: As written.
        field_strength_t: Tesla or NaN.
        ef: Fraction or NaN.
        spelling: The patient as the table spells it, where that is another.
    """

    patient: str = field(repr=False)
    vendor: str = ""
    field_strength_t: float = math.nan
    ef: float = math.nan
    spelling: str = field(default="", repr=False)


def parse_labels(text: str) -> dict[int, int]:
    """What the numbers of a mask mean, from theirs to `fedcmr.shared.case`'s.

    Args:
        text: For example `rv=1,myo=2,lv=3`. A structure may have several numbers, `myo=2,myo=4`; numbers to be left
            out are named as background, `background=5`, or as unknown, `undrawn=255`. 0 is what was not labelled.

    Raises:
        UserError: It is not of this form, names a number twice, or does not name lv.
    """
    labels = {0: BACKGROUND}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in STRUCTURES or not number.isdecimal() or not 0 < int(number) <= 255:
            raise UserError(
                f"--labels: expected parts like lv=3, with {', '.join(STRUCTURES)} and 1 to 255, got {part!r}"
            )
        if int(number) in labels:
            raise UserError(f"--labels: {int(number)} comes twice, expected one meaning per number")
        labels[int(number)] = STRUCTURES[name]
    if LV not in labels.values():
        raise UserError("--labels: lv, the left ventricle's cavity, is missing: for example rv=1,myo=2,lv=3")
    return labels


def find_plain(source: Path, labels: Mapping[int, int] | None = None) -> Findings:
    """Patients of a plain folder.

    Args:
        source: The folder of `frames`.
        labels: From `parse_labels`; needed where there are masks.

    Raises:
        UserError: There are no frames, masks without `labels`, or the table has a mistake.
    """
    frames = _files(source / "frames")
    if not frames:
        raise UserError(f"{source / 'frames'} holds no NIfTI file: expected NAME.nii.gz, or NAME_ed and NAME_es")
    masks = _files(source / "masks")
    if masks and labels is None:
        raise UserError(f"{source / 'masks'} needs --labels: say what the numbers mean, for example rv=1,myo=2,lv=3")
    table_path = source / TABLE_NAME
    table = _read_table(table_path) if table_path.exists() else None
    studies, refused, left_out = [], Counter[str](), Counter[str]()
    for name, phases in sorted(frames.items()):
        described = Described(name) if table is None else table.get(name)
        if described is None:
            refused["not-in-table"] += 1
        elif set(phases) not in ({""}, set(PHASES)) or not set(masks.get(name, phases)) <= set(phases):
            refused["missing-file"] += 1
        else:
            read = partial(read_plain, phases, masks.get(name), dict(labels or {}), described)
            studies.append(Study(described.patient, name, read, described.spelling))
    refused["missing-file"] += len(set(table or {}) - set(frames))
    left_out["masks-without-frames"] += sum(len(masks[name]) for name in set(masks) - set(frames))
    return Findings(studies, +refused, +left_out)


def read_plain(
    frames: Mapping[str, Path], masks: Mapping[str, Path] | None, labels: Mapping[int, int], described: Described
) -> Cine:
    """One patient's stack.

    Args:
        frames: Files by phase: "" for a cine, or "ed" and "es".
        masks: The same, of two phases perhaps one; or None.
        labels: What their numbers mean.
        described: What the table says.

    Raises:
        Unusable: A file is damaged, has no orientation or another than short axis, or a mask does not fit.
    """
    images, affine = _stack(frames)
    if abs(axes_of(affine)[0] @ BASE_TO_APEX) < math.cos(math.radians(MAX_TILT_DEG)):
        raise Unusable("not-short-axis")
    labelled = None
    if masks is not None:
        numbers, mask_affine = _stack(masks)
        drawn = [phase in masks for phase in PHASES] if "ed" in frames else slice(None)
        labelled = np.zeros(images.shape, np.uint8)
        if numbers.shape != labelled[drawn].shape:
            raise Unusable("masks-differ")
        if not _same_grid(affine, mask_affine, images.shape):
            raise Unusable("masks-misaligned")
        labelled[drawn] = relabel(numbers, labels)
    x_mm, y_mm, z_mm = spacing_of(affine)
    return Cine(
        images=images.astype(np.float32),
        masks=labelled if labelled is not None and is_heart(labelled).any() else None,
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=axes_of(affine),
        vendor=vendor_name(described.vendor) if described.vendor else UNKNOWN,
        field_strength_t=field_strength(described.field_strength_t),
        ef=described.ef,
        says_vendor=says_vendor([described.vendor]),
        ends=(0, 1) if "ed" in frames else None,
    )


def _stack(files: Mapping[str, Path]) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """A cine, or those of its two phases that are there, as (T, Z, H, W), and the affine of the first."""
    volumes = [read_nifti(files[phase], oriented=True) for phase in sorted(files)]
    first, affine = volumes[0]
    if "" in files:
        if first.ndim != 4 or first.shape[3] < 2:
            raise Unusable("no-phases")
        return first.T, affine
    if first.ndim != 3 or any(array.shape != first.shape for array, _ in volumes):
        raise Unusable("masks-differ")
    if not all(_same_grid(affine, other, first.T.shape) for _, other in volumes):
        raise Unusable("masks-misaligned")
    return np.stack([array.T for array, _ in volumes]), affine


def _same_grid(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether two affines put the corners of a volume (..., Z, H, W) in the same places."""
    size = np.array(shape[:-4:-1]) - 1
    corners = np.array([[*(size * corner), 1] for corner in np.ndindex(2, 2, 2)], np.float64)
    distances_mm = np.linalg.norm(corners @ (one - other).T, axis=1)
    return bool(distances_mm.max() <= MAX_GRID_DIFFERENCE * min(spacing_of(one)))


def _files(folder: Path) -> dict[str, dict[str, Path]]:
    """NIfTI files by name and phase."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None or path.is_symlink() or not path.is_file():
            continue
        name, phase = path.name.removesuffix(suffix), ""
        for ending in ("ed", "es"):
            if name.lower().endswith("_" + ending):
                name, phase = name[:-3], ending
        # The same name as .nii and .nii.gz: which one is meant is unknown; the empty pair is refused as incomplete.
        phases = found.setdefault(name, {})
        phases[phase if phase not in phases else f"{phase} twice"] = path
    return found


def _read_table(path: Path) -> dict[str, Described]:
    """`cases.csv` by name."""
    rows = read_rows(path, COLUMNS, ["name"])
    if {"ef_fraction", "ef_percent"} <= set(rows[0][1]):
        raise UserError(
            f"{path} line 1: expected either a column ef_fraction (0.55) or a column ef_percent (55), got both"
        )
    table: dict[str, Described] = {}
    for line, row in rows:
        name = row["name"]
        if not name or name in table:
            raise UserError(
                f"{path} line {line}: column name is {'named before' if name else 'empty'}: expected one row per name"
            )
        values = {"field_strength_t": math.nan, "ef": math.nan}
        for column, cell in row.items():
            place = f"{path} line {line}: column {column}"
            if column == "field_strength_t" and cell:
                values["field_strength_t"] = plain_number(cell, place)
            elif column.startswith("ef_") and cell:
                values["ef"] = ejection_fraction(cell, place, percent=column == "ef_percent")
        spelling = row.get("patient", "")
        # Zeros are a patient here, where rows may be counted from 0.
        if spelling.strip("0") and is_placeholder(spelling):
            raise UserError(
                f"{path} line {line}: column patient holds a word for a missing number: enter one for each "
                "person, or leave the cell empty where no other name is the same person's"
            )
        patient = same_patient(spelling) or name
        table[name] = Described(patient, row.get("vendor", ""), **values, spelling=spelling * (spelling != patient))
    return table


PLAIN = Layout(
    lambda source, options, workers: find_plain(source, options.labels),
    expects="""\
frames/NAME.nii.gz (x, y, z, phase), or frames/NAME_ed.nii.gz and NAME_es.nii.gz (x, y, z); masks of the same
names in masks/ (then give --labels), or none; cases.csv with a column name, and where known patient, vendor,
field_strength_t, ef_fraction or ef_percent""",
    takes=("labels",),
)
