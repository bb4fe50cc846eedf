"""What `prepare` finds without masks, beside what people drew: the heart's place, contours and ejection fraction.

    python -m fedcmr.simulations.benchmarks.contours acdc=DIR mnms=DIR... [--labels lv=3,myo=2 plain=DIR] --json FILE

Each source is a layout of `fedcmr-client prepare` and its folder, of scans with masks. Every patient is prepared as if
there were none: the distances are those of the crop's and of the found ventricle's middle to the masks', the ejection
fraction is that of the automatic contours. Distances to masks that lie beside the heart are left out
(`fedcmr.client.ingest.displaced`). How readers draw end-systole shows in the area of the muscle there over that at
end-diastole: a heart that contracts has more of it in a slice. With `--fold` only that fifth of ACDC's patients counts
(3: the test set).
"""

import argparse
import json
import math
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
from fedcmr.client.ingest.displaced import fit_of_contours
from fedcmr.client.ingest.heart_finder import find_heart
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.normalise import normalise, orient
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.case import ED, ES, LV, MYO, STRUCTURES, Case, CaseInfo
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.progress import track
from fedcmr.shared.version import add_version

POINTS = 100
FAR_MM = 10.0
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
        displaced: Whether the masks lie beside the heart.
        thickening: The muscle's area at end-systole over that at end-diastole, drawn and found, in the slices that have
            cavity and muscle in all of them; None where there is no such slice.
    """

    motion_mm: float
    heart_mm: float | None
    ventricle_mm: float | None
    code: str
    ef_error: float | None
    displaced: bool = False
    thickening: tuple[float, float] | None = None


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
    fit = fit_of_contours(cine)
    return Found(
        _distance_mm(cine, motion, find_centre(cine)),
        _distance_mm(cine, centre, find_centre(cine)) if all_drawn else None,
        None if heart is None else _distance_mm(cine, heart.ventricle, lv),
        contours.code,
        error,
        fit is not None and fit.is_displaced,
        thickening(true.masks, contours.masks),
    )


def thickening(drawn: NDArray[np.uint8], found: NDArray[np.uint8]) -> tuple[float, float] | None:
    """See `Found`; masks of shape (2, Z, H, W), of the same slices."""
    cavity, muscle = (np.stack([(m == label).sum(axis=(2, 3)) for m in (drawn, found)]) for label in (LV, MYO))
    in_all = ((cavity > 0) & (muscle > 0)).all(axis=(0, 1))
    if not in_all.any():
        return None
    of_drawn, of_found = muscle[..., in_all].sum(axis=2)
    return float(of_drawn[ES] / of_drawn[ED]), float(of_found[ES] / of_found[ED])


def _distance_mm(cine: Cine, here: Any, there: Any) -> float:
    offset: NDArray[np.float64] = np.subtract(here, there) * np.array(cine.spacing_mm[1:])
    return float(np.hypot(*offset))


def summary(patients: list[Found]) -> dict[str, Any]:
    """The figures of one row; None where there is nothing to average."""
    errors = [found.ef_error for found in patients if found.ef_error is not None]
    sure = [found.ef_error for found in patients if found.ef_error is not None and not found.code]
    codes = Counter(found.code or "kept" for found in patients)
    placed = [found for found in patients if not found.displaced]
    return {
        "n_patients": len(patients),
        "motion_mm": _distances([found.motion_mm for found in placed]),
        "heart_mm": _distances([found.heart_mm for found in placed]),
        "ventricle_mm": _distances([found.ventricle_mm for found in placed]),
        "displaced": len(patients) - len(placed),
        "not_found": sum(found.ventricle_mm is None for found in patients),
        "contours": dict(sorted(codes.items())),
        "thickening": _thickening([found.thickening for found in patients if found.thickening is not None]),
        "n_kept": len(errors),
        "n_sure": len(sure),
        "ef_mae_points": _mean(np.abs(errors)),
        "ef_bias_points": _mean(np.array(errors)),
        "ef_mae_points_sure": _mean(np.abs(sure)),
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    return round(float(values.mean()), 3) if len(values) else None


def _thickening(patients: list[tuple[float, float]]) -> dict[str, float] | None:
    """Medians of drawn and found muscle, and the share of the patients whose drawn muscle shrinks."""
    if not patients:
        return None
    drawn, found = np.array(patients).T
    medians = np.median([drawn, found], axis=1).round(3).tolist()
    return {"drawn": medians[0], "found": medians[1], "drawn_shrinks": round(float((drawn < 1).mean()), 3)}


def _distances(values: list[float | None]) -> dict[str, float] | None:
    """Median, 95th percentile, largest, and how many are `FAR_MM` or more; NaN, of unusable scans, does not count."""
    known = np.array([value for value in values if value is not None and not math.isnan(value)])
    if not len(known):
        return None
    median, high, largest = np.percentile(known, (50, 95, 100)).round(2).tolist()
    return {"median": median, "p95": high, "max": largest, "far": int((known >= FAR_MM).sum())}


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
    table.caption = "distances: median, 95th percentile, largest, patients at 10 mm or more"
    for name, row in figures.items():
        distances = [
            "-" if row[key] is None else "{median:.1f}, {p95:.1f}, {max:.1f}, {far}".format(**row[key])
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
