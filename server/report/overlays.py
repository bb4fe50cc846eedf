"""Saliency maps as overlays: heat over the scan, the heart's outline around it.

The colours are Matplotlib's inferno from its middle up, which is even in lightness and legible without red and green;
places of low saliency stay grey. The outline is Okabe & Ito's sky blue, which inferno does not hold.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.server.report.figures import png
from fedcmr.server.tasks.ejection_fraction.saliency import SYNTHETIC, Attribution

NUM_SHOWN = 5
"""Patients per vendor and row."""
ZOOM = 2
COLOURS, FIRST_COLOUR = "inferno", 0.35
OUTLINE = (0.337, 0.706, 0.914)
MAX_OPACITY = 0.75
BRIGHTEST = 99.5
"""Percentile of a map that has the full colour: one pixel alone must not darken the rest."""


@dataclass(frozen=True)
class OverlayRow:
    """Some patients of one vendor, synthetic or from a test set.

    Attributes:
        kind: "synthetic" or "real", the latter for every test patient.
        attributions: At most `NUM_SHOWN`, by ejection fraction.
    """

    kind: str
    attributions: Sequence[Attribution]


def overlay_rows(
    attributions: Mapping[str, Sequence[Attribution]], shown: Collection[str]
) -> dict[str, list[OverlayRow]]:
    """Per vendor its row of test patients, where they may be shown, then its synthetic one.

    Args:
        attributions: What `fedcmr.server.tasks.ejection_fraction.saliency.study_attributions` returned.
        shown: The test sets whose patients' images may appear.
    """
    tested = [one for name, found in attributions.items() if name != SYNTHETIC for one in found if name in shown]
    rows: dict[str, list[OverlayRow]] = {}
    for kind, patients in (("real", tested), (SYNTHETIC, attributions.get(SYNTHETIC, ()))):
        for vendor in {one.vendor for one in patients}:
            by_ef = sorted((one for one in patients if one.vendor == vendor), key=lambda one: one.ef)
            places = np.linspace(0, len(by_ef) - 1, min(NUM_SHOWN, len(by_ef))).round().astype(int)
            rows.setdefault(vendor, []).append(OverlayRow(kind, [by_ef[place] for place in places]))
    return dict(sorted(rows.items()))


def overlay_sheet(attributions: Sequence[Attribution]) -> str:
    """One column per patient, end-diastole above end-systole, under the one map that belongs to both.

    Returns:
        A PNG as a data URI.
    """
    columns = [
        [overlay(one.image[phase], one.saliency, one.masks[phase] > 0) for phase in (0, 1)] for one in attributions
    ]
    height, width = columns[0][0].shape[:2]
    gap = 2 * ZOOM
    sheet = np.zeros((2 * height + gap, len(columns) * (width + gap) - gap, 4))
    for i, column in enumerate(columns):
        for phase, image in enumerate(column):
            row, left = phase * (height + gap), i * (width + gap)
            sheet[row : row + height, left : left + width, :3] = image
            sheet[row : row + height, left : left + width, 3] = 1  # gaps stay transparent
    return png(sheet)


def overlay(
    image: NDArray[np.floating], saliency: NDArray[np.floating], heart: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The image in grey, the map over it, its strongest place opaque, and the heart's outline.

    Args:
        image: Shape (H, W) in [0, 1].
        saliency: Shape (H, W), non-negative; each image has a scale of its own.
        heart: Shape (H, W).

    Returns:
        Shape (ZOOM * H, ZOOM * W, 3) in [0, 1].
    """
    grey = ndimage.zoom(np.clip(image, 0, 1), ZOOM, order=1, grid_mode=True, mode="nearest")[..., None]
    full = np.percentile(saliency, BRIGHTEST)
    level = np.clip(saliency / full, 0, 1) if full > 0 else np.zeros_like(saliency)
    level = ndimage.zoom(level, ZOOM, order=1, grid_mode=True, mode="nearest")
    colour = matplotlib.colormaps[COLOURS](FIRST_COLOUR + (1 - FIRST_COLOUR) * level)[..., :3]
    opacity = MAX_OPACITY * level[..., None]
    shown = (1 - opacity) * grey + opacity * colour
    inside = ndimage.zoom(heart.astype(np.float32), ZOOM, order=1, grid_mode=True, mode="nearest") > 0.5
    shown[inside & ~ndimage.binary_erosion(inside, border_value=1)] = OUTLINE
    return np.clip(shown, 0, 1)


def colour_bar() -> str:
    """A CSS gradient of the overlay's colours over mid-grey, from the lowest saliency to the highest."""
    levels = np.linspace(0, 1, 6)[:, None]
    colours = matplotlib.colormaps[COLOURS](FIRST_COLOUR + (1 - FIRST_COLOUR) * levels[:, 0])[:, :3]
    stops = 255 * ((1 - MAX_OPACITY * levels) * 0.4 + MAX_OPACITY * levels * colours)
    return "linear-gradient(90deg, " + ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in stops) + ")"
