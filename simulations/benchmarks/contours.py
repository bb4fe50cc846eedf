"""What `prepare` finds without masks, beside what people drew: the heart's place, contours and ejection fraction.

    python -m fedcmr.simulations.benchmarks.contours acdc=DIR mnms=DIR... [--labels lv=3,myo=2 plain=DIR] --json FILE

Each source is a layout of `fedcmr-client prepare` and its folder, of scans with masks. Every patient is prepared as if
there were none: the distances are those of the crop's and of the found ventricle's middle to the masks', the ejection
fraction is that of the automatic contours. With `--fold` only that fifth of ACDC's patients counts (3: the test set).
"""

import argparse
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from fedcmr.client.ingest.auto_contours import find_contours
from fedcmr.client.ingest.centring import find_centre, find_frames
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.heart_finder import find_heart
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.normalise import normalise, orient
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.case import LV, STRUCTURES, Case, CaseInfo
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.progress import track
from fedcmr.shared.version import add_version

POINTS = 100
console = Console(highlight=False)


@dataclass(frozen=True)
class Found:
    """One patient, prepared without the masks.

    Attributes:
        motion_mm: From the centre of motion to the masks' centroid.
        heart_mm: From the crop's middle to it; None where not all structures are drawn, for then it is another point.
        ventricle_mm: From the found ventricle to the drawn one; None where none was found.
        code: What became of the contours: empty for kept, else a code of `REASONS`.
        ef_error: In points, of contours that were kept; None for others.
    """

    motion_mm: float
    heart_mm: float | None
    ventricle_mm: float | None
    code: str
    ef_error: float | None


def examine(cine: Cine) -> Found:
    """Prepare a scan with masks as if it had none."""
    cine = orient(cine)
    assert cine.masks is not None
    blind = replace(cine, masks=None)
    true = normalise(cine)
    motion = find_centre(blind)
    heart = find_heart(cine.images[list(find_frames(blind, motion))], cine.spacing_mm)
    centre = motion if heart is None else heart.centre
    all_drawn = all((cine.masks == label).any() for label in STRUCTURES)
    lv = ndimage.center_of_mass((cine.masks == LV).sum(axis=(0, 1)))
    found = normalise(blind)
    case = Case(CaseInfo("nobody", "GE", math.nan, math.nan, ""), found.frames, found.masks, found.spacing_mm)
    contours = find_contours(case)
    error = POINTS * (ejection_fraction(contours.masks) - true.ef) if contours.kept else None
    return Found(
        _distance_mm(cine, motion, find_centre(cine)),
        _distance_mm(cine, centre, find_centre(cine)) if all_drawn else None,
        None if heart is None else _distance_mm(cine, heart.ventricle, lv),
        contours.code,
        error,
    )


def _distance_mm(cine: Cine, here: Any, there: Any) -> float:
    offset: NDArray[np.float64] = np.subtract(here, there) * np.array(cine.spacing_mm[1:])
    return float(np.hypot(*offset))


def summary(patients: list[Found]) -> dict[str, Any]:
    """The figures of one row; None where there is nothing to average."""
    errors = [found.ef_error for found in patients if found.ef_error is not None]
    sure = [found.ef_error for found in patients if found.ef_error is not None and not found.code]
    codes = Counter(found.code or "kept" for found in patients)
    return {
        "n_patients": len(patients),
        "motion_mm": _median_and_max([found.motion_mm for found in patients]),
        "heart_mm": _median_and_max([found.heart_mm for found in patients]),
        "ventricle_mm": _median_and_max([found.ventricle_mm for found in patients]),
        "not_found": sum(found.ventricle_mm is None for found in patients),
        "contours": dict(sorted(codes.items())),
        "n_kept": len(errors),
        "n_sure": len(sure),
        "ef_mae_points": _mean(np.abs(errors)),
        "ef_bias_points": _mean(np.array(errors)),
        "ef_mae_points_sure": _mean(np.abs(sure)),
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    return round(float(values.mean()), 3) if len(values) else None


def _median_and_max(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": round(statistics.median(known), 2), "max": round(max(known), 2)} if known else None


def read(layout: str, folder: Path, labels: dict[int, int] | None, fold: int | None) -> Iterator[Cine]:
    """The scans of a folder that have a drawn ejection fraction."""
    if layout not in LAYOUTS:
        raise UserError(f"{layout}: expected one of {', '.join(LAYOUTS)}")
    takes = LAYOUTS[layout].takes
    options = Options(
        None if fold is None or "folds" not in takes else [fold], labels if "labels" in takes else None, False, False
    )
    with Workers(1) as workers:
        studies = LAYOUTS[layout].find(folder, options, workers).studies
    for study in track(studies, f"{layout} {folder.name}"):
        cine = study.read()
        if cine.masks is not None:
            yield cine


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.contours",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("sources", nargs="+", metavar="LAYOUT=DIR", help="scans with masks")
    parser.add_argument("--labels", help="of the masks, for the plain layout")
    parser.add_argument("--fold", type=int, help="of ACDC's patients")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    labels = None if options.labels is None else dict(parse_labels(options.labels))
    rows: dict[str, list[Found]] = defaultdict(list)
    for source in options.sources:
        layout, _, folder = source.partition("=")
        for cine in read(layout, Path(folder), labels, options.fold):
            name = f"{cine.vendor} ({layout})"
            try:
                rows[name].append(examine(cine))
            except Unusable as unusable:
                rows[name].append(Found(math.nan, None, None, unusable.code, None))
    figures = {name: summary(patients) for name, patients in sorted(rows.items())}
    table = Table("patients", "motion, mm", "heart, mm", "ventricle, mm", "contours", "EF MAE", "bias", "MAE, sure")
    for name, row in figures.items():
        distances = [
            "-" if row[key] is None else f"{row[key]['median']:.1f} (max {row[key]['max']:.1f})"
            for key in ("motion_mm", "heart_mm", "ventricle_mm")
        ]
        errors = [
            "-" if row[key] is None else f"{row[key]:.1f}"
            for key in ("ef_mae_points", "ef_bias_points", "ef_mae_points_sure")
        ]
        contours = ", ".join(f"{code} {number}" for code, number in row["contours"].items())
        table.add_row(f"{name} {row['n_patients']}", *distances, contours, *errors)
    console.print(table)
    if options.json:
        write_atomically(options.json, (json.dumps({"rows": figures}, indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    raise SystemExit(main())
