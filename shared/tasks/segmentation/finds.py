"""Which of a segmenter's finds are a left ventricle: those with muscle around them.

A vessel or the stomach is bright and round too, and no muscle surrounds it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.shared.case import LV, MYO

BAND_PX = 2
"""Width of the band around a find in which muscle is counted."""


def finds_of_cavity(image: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.bool_], float]]:
    """Every connected find of left cavity in one image, with the share of muscle in the band around it.

    Args:
        image: Labels of `fedcmr.shared.case`, shape (H, W).

    Yields:
        The find, shape (H, W), and the share in [0, 1].
    """
    finds, num = ndimage.label(image == LV)
    for number in range(1, num + 1):
        find = finds == number
        band = ndimage.binary_dilation(find, iterations=BAND_PX) & ~find
        yield find, float((image[band] == MYO).mean()) if band.any() else 0.0  # without a band it fills the image
