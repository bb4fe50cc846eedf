"""The contours of the best and the worst segmented patients of each vendor: the readers' and the network's.

Readers' contours are solid and Okabe & Ito's sky blue, the network's dashed and their orange: a pair that every kind of
colour vision tells apart, in two line styles for whoever sees no colour. Both have a dark rim, so that they show on
bright blood as on dark lung. An image carries a vendor and figures, never a pseudonym, a group or a date.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from contourpy import contour_generator
from numpy.typing import NDArray

from fedcmr.server.experiments.models import TestSets, model_path
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.formatting import figure, signed
from fedcmr.server.report.figures import png
from fedcmr.server.report.theme import data_uri
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.tasks.segmentation.scores import per_patient
from fedcmr.shared.case import LV, MYO, RV, Case, is_heart
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter

NUM_SLICES = 3
MARGIN_MM, GAP_MM = 14.0, 3.0
READERS, FOUND = "#56b4e9", "#e69f00"
DASH = "3.6 2.2"
LINE_MM, RIM_MM = 1.1, 2.0
OUTLINES = ((LV,), (MYO, LV), (RV,))
"""Labels within each contour: the cavity, the muscle's outer border, the right ventricle."""
NAMES = {"lv": "LV", "myo": "muscle", "rv": "RV", "mean": "mean"}


@dataclass(frozen=True)
class OutlinedPatient:
    """A test patient whose contours are shown.

    Attributes:
        kind: "Best" or "Worst" of the vendor's patients by Dice.
        vendor: Manufacturer of the scanner.
        images: Shape (S, 2, H, W) in [0, 1], slices from one end of the heart to the other.
        drawn: Labels of the readers, of the same shape.
        found: Labels of the network, of the same shape.
        pixel_mm: Distance of rows and of columns.
        figures: Dice and error of the ejection fraction, in words.
    """

    kind: str
    vendor: str
    images: NDArray[np.floating]
    drawn: NDArray[np.uint8]
    found: NDArray[np.uint8]
    pixel_mm: tuple[float, float]
    figures: str


def outlined_patients(
    run: RunFolder, held_out: TestSets, predictions: Mapping[str, Mapping[str, Any]]
) -> list[OutlinedPatient]:
    """The best and the worst test patient of each vendor, with what the run's segmenter finds on them.

    Args:
        run: The run.
        held_out: The segmentation's test sets whose patients may be shown.
        predictions: {test set: the main segmenter's vendors and `per_patient`}.

    Returns:
        By vendor, the best first. Empty where the segmenter is missing; without sets whose predictions are of other
        patients.
    """
    known = [
        (name, cases)
        for name, cases in held_out
        if name in predictions and predictions[name]["vendors"] == [case.info.vendor for case in cases]
    ]
    cases = [case for _, of_set in known for case in of_set]
    overlap = np.concatenate([_overlaps(predictions[name]) for name, _ in known]) if known else np.zeros(0)
    chosen = best_and_worst([case.info.vendor for case in cases], overlap)
    try:
        segmenter = load_segmenter(model_path(run, "segmentation", MAIN_MODEL)) if chosen else None
    except UserError:
        return []
    if segmenter is None:
        return []
    segmenter = segmenter.to(pick_device(run.config.device))
    return [_outlined(kind, cases[i], predict_masks(segmenter, [cases[i]])[0].numpy()) for kind, i in chosen]


def best_and_worst(vendors: Sequence[str], overlap: NDArray[np.floating]) -> list[tuple[str, int]]:
    """Each vendor's patients of the largest and of the smallest overlap; of one patient alone it is the worst.

    Args:
        vendors: Shape (N,).
        overlap: Shape (N,); who has NaN is not chosen.

    Returns:
        "Best" or "Worst" and the patient's index, vendors in alphabetical order.
    """
    chosen = []
    for vendor in sorted(set(vendors)):
        own = [i for i, name in enumerate(vendors) if name == vendor and math.isfinite(overlap[i])]
        own.sort(key=lambda i: -overlap[i])
        chosen += [("Best", own[0])] if len(own) > 1 else []
        chosen += [("Worst", own[-1])] if own else []
    return chosen


def outline_sheet(patient: OutlinedPatient) -> str:
    """One column per slice, end-diastole above end-systole, under both contours; an SVG as a data URI."""
    rows, columns = _window(patient)
    row_mm, column_mm = patient.pixel_mm
    height, width = (rows.stop - rows.start) * row_mm, (columns.stop - columns.start) * column_mm
    num = len(patient.images)
    parts = []
    for k in range(num):
        for phase in (0, 1):
            here = np.s_[k, phase, rows, columns]
            grey = np.clip(patient.images[here], 0, 1)
            pixels = np.dstack([grey, grey, grey, np.ones_like(grey)])
            x, y = k * (width + GAP_MM), phase * (height + GAP_MM)
            parts.append(
                f'<svg x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
                f'<image width="{width:.2f}" height="{height:.2f}" preserveAspectRatio="none" href="{png(pixels)}"/>'
                + _lines(patient.drawn[here], patient.pixel_mm, READERS, "")
                + _lines(patient.found[here], patient.pixel_mm, FOUND, f' stroke-dasharray="{DASH}"')
                + "</svg>"
            )
    size = (num * (width + GAP_MM) - GAP_MM, 2 * height + GAP_MM)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:.2f} {size[1]:.2f}"'
    head += f' width="{4 * size[0]:.0f}" height="{4 * size[1]:.0f}">'
    return data_uri("image/svg+xml", f"{head}{''.join(parts)}</svg>".encode())


