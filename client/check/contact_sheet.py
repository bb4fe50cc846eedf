"""A case as one small image: the middle slice at ED and at ES, and the masks' contours as vectors to lay over it."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from contourpy import LineType, contour_generator
from numpy.typing import NDArray
from PIL import Image

from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, Case

GAP_PIXELS = 2
"""Between the two frames."""
JPEG_QUALITY = 80
"""Some 4 kB a case: 500 cases make a report of a few megabytes."""


@dataclass(frozen=True)
class CaseImage:
    """ED at the left, ES at the right.

    Attributes:
        uri: A JPEG as a data URI, `width` x `height` pixels.
        contours: {"lv" | "myo" | "rv" | "undrawn": path data (SVG 1.1, 8.3) in half pixels}; of the cavity, the wall's
            outer border, the right ventricle, and what nobody drew. Labels that the slice does not show are not there.
        slice_number: The slice, from 1.
        width: Pixels.
        height: Pixels.
    """

    uri: str
    contours: dict[str, str]
    slice_number: int
    width: int
    height: int


def image_of(case: Case) -> CaseImage:
    """The middle one of the slices that show the left ventricle in both phases, else in one, else of all."""
    cavity = (case.masks == LV).any(axis=(2, 3))
    shown = np.flatnonzero(cavity.all(axis=0) if cavity.all(axis=0).any() else cavity.any(axis=0))
    index = int(shown[len(shown) // 2]) if shown.size else case.frames.shape[1] // 2
    frames, masks = case.frames[:, index], case.masks[:, index]
    height, width = frames.shape[1:]
    sheet = np.zeros((height, 2 * width + GAP_PIXELS), np.uint8)
    paths: dict[str, list[str]] = {"undrawn": [], "lv": [], "myo": [], "rv": []}
    for phase in (ED, ES):
        left = phase * (width + GAP_PIXELS)
        sheet[:, left : left + width] = np.round(frames[phase] * 255)
        mask = masks[phase]
        areas = {"lv": mask == LV, "myo": (mask == MYO) | (mask == LV), "rv": mask == RV, "undrawn": mask == NOT_DRAWN}
        if not (mask == MYO).any():
            del areas["myo"]  # the cavity's border alone is no wall
        for name, area in areas.items():
            paths[name] += _outlines(area, left)
    contours = {name: "".join(lines) for name, lines in paths.items() if lines}
    return CaseImage(_jpeg(sheet), contours, index + 1, sheet.shape[1], sheet.shape[0])


def _outlines(area: NDArray[np.bool_], left: int) -> list[str]:
    """Closed curves half-way between pixels inside and outside, moved to the right by `left`."""
    if not area.any():
        return []
    # A border of background closes curves at the image's edge; a pixel's middle is half a pixel from its corner.
    lines = contour_generator(z=np.pad(area.astype(float), 1), line_type=LineType.Separate).lines(0.5)
    corner = np.array([left - 0.5, -0.5])
    return [_path(np.rint(2 * (line + corner)).astype(int)) for line in lines]


def _path(points: NDArray[np.int_]) -> str:
    """A closed curve through points (x, y), its straight stretches as one step each, relative to the last point."""
    steps = np.diff(points, axis=0)
    # A label's border runs straight or at 45 degrees, in equal steps.
    ends = np.flatnonzero(np.r_[(steps[1:] != steps[:-1]).any(axis=1), True])
    moves = np.diff(points[np.r_[0, ends + 1]], axis=0)[:-1]  # the last one is what Z draws
    return f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{x} {y}" for x, y in moves).replace(" -", "-") + "Z"


def _jpeg(sheet: NDArray[np.uint8]) -> str:
    """A greyscale image as a data URI."""
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
