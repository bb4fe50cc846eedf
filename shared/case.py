"""The one on-disk and in-memory form of a patient: two frames, their masks, spacing, vendor.

A folder of cases is `cases.csv` (one row per patient, no identifiers) and `cases/<pseudonym>.npz`.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder, private_opener
from fedcmr.shared.plain_files import MIB, read_plain

BACKGROUND, RV, MYO, LV = 0, 1, 2, 3
STRUCTURES = (RV, MYO, LV)
NOT_DRAWN = 255
"""Label of a pixel about which nobody said anything: it is not background, and may be any structure.

In a frame where only some structures are drawn, their pixels keep their labels and all others are `NOT_DRAWN`, because
each may belong to a structure that nobody drew. One label per pixel cannot say more: that a pixel next to a drawn
cavity is certainly no cavity, and perhaps muscle or background, is lost.
"""
ED, ES = 0, 1
PHASE_NAMES = ("ed", "es")

VENDORS = ("Siemens", "Philips", "GE", "Canon", "United Imaging")
UNKNOWN = "unknown"
"""In the place of a vendor that is none of these, or that nobody knows."""
SEXES = ("F", "M")
CONTOURS = ("drawn", "partial", "auto")
"""Where a case's masks come from: everything is drawn in both frames (or known, in a synthetic heart), a part of it is
drawn, or a program found it. Empty where there are no masks."""

CASE_SIZE = 128
"""Height and width of a case's frames in pixels."""
CASE_PIXEL_MM = 1.25
"""In-plane pixel of a case: 128 pixels show 160 mm, a dilated heart with its right ventricle and some
of the chest wall. Folders of earlier versions have 96 pixels of 1.5 mm, and are read as they are."""

INDEX_NAME = "cases.csv"
MAX_INDEX_BYTES = 64 * MIB
"""Half a million patients."""
PSEUDONYM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
PATHOLOGY = re.compile(r"[A-Za-z0-9+_-]{1,16}")
"""A short code such as DCM: never free text, which may hold a name."""


def known_vendor(text: str) -> str:
    """The vendor that a text names in any case, with spaces, dashes or underscores; the text itself where none."""
    spelt = {vendor.casefold(): vendor for vendor in VENDORS}
    return spelt.get(" ".join(text.casefold().replace("-", " ").replace("_", " ").split()), text)


@dataclass(frozen=True)
class CaseInfo:
    """A row of `cases.csv`; folders of earlier versions do not have the last columns.

    Attributes:
        pseudonym: Letters, digits, `_` and `-`; also the name of the case's file.
        vendor: One of `VENDORS`, or `UNKNOWN`.
        field_strength_t: Tesla; NaN where unknown.
        ef: Left-ventricular ejection fraction in [0, 1]; NaN where unknown.
        group: Split-safe group id: cases of one patient share it, so a split by group never divides a patient.
        sex: One of `SEXES`; empty where unknown.
        pathology: Short code of the patient's group, as `PATHOLOGY`; empty where unknown.
        contours: One of `CONTOURS`; empty where the case has no masks, and until the case is read in rows of earlier
            versions.
    """

    pseudonym: str
    vendor: str
    field_strength_t: float
    ef: float
    group: str
    sex: str = ""
    pathology: str = ""
    contours: str = ""

    def __post_init__(self) -> None:
        if self.sex not in ("", *SEXES):
            raise ValueError(f"Expected a sex in {SEXES}, or an empty one.")
        if self.pathology and not PATHOLOGY.fullmatch(self.pathology):
            raise ValueError(f"Expected a pathology that matches {PATHOLOGY.pattern}, or an empty one.")
        if self.contours not in ("", *CONTOURS):
            raise ValueError(f"Expected contours in {CONTOURS}, or empty ones.")


@dataclass(frozen=True)
class Case:
    """One patient's end-diastolic and end-systolic short-axis stacks.

    Attributes:
        info: The patient's row of `cases.csv`.
        frames: Shape (2, Z, H, W), float32 in [0, 1], ED then ES, slices from base to apex where that is known.
        masks: Shape (2, Z, H, W), uint8: 0 background, 1 RV, 2 myocardium, 3 LV cavity, 255 where nobody drew
            (`NOT_DRAWN`). All zero where the case has no masks.
        spacing_mm: Shape (3,), float32: z, y, x.
    """

    info: CaseInfo
    frames: NDArray[np.float32]
    masks: NDArray[np.uint8]
    spacing_mm: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[0] != 2 or self.frames.dtype != np.float32:
            raise ValueError(f"Expected frames float32 (2, Z, H, W), got {self.frames.dtype} {self.frames.shape}.")
        if self.masks.shape != self.frames.shape or self.masks.dtype != np.uint8:
            raise ValueError(f"Expected masks uint8 {self.frames.shape}, got {self.masks.dtype} {self.masks.shape}.")
        if not np.isfinite(self.frames).all() or self.frames.min() < 0 or self.frames.max() > 1:
            raise ValueError("Expected finite frames in [0, 1].")
        if self.masks.max(initial=0) > LV and (other := self.masks[(self.masks > LV) & (self.masks != NOT_DRAWN)]).size:
            raise ValueError(f"Expected mask labels 0..{LV} or {NOT_DRAWN}, got {other[0]}.")
        if self.spacing_mm.shape != (3,) or not ((self.spacing_mm > 0) & np.isfinite(self.spacing_mm)).all():
            raise ValueError("Expected a positive, finite spacing_mm of shape (3,).")


