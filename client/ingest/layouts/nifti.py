"""NIfTI volumes that may be damaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.reasons import Unusable

MAX_VOXELS = 2**28
"""A 4D cine of 512 x 512 x 20 x 50 voxels; more is no short-axis stack."""
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


def read_nifti(path: Path, *, oriented: bool = False) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A volume with array axes (x, y, z) or (x, y, z, t), and its affine to RAS+ millimetres.

    Args:
        path: Path of the file.
        oriented: Insist that the header knows the patient's axes (qform_code or sform_code above 0).

    Raises:
        Unusable: The file is missing, damaged, too large, holds no finite numbers, or has no orientation.
    """
    if not path.is_file():
        raise Unusable("missing-file")
    try:
        image = nibabel.load(path)
        if np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
            raise Unusable("unreadable-nifti")
        array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
        codes = [int(image.header[name]) for name in ("qform_code", "sform_code")] if oriented else [1]
    except (Unusable, MemoryError):
        raise
    except Exception:
        # Whatever damaged bytes provoke in nibabel or zlib; their own words may quote them.
        raise Unusable("unreadable-nifti") from None
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf":
        raise Unusable("unreadable-nifti")
    if array.size == 0 or not np.isfinite(affine).all() or not np.isfinite(array).all():
        raise Unusable("unreadable-nifti")
    if max(codes) <= 0:
        raise Unusable("no-orientation")
    return array, affine


def read_phases(
    frames: Sequence[Path], masks: Sequence[Path], labels: Mapping[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
    """Phases that lie in a 3D file each, with their masks.

    Returns:
        Images and masks, shape (T, Z, H, W), and the first image's affine.

    Raises:
        Unusable: A file is missing or damaged, or they do not fit.
    """
    volumes = [read_nifti(path) for path in frames]
    arrays = [array for array, _ in volumes]
    labelled = [read_nifti(path)[0] for path in masks]
    if arrays[0].ndim != 3 or len({array.shape for array in (*arrays, *labelled)}) > 1:
        raise Unusable("masks-differ")
    images = np.stack([array.T for array in arrays]).astype(np.float32)
    return images, relabel(np.stack([array.T for array in labelled]), labels), volumes[0][1]


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size along the array's three axes in millimetres."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    if min(x, y, z) <= 0:
        raise Unusable("unreadable-nifti")
    return float(x), float(y), float(z)


def axes_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors along slices, rows and columns of the transposed array in LPS coordinates, as `Cine.axes`."""
    axes = affine[:3, :3].T * RAS_TO_LPS
    return (axes / np.linalg.norm(axes, axis=1, keepdims=True))[::-1]


def relabel(masks: NDArray[Any], labels: Mapping[int, int]) -> NDArray[np.uint8]:
    """Another data set's labels as the project's.

    Args:
        masks: Whole numbers, any type.
        labels: From theirs to `fedcmr.shared.case`'s, background included.

    Raises:
        Unusable: There is another label.
    """
    with np.errstate(invalid="ignore"):  # what is no byte does not equal its own cast, below
        numbers = masks.astype(np.uint8)
    # A table of all bytes: searching the list for every voxel of a cine takes most of a study's time.
    table, named = np.zeros(256, np.uint8), np.zeros(256, bool)
    for theirs, ours in labels.items():
        table[theirs], named[theirs] = ours, True
    if not np.array_equal(numbers, masks) or not named[numbers].all():
        raise Unusable("masks-implausible")
    return table[numbers]
