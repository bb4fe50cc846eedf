"""Whether contours lie where the images show the heart: a mask that was drawn on another matrix or crop does not.

Nothing else finds such masks: their shape, volume and ejection fraction are those of a heart. The cavity is brighter
than the muscle around it, so that the drawn shape fits the images best where the cavity is.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.client.ingest.centring import find_frames
from fedcmr.client.ingest.cine import Cine
from fedcmr.shared.case import LV

REACH_MM = 25.0
"""How far the shape is moved; less than from one ventricle to the other."""
BAND_MM = 5.0
"""Width of the band around the cavity, half of a wall or more."""
MIN_AREA_MM2 = 150.0
"""Smaller cavities, of the apex, say little."""
MIN_MM, MAX_SHARE, MIN_CONTRAST = 8.0, 0.7, 0.25
"""Contours are displaced where the shape fits best at least so far away, has less than this share of the best contrast
where it was drawn, and the best contrast is that of a cavity. Of 19 patients of ACDC and 27 of Sunnybrook one is: 13.7
mm, 0.33 and 0.48; the others have 2.8 mm at most, 0.96 and 0.74 at least."""


class Fit(NamedTuple):
    """How the drawn cavity fits the images.

    Attributes:
        offset_mm: From where it was drawn to where it fits best, along rows and columns.
        share: Its contrast where it was drawn over the best one.
        contrast: The best one: the cavity's mean minus that of the band around it, over the standard deviation.
    """

    offset_mm: tuple[float, float]
    share: float
    contrast: float

    @property
    def is_displaced(self) -> bool:
        """Whether the contours lie beside the heart."""
        return math.hypot(*self.offset_mm) >= MIN_MM and self.share < MAX_SHARE and self.contrast >= MIN_CONTRAST


def fit_of_contours(cine: Cine) -> Fit | None:
    """Move the cavities of end-diastole and end-systole together over their images.

    Returns:
        None without masks, or where no slice shows enough of a cavity.
    """
    if cine.masks is None:
        return None
    reach = (round(REACH_MM / cine.spacing_mm[1]), round(REACH_MM / cine.spacing_mm[2]))
    contrasts = []
    for phase in find_frames(cine):
        for image, mask in zip(cine.images[phase], cine.masks[phase], strict=True):
            cavity = mask == LV
            if cavity.sum() * cine.spacing_mm[1] * cine.spacing_mm[2] >= MIN_AREA_MM2:
                contrasts.append(_contrast(image, cavity, reach, cine.spacing_mm[1]))
    if not contrasts:
        return None
    contrast = np.mean(contrasts, axis=0)
    row, column = np.unravel_index(int(contrast.argmax()), contrast.shape)
    best = float(contrast[row, column])
    offset_mm = tuple((int(i) - n) * mm for i, n, mm in zip((row, column), reach, cine.spacing_mm[1:], strict=True))
    return Fit((offset_mm[0], offset_mm[1]), float(contrast[reach]) / max(best, np.finfo(np.float64).tiny), best)


def _contrast(
    image: NDArray[np.float32], cavity: NDArray[np.bool_], reach: tuple[int, int], pixel_mm: float
) -> NDArray[np.float64]:
    """Mean of the cavity minus that of the band around it, for every offset up to `reach`, (2 r + 1, 2 c + 1).

    A correlation of the image with the cavity and its band, by the Fourier transform.
    """
    band = ndimage.binary_dilation(cavity, iterations=max(1, round(BAND_MM / pixel_mm))) & ~cavity
    kernel = cavity / cavity.sum() - band / max(1, band.sum())
    rows, columns = ndimage.find_objects((cavity | band).astype(np.int8))[0]
    padded = np.pad(image.astype(np.float64), [(n, n) for n in reach], mode="edge")
    near = padded[rows.start : rows.stop + 2 * reach[0], columns.start : columns.stop + 2 * reach[1]]
    product = np.fft.rfft2(near) * np.conj(np.fft.rfft2(kernel[rows, columns], near.shape))
    differences = np.fft.irfft2(product, near.shape)[: 2 * reach[0] + 1, : 2 * reach[1] + 1]
    return np.asarray(differences / (near.std() or 1.0))