def is_heart(masks: Any) -> Any:
    """Where an array or tensor of labels has a structure: neither background nor `NOT_DRAWN`; bool of its shape."""
    return (masks > BACKGROUND) & (masks <= LV)


def contours_of(masks: NDArray[np.uint8]) -> str:
    """What people drew of a case, one of `CONTOURS`; empty where there are no masks."""
    if not is_heart(masks).any():
        return ""
    return "partial" if (masks == NOT_DRAWN).any() else "drawn"


def save_case(folder: Path, case: Case, private: bool = True) -> Path:
    """Write `folder/cases/<pseudonym>.npz` atomically; the index is written by `write_index`.

    Args:
        folder: Made where it is missing.
        case: The patient.
        private: Whether only this account may read it, whatever the umask; False for synthetic cases to be released.
    """
    if not PSEUDONYM.fullmatch(case.info.pseudonym):
        raise ValueError(f"Expected a pseudonym of letters, digits, '_', '-', got {case.info.pseudonym!r}.")
    path = folder / "cases" / f"{case.info.pseudonym}.npz"
    _make_folder(path.parent, private)
    partial = path.with_suffix(".partial")
    with open(partial, "wb", opener=private_opener if private else None) as file:
        write_arrays(file, case)
    partial.replace(path)
    return path


def write_arrays(file: BinaryIO, case: Case) -> None:
    """Write a case's file; equal cases give equal bytes."""
    np.savez_compressed(file, frames=case.frames, masks=case.masks, spacing_mm=case.spacing_mm)


def write_index(folder: Path, infos: Sequence[CaseInfo], private: bool = True) -> None:
    """Write `folder/cases.csv`, sorted by pseudonym, atomically; `private` as in `save_case`."""
    _make_folder(folder, private)
    partial = folder / (INDEX_NAME + ".partial")
    opener = private_opener if private else None
    with open(partial, "w", newline="", encoding="utf-8", opener=opener) as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(CaseInfo)])
        for info in sorted(infos, key=lambda info: info.pseudonym):
            writer.writerow(
                [
                    info.pseudonym,
                    info.vendor,
                    _number(info.field_strength_t),
                    _number(info.ef),
                    info.group,
                    info.sex,
                    info.pathology,
                    info.contours,
                ]
            )
    partial.replace(folder / INDEX_NAME)


def read_index(folder: Path) -> list[CaseInfo]:
    """Read `folder/cases.csv`.

    Raises:
        UserError: The folder or its index is missing, or a row cannot be read.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {INDEX_NAME}: prepare it with 'fedcmr-client prepare' first")
    try:
        text = read_plain(path, MAX_INDEX_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is not a readable table: prepare the folder again") from None
    infos = []
    for line, row in enumerate(rows, start=2):
        try:
            info = CaseInfo(
                row["pseudonym"],
                row["vendor"],
                float(row["field_strength_t"] or "nan"),
                float(row["ef"] or "nan"),
                row["group"],
                row.get("sex") or "",
                row.get("pathology") or "",
                row.get("contours") or "",
            )
            if not PSEUDONYM.fullmatch(info.pseudonym) or not (math.isnan(info.ef) or 0 <= info.ef <= 1):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} line {line} is not a case's row: prepare the folder again") from None
        infos.append(info)
    return infos


def load_case(folder: Path, info: CaseInfo) -> Case:
    """Read one case; what its masks are follows from them where the index does not say it.

    Raises:
        UserError: Its file is missing or is not a case.
    """
    path = folder / "cases" / f"{info.pseudonym}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            masks = arrays["masks"]
            known = info if info.contours else replace(info, contours=contours_of(masks))
            return Case(known, arrays["frames"], masks, arrays["spacing_mm"])
    except FileNotFoundError:
        raise UserError(f"{path} is missing although {INDEX_NAME} names it: prepare the folder again") from None
    except Exception as error:  # over a damaged file zipfile, zlib and numpy raise a dozen kinds between them
        raise UserError(f"{path} is not a readable case ({type(error).__name__}): prepare the folder again") from None


def fingerprint(case: Case) -> str:
    """SHA-256 of a case's frames, by which the same scan, prepared alike, is known again."""
    return hashlib.sha256(case.frames.astype("<f4").tobytes()).hexdigest()


def load_cases(folder: str | Path) -> list[Case]:
    """Read a folder of cases: a run's `synthetic`, or what `fedcmr-client prepare` wrote.

    Args:
        folder: Holds `cases.csv` and `cases/`.

    Returns:
        The patients in the order of `cases.csv`; `Case` and `CaseInfo` give shapes and units.

    Raises:
        UserError: The folder, its index or a case is missing or cannot be read.
    """
    folder = Path(folder)
    return [load_case(folder, info) for info in read_index(folder)]


def _make_folder(folder: Path, private: bool) -> None:
    if private:
        private_folder(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)


def _number(value: float) -> str:
    """A float for the CSV; empty where unknown."""
    return "" if math.isnan(value) else f"{value:.6g}"
