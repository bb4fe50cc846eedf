"""NIfTI volumes that may be damaged."""

from pathlib import Path
from typing import Any
from zlib import error as ZlibError

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from client.ingest.reasons import Unusable

MAX_VOXELS = 2**28
"""A 4D cine of 512 x 512 x 20 x 50 voxels; more is no short-axis stack."""


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A volume with array axes (x, y, z) or (x, y, z, t), and its affine to RAS+ millimetres.

    Raises:
        Unusable: The file is missing, damaged, too large or holds no finite numbers.
    """
    if not path.is_file():
        raise Unusable("missing-file")
    try:
        image = nibabel.load(path)
        if np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
            raise Unusable("unreadable-nifti")
        array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    except (ImageFileError, OSError, ValueError, EOFError, ZlibError):
        raise Unusable("unreadable-nifti") from None
    if array.ndim not in (3, 4) or not np.isfinite(affine).all() or not np.isfinite(array).all():
        raise Unusable("unreadable-nifti")
    return array, affine


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size along the array's three axes in millimetres."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    if min(x, y, z) <= 0:
        raise Unusable("unreadable-nifti")
    return float(x), float(y), float(z)


def relabel(masks: NDArray[Any], labels: dict[int, int]) -> NDArray[np.uint8]:
    """Another data set's labels as the project's.

    Args:
        masks: Whole numbers, any type.
        labels: From theirs to `shared.case`'s, background included.

    Raises:
        Unusable: There is another label.
    """
    if not np.isin(masks, list(labels)).all():
        raise Unusable("masks-implausible")
    table = np.zeros(max(labels) + 1, np.uint8)
    for theirs, ours in labels.items():
        table[theirs] = ours
    return table[masks.astype(np.intp)]
