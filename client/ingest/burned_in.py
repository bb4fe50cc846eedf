"""Text in the pixels: what a header says about it (PS3.3 C.7.6.1.1.5), and images that look as if they hold some.

Workstations draw a patient's name into the image itself. Such letters are thin, stand out from what is around them,
stand still while the heart beats, and are the same in every slice, where anatomy differs from slice to slice.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.dicom.header import Header

ANNOTATED = "YES"
SUSPECTED = "burned-in-suspected"
"""The reason code: of a study that is left out, or of a case that somebody has looked at and kept."""
MAX_PHASES = 8
"""Letters are the same in every phase, so that a few tell as much as all."""
SLICES_AGREE = 0.75
"""Share of the slices that must show a stroke: a name stands in all of them, a slice's own number does not count."""
STROKE_PIXELS = 5
"""Strokes are thinner than this: letters of up to some 30 pixels. Fat under the skin is wider."""
MIN_CONTRAST = 0.25
"""Contrast of a stroke against what is around it, as a share of the brightest tissue's signal."""
MAX_FLICKER = 0.25
"""Change of a stroke over phases and slices, as a share of its contrast: lossy compression leaves some."""
BRIGHT_PERCENTILE = 99.0
GAP_PIXELS = 12
"""Between words of one line; wider gaps part two texts."""
MIN_HEIGHT, MAX_HEIGHT = 5, 40
"""Height of a line of text, in pixels: no smaller letter can be read."""
ANGLE_STEP = 10
"""Degrees: a line that slants by half of it is still read as one."""
HALF_COVERED = 0.4
"""Share of a pixel of the rotated image that a stroke covers; below half, so that thin strokes do not break."""
MIN_STROKES = 5
"""That one row of pixels crosses within a line: about four letters, fewer name nobody.

Measured: 0 to 2 in 42 scans without text (20 of ACDC, 3 of M&Ms, a Siemens Vida, 18 simulated). With 8 to 23 letters
drawn into a corner of the same scans, all 1,848 are found, in fonts of 9 to 24 pixels, as bright as tissue or twice its
maximum, black on white, or after JPEG at quality 75; of a smooth font of 8 pixels 83 %. At eleven slants from 5 to 170
degrees, 15 letters in twelve of the real scans: all 132 are found; without text the 23 have 0 or 1 at every slant."""


def is_annotated(images: Iterable[Header]) -> bool:
    """Whether any image says that its pixels hold text which identifies the patient."""
    return any(image.BurnedInAnnotation == ANNOTATED for image in images)


def suspect(cine: Cine) -> bool:
    """Whether the scans look as if text had been drawn into them, bright or dark, at any slant.

    A suspicion, and no guarantee where there is none: letters that are very large or faint are not found, nor those
    that differ from slice to slice, stand on a curve, or lie on something as bright as they are.
    """
    return num_strokes(cine.images) >= MIN_STROKES


def num_strokes(images: NDArray[np.float32]) -> int:
    """Strokes in the longest line of what looks like text, shape (T, Z, H, W) -> as many as one row of it crosses."""
    phases = images[:: -(-len(images) // MAX_PHASES)]
    darkest, brightest = phases.min(axis=0), phases.max(axis=0)
    tissue = float(np.percentile(brightest[:, ::4, ::4], BRIGHT_PERCENTILE) - darkest.min())
    # Per pixel what most slices reach, and what most do not exceed.
    rank = int((1 - SLICES_AGREE) * (len(darkest) - 1))
    low = np.partition(darkest, rank, axis=0)[rank]
    high = -np.partition(-brightest, rank, axis=0)[rank]
    # Of dark letters on a bright bar this finds the gaps.
    contrast = low - ndimage.grey_opening(low, (STROKE_PIXELS, STROKE_PIXELS))
    strokes = (contrast > MIN_CONTRAST * tissue) & (high - low < MAX_FLICKER * contrast)
    return max(_longest_line(turned) for turned in _turned(strokes))


def _turned(strokes: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """The strokes as they stand, along columns, and at every slant between."""
    yield strokes
    yield strokes.T
    for angle in range(ANGLE_STEP, 180, ANGLE_STEP):
        if angle != 90:
            turned = ndimage.rotate(strokes.astype(np.float32), angle, order=1, prefilter=False)
            yield turned > HALF_COVERED


def _longest_line(strokes: NDArray[np.bool_]) -> int:
    """Strokes that begin along one row of the longest horizontal line, shape (H, W)."""
    joined = ndimage.binary_dilation(strokes, np.ones((1, GAP_PIXELS + 1)))
    labels, _ = ndimage.label(joined, np.ones((3, 3)))
    most = 0
    for index, region in enumerate(ndimage.find_objects(labels), start=1):
        line = strokes[region] & (labels[region] == index)
        if MIN_HEIGHT <= len(line) <= MAX_HEIGHT:
            begins = line & ~np.pad(line, ((0, 0), (1, 0)))[:, :-1]
            # As many as the fifth best row has: letters are crossed by every row of theirs, a speck by one or two.
            most = max(most, int(np.sort(begins.sum(axis=1))[-MIN_HEIGHT]))
    return most
