"""A plain layout for NIfTI files of one's own.

    frames/NAME.nii.gz                          a cine, axes (x, y, z, phase), or
    frames/NAME_ed.nii.gz, NAME_es.nii.gz       its end-diastolic and end-systolic phases, axes (x, y, z)
    masks/                                      files of the same names; optional, as a whole or for some patients
    cases.csv                                   optional; columns name, patient, vendor, field_strength_t, and
                                                ef_fraction or ef_percent

Files may lie in folders below `frames` and `masks`; where two folders hold files of one name, NAME is the path below.
NAME is a patient; where the table's column `patient` says so, several names are one. What a mask's numbers mean is said
on the command line: `--labels rv=1,myo=2,lv=3`.

Masks may be there in part. `--labels lv=1` says that the cavity alone was drawn; of NAME_ed and NAME_es one may have a
mask; a phase of a 4D mask without any label counts as not labelled; `undrawn=255` names a number of pixels about which
nothing is known. What nobody drew is unknown and not background: see `fedcmr.client.ingest.drawn`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.deidentify import same_patient
from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.files import find_named, lookup, nifti_stem, plain_files
from fedcmr.client.ingest.layouts.layout import SHORT_AXIS, Layout
from fedcmr.client.ingest.layouts.nifti import Volume, axes_of, on_grid, read_nifti, relabel, spacing_of
from fedcmr.client.ingest.layouts.tables import ejection_fraction, plain_number, read_rows
from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.client.ingest.places import Place, Tally, common_folder
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.vendor import field_strength, says_vendor, vendor_name
from fedcmr.shared.case import BACKGROUND, LV, MYO, NOT_DRAWN, PHASE_NAMES, RV, UNKNOWN, is_heart
from fedcmr.shared.errors import UserError

TABLE_NAME = "cases.csv"
COLUMNS = {
    "name": ("name",),
    "patient": ("patient", "patientid", "patient_id"),
    "vendor": ("vendor", "manufacturer"),
    "field_strength_t": ("field_strength_t",),
    "ef_fraction": ("ef_fraction",),
    "ef_percent": ("ef_percent",),
}
STRUCTURES = {"background": BACKGROUND, "rv": RV, "myo": MYO, "lv": LV, "undrawn": NOT_DRAWN}


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


def find_plain(source: Path, labels: Mapping[int, int] | None = None, axes: str | None = None) -> Findings:
    """Patients of a plain folder.

    Args:
        source: The folder of `frames`.
        labels: From `parse_labels`; needed where there are masks.
        axes: `SHORT_AXIS` where somebody knows that every stack is one, seen from the apex, whatever its header says.

    Raises:
        UserError: There are no frames, masks without `labels`, or the table has a mistake.
    """
    refused, left_out = Tally(), Tally()
    frames = _files(find_named(source, "frames"), left_out)
    if not frames and not left_out:
        left_out.add_all(_others(source))
        if not left_out:
            raise UserError(f"{source / 'frames'} holds no NIfTI file: expected NAME.nii.gz, or NAME_ed and NAME_es")
    masks = _files(find_named(source, "masks"), left_out)
    if masks and labels is None:
        raise UserError(f"{source / 'masks'} needs --labels: say what the numbers mean, for example rv=1,myo=2,lv=3")
    table_path = find_named(source, TABLE_NAME)
    table = _read_table(table_path) if table_path.exists() else None
    studies, unused, undrawn = [], set(table or {}), set(masks)
    for name, phases in sorted(frames.items()):
        row = name if table is None else lookup(name, table)
        drawn = lookup(name, masks)
        unused.discard(row or "")
        undrawn.discard(drawn or "")
        own = {} if drawn is None else masks[drawn]
        described = Described(name) if table is None or row is None else table[row]
        paths = [path for phase in phases.values() for path in phase]
        place = Place(common_folder(paths), described.spelling or described.patient)
        if row is None:
            refused.add("not-in-table", place)
        elif _twice(phases) or _twice(own):
            refused.add("same-name", place)
        elif set(phases) not in ({""}, set(PHASE_NAMES)) or not set(own) <= set(phases):
            refused.add("missing-file", place)
        else:
            read = partial(
                read_plain,
                {phase: paths[0] for phase, paths in phases.items()},
                {phase: paths[0] for phase, paths in own.items()} or None,
                dict(labels or {}),
                described,
                axes,
            )
            studies.append(Study(described.patient, name, read, described.spelling, place=place))
    for row in sorted(unused):
        refused.add("missing-file", Place("", row))
    for name in sorted(undrawn):
        for phase in masks[name].values():
            left_out.add("masks-without-frames", Place(common_folder(phase), name))
    return Findings(studies, refused, left_out)


def read_plain(
    frames: Mapping[str, Path],
    masks: Mapping[str, Path] | None,
    labels: Mapping[int, int],
    described: Described,
    axes: str | None = None,
) -> Cine:
    """One patient's stack.

    Args:
        frames: Files by phase: "" for a cine, or "ed" and "es".
        masks: The same, of two phases perhaps one; or None.
        labels: What their numbers mean.
        described: What the table says.
        axes: As in `find_plain`.

    Raises:
        Unusable: A file is damaged, has no orientation or another than short axis, or a mask does not fit.
    """
    image, *others = _volumes(frames)
    if not image.is_short_axis and axes != SHORT_AXIS:
        raise Unusable("not-short-axis" if image.knows_axes else "no-orientation")
    images = _stacked([image, *(_fitted(other, image, axes) for other in others)], "" in frames)
    labelled = None
    if masks is not None:
        numbers = _stacked([_fitted(mask, image, axes) for mask in _volumes(masks, labels=True)], "" in masks)
        drawn = [phase in masks for phase in PHASE_NAMES] if "ed" in frames else slice(None)
        labelled = np.zeros(images.shape, np.uint8)
        if numbers.shape != labelled[drawn].shape:
            raise Unusable("masks-differ")
        labelled[drawn] = relabel(numbers, labels)
    x_mm, y_mm, z_mm = spacing_of(image.affine)
    return Cine(
        images=images.astype(np.float32),
        masks=labelled if labelled is not None and is_heart(labelled).any() else None,
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=axes_of(image.affine) if image.is_short_axis else None,
        vendor=vendor_name(described.vendor) if described.vendor else UNKNOWN,
        field_strength_t=field_strength(described.field_strength_t),
        ef=described.ef,
        says_vendor=says_vendor([described.vendor]),
        ends=(0, 1) if "ed" in frames else None,
    )


def _volumes(files: Mapping[str, Path], labels: bool = False) -> list[Volume]:
    """A cine, or those of its two phases that are there, in temporal order."""
    return [read_nifti(files[phase], labels=labels) for phase in sorted(files)]


def _fitted(volume: Volume, image: Volume, axes: str | None) -> NDArray[np.generic]:
    """A mask, or another phase, as the image's array has its axes.

    Where somebody knows what the stacks are, files whose headers do not know their axes are taken as their arrays lie.

    Raises:
        Unusable: It has another shape, or covers other places.
    """
    fitted = on_grid(volume, image)
    if fitted is not None:
        return fitted.array
    lost = any(not one.knows_axes or one.is_along_axes for one in (volume, image))
    if volume.array.shape[:3] != image.array.shape[:3]:
        raise Unusable("masks-differ")
    if axes != SHORT_AXIS or not lost:
        raise Unusable("masks-misaligned" if volume.knows_axes else "no-orientation")
    return volume.array


def _stacked(arrays: Sequence[Volume | NDArray[np.generic]], is_cine: bool) -> NDArray[np.generic]:
    """A cine, or stacks of one phase each, as (T, Z, H, W)."""
    first, *others = [one.array if isinstance(one, Volume) else one for one in arrays]
    if is_cine:
        if first.ndim != 4 or first.shape[3] < 2:
            raise Unusable("no-phases")
        return first.T
    if first.ndim != 3 or any(array.shape != first.shape for array in others):
        raise Unusable("masks-differ")
    return np.stack([array.T for array in (first, *others)])


def _files(folder: Path, left_out: Tally) -> dict[str, dict[str, list[Path]]]:
    """NIfTI files by name and phase, wherever below the folder; one that stands for a name twice is in the list.

    A name is the file's; where two folders hold files of one name, it is the path below `folder`.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for path in map(Path, plain_files(folder, left_out)) if folder.is_dir() else ():
        name, phase = nifti_stem(path.name), ""
        if name is None:
            left_out.add("other-file", path)
            continue
        for ending in PHASE_NAMES:
            if name.lower().endswith("_" + ending):
                name, phase = name[:-3], ending
        found.setdefault((name, phase), []).append(path)
    scattered = {name for (name, _), paths in found.items() if len({path.parent for path in paths}) > 1}
    files: dict[str, dict[str, list[Path]]] = {}
    for (name, phase), paths in found.items():
        for path in paths:
            full = str(path.parent.relative_to(folder) / name) if name in scattered else name
            files.setdefault(full, {}).setdefault(phase, []).append(path)
    return files


def _twice(phases: Mapping[str, Sequence[Path]]) -> bool:
    """Whether a name stands for two files, as `.nii` and as `.nii.gz`: which one is meant is unknown."""
    return any(len(paths) > 1 for paths in phases.values())


def _others(source: Path) -> Tally:
    """What lies in a folder without frames."""
    left_out = Tally()
    for path in plain_files(source, left_out):
        left_out.add("other-file", path)
    return left_out


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
    lambda source, options, workers: find_plain(source, options.labels, options.axes),
    expects="""\
frames/NAME.nii.gz (x, y, z, phase), or frames/NAME_ed.nii.gz and NAME_es.nii.gz (x, y, z); masks of the same
names in masks/ (then give --labels), or none; cases.csv with a column name, and where known patient, vendor,
field_strength_t, ef_fraction or ef_percent""",
    takes=("labels", "axes"),
)