def outlines(labels: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Contours of one slice, closed polygons of shape (N, 2), x and y in pixels; the centre of the first is (0, 0).

    The muscle has its outer border, where there is muscle at all; its inner one is the cavity's.
    """
    lines = []
    for inside in OUTLINES:
        if (labels == inside[0]).any():
            filled = np.pad(np.isin(labels, inside), 1).astype(float)  # so that every contour is closed
            lines += [np.asarray(line, np.float64) - 1 for line in contour_generator(z=filled).lines(0.5)]
    return lines


def _lines(labels: NDArray[np.uint8], pixel_mm: tuple[float, float], colour: str, style: str) -> str:
    """SVG paths of all contours of a slice: a dark rim, then the line."""
    row_mm, column_mm = pixel_mm
    path = ""
    for line in outlines(labels):
        points = " ".join(f"{(x + 0.5) * column_mm:.2f},{(y + 0.5) * row_mm:.2f}" for x, y in line[:-1])
        path += f"M{points}Z"
    if not path:
        return ""
    rim = f'<path d="{path}" fill="none" stroke="#000" stroke-opacity="0.45" stroke-width="{RIM_MM}"{style}/>'
    return f'{rim}<path d="{path}" fill="none" stroke="{colour}" stroke-width="{LINE_MM}"{style}/>'


def _window(patient: OutlinedPatient) -> tuple[slice, slice]:
    """Rows and columns of a square, in millimetres, around what readers drew."""
    heart = is_heart(patient.drawn).any(axis=(0, 1))
    spans = [np.flatnonzero(heart.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]
    half = max((last - first + 1) * mm for (first, last), mm in zip(spans, patient.pixel_mm, strict=True)) / 2
    windows = []
    for (first, last), mm, size in zip(spans, patient.pixel_mm, heart.shape, strict=True):
        reach = min((half + MARGIN_MM) / mm, size / 2)
        start = int(np.clip(round((first + last + 1) / 2 - reach), 0, size - round(2 * reach)))
        windows.append(slice(start, start + round(2 * reach)))
    return windows[0], windows[1]


def _outlined(kind: str, case: Case, found: NDArray[np.uint8]) -> OutlinedPatient:
    with_heart = np.flatnonzero((case.masks == LV).any(axis=(0, 2, 3)) | is_heart(case.masks).all(axis=0).any((1, 2)))
    if not len(with_heart):
        with_heart = np.flatnonzero(is_heart(case.masks).any(axis=(0, 2, 3)))
    places = ((np.arange(NUM_SLICES) + 0.5) * len(with_heart) / NUM_SLICES).astype(int)
    chosen = with_heart[sorted(set(places.tolist()))]
    images, drawn, shown = case.frames[:, chosen], case.masks[:, chosen], found[:, chosen]
    pixel_mm = (float(case.spacing_mm[1]), float(case.spacing_mm[2]))
    values = {name: float(column[0]) for name, column in per_patient([case], [torch.from_numpy(found)]).items()}
    return OutlinedPatient(
        kind,
        case.info.vendor,
        images.swapaxes(0, 1),
        drawn.swapaxes(0, 1),
        shown.swapaxes(0, 1),
        pixel_mm,
        in_words(values),
    )


def in_words(values: Mapping[str, float]) -> str:
    """A patient's Dice of what is drawn, and the error of the ejection fraction."""
    dice = [f"{name} {figure(values[f'dice/{key}'], 2)}" for key, name in NAMES.items() if values[f"num_phases/{key}"]]
    text = f"Dice: {', '.join(dice)}"
    if not values["num_phases/ef"]:
        return text
    error = values["ef_bias_points"]
    return text + (f"; EF {signed(error, 1)} points" if math.isfinite(error) else "; EF undefined: no cavity found")


def _overlaps(values: Mapping[str, Any]) -> NDArray[np.float64]:
    """The mean Dice of every patient over the structures that are drawn; shape (N,)."""
    columns: Iterable[Any] = (values[f"dice/{name}"] for name in ("lv", "myo", "rv"))
    of_structures = np.array([np.asarray(column, np.float64) for column in columns])
    known = np.isfinite(of_structures)
    with np.errstate(invalid="ignore"):
        return np.where(known, of_structures, 0).sum(axis=0) / known.sum(axis=0)
