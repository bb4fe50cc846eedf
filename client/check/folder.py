"""The check of a folder of prepared cases: what it holds, what training could not use, what a person should check."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedcmr.client.check.contact_sheet import image_of
from fedcmr.client.check.flags import flags_of
from fedcmr.client.check.html_report import render_html
from fedcmr.client.check.report import MIN_FIELD_MM, TROUBLES, CheckedCase, CheckReport, as_json
from fedcmr.client.ingest.destination import DETAILS_NAME, REFUSED_NAME
from fedcmr.client.ingest.normalise import MAX_EF_DIFFERENCE
from fedcmr.client.ingest.refused_list import LIST_NAME
from fedcmr.client.trainable import LEFT_OUT, reason_of, repeated_names, trains_the_generator
from fedcmr.shared.case import (
    INDEX_NAME,
    LV,
    UNKNOWN,
    VENDORS,
    Case,
    CaseInfo,
    contours_of,
    is_heart,
    load_case,
    read_index,
)
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import track
from fedcmr.shared.views import grid_of

JSON_NAME, HTML_NAME = "check.json", "check.html"
REMEDY = "remove the files of these cases and prepare the folder again"


def check(folder: Path) -> CheckReport:
    """Read every case of a folder once, and what `prepare` wrote about it.

    Raises:
        UserError: `prepare` has not worked on the folder, or its index or its counts cannot be read.
    """
    refused = _read_json(folder / REFUSED_NAME)
    details = _read_json(folder / DETAILS_NAME)
    # Where nothing was usable there is no index: the counts say why.
    infos = [] if refused and not (folder / INDEX_NAME).exists() else read_index(folder)
    repeated = repeated_names(infos)
    cases = [
        _checked(folder, info, info.pseudonym in repeated, details.get(info.pseudonym))
        for info in track(infos, "checking cases")
    ]
    counts = [_reason_counts(refused.get(kind)) for kind in ("studies", "left_out", "warnings")]
    return CheckReport(tuple(cases), *counts)


def write_report(folder: Path, report: CheckReport) -> None:
    """Write `folder/check.json` and the report `folder/check.html`, each whole or not at all."""
    text = json.dumps(as_json(report), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / JSON_NAME, text.encode())
    has_list = (folder / LIST_NAME).is_file()
    write_atomically(folder / HTML_NAME, render_html(report, LIST_NAME if has_list else None).encode())


def complain(folder: Path, report: CheckReport) -> None:
    """Nothing for a folder that training can use as it is.

    Raises:
        UserError: It holds no case, damaged ones, or none that can be trained on; with all reasons by count.
    """
    if not report.cases:
        raise UserError(f"{folder} holds no case: prepare it with 'fedcmr-client prepare' first")
    if report.num_unusable:
        troubles = "; ".join(f"{number}: {TROUBLES[code]}" for code, number in report.troubles.items())
        raise UserError(
            f"{folder}: {report.num_unusable} of {report.num_cases} cases cannot be used ({troubles}): {REMEDY}"
        )
    if not report.trainable:
        reasons = "; ".join(f"{code} {number}: {LEFT_OUT[code]}" for code, number in report.not_trained.items())
        raise UserError(f"{folder}: nothing here can be trained on yet ({reasons})")


def _checked(folder: Path, info: CaseInfo, repeated: bool, details: Any) -> CheckedCase:
    """One row of the index and its file."""
    noted = details if isinstance(details, dict) else {}
    phases = {name: _count(noted.get(name)) for name in ("num_phases", "ed_phase", "es_phase")}
    warnings = noted.get("warnings")
    warnings = [str(code) for code in warnings] if isinstance(warnings, list) else []
    row: dict[str, Any] = {
        "pseudonym": info.pseudonym,
        "group": info.group,
        "vendor": info.vendor if info.vendor in VENDORS else UNKNOWN,
        "field_strength_t": None if math.isnan(info.field_strength_t) else info.field_strength_t,
        "ef": None if math.isnan(info.ef) else info.ef,
        "sex": info.sex or None,
        "pathology": info.pathology or None,
        **phases,
    }
    if not (folder / "cases" / f"{info.pseudonym}.npz").is_file():
        return CheckedCase(**row, flags=tuple(warnings), trouble="case-missing", left_out="case-missing")
    try:
        case = load_case(folder, info)
    except UserError:
        return CheckedCase(**row, flags=tuple(warnings), trouble="case-unreadable", left_out="case-unreadable")
    trouble = "named-twice" if repeated else _trouble(case)
    left_out = "named-twice" if repeated else reason_of(case, None)
    drawn = contours_of(case.masks)
    return CheckedCase(
        **row,
        num_slices=case.frames.shape[1],
        slice_spacing_mm=round(float(case.spacing_mm[0]), 3),
        contours=info.contours if drawn and info.contours == "auto" else drawn,
        trains_the_generator=left_out is None and trains_the_generator(case),
        flags=(*flags_of(case), *warnings),
        trouble=trouble,
        left_out=left_out,
        image=image_of(case),
    )


def _trouble(case: Case) -> str | None:
    """What is wrong with a case, a code of `TROUBLES`."""
    if case.info.vendor not in (*VENDORS, UNKNOWN):
        return "other-vendor"
    if (np.array(case.frames.shape[2:]) * grid_of(case)).min() < MIN_FIELD_MM:
        return "wrong-size"
    if any(float(np.ptp(frame)) == 0 for frame in case.frames):
        return "no-contrast"
    if not is_heart(case.masks).any():
        return None
    if not (case.masks == LV).any() or (contours_of(case.masks) != "partial" and not _has_cavity(case)):
        return "no-left-ventricle"
    ef = math.nan if case.info.contours == "auto" else ejection_fraction(case.masks)
    if not math.isnan(ef) and not abs(ef - case.info.ef) <= MAX_EF_DIFFERENCE:
        return "ef-differs"
    return None


def _has_cavity(case: Case) -> bool:
    """Whether both frames show the left ventricle."""
    return bool((case.masks == LV).any(axis=(1, 2, 3)).all())


def _read_json(path: Path) -> dict[str, Any]:
    """An object that `prepare` wrote; empty where it wrote none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: prepare the folder again")
    return content


def _reason_counts(counts: Any) -> dict[str, int]:
    """Counts by reason code, those above 0."""
    counts = counts if isinstance(counts, dict) else {}
    return {code: number for code, number in sorted(counts.items()) if _count(number)}


def _count(value: Any) -> int | None:
    """A whole number from 0; anything else is unknown."""
    return value if type(value) is int and value >= 0 else None
