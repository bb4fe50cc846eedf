"""NIfTI volumes as they come: damaged, compressed or not, with slices along any axis, and with half a header."""

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel import orientations
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.stack.short_axis import MAX_TILT_DEG
from fedcmr.shared.orientation import BASE_TO_APEX

MAX_VOXELS = 2**28
"""A 4D cine of 512 x 512 x 20 x 50 voxels; more is no short-axis stack."""
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
GZIP = b"\x1f\x8b"
NIFTI2_HEADER_BYTES = 540
SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT; other codes name axes of a template or of another scan."""
MIN_DETERMINANT = 0.1
"""Of the three axes' directions: 1 where they are perpendicular, 0 where they lie in a plane."""
ALONG_AXES = 1e-3
"""Largest part of a direction that lies off the patient's axes for the three to count as along them."""
CLEARLY_LONGER = 1.05
MAX_LABEL_ERROR = 0.01
"""Distance of a stored label from a whole number: files with a slope read as 0.9999999998 and 2.9999999993."""
MAX_GRID_DIFFERENCE = 0.1
"""Largest distance between the corners of an image and of its mask, as a share of the smallest voxel side."""


@dataclass(frozen=True)
class Volume:
    """A stack or a cine.

    Attributes:
        array: Axes (x, y, z) or (x, y, z, t), slices along z whatever their axis in the file.
        affine: Shape (4, 4), from (x, y, z, 1) to RAS+ millimetres.
        knows_axes: Whether the header says how the axes lie in the patient; without, `affine` holds voxel sizes alone.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    knows_axes: bool

    @property
    def is_along_axes(self) -> bool:
        """Whether its axes are the patient's: no short axis ever is, but what has lost its orientation is."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool((np.sort(np.abs(directions), axis=0)[:2] < ALONG_AXES).all())

    @property
    def is_short_axis(self) -> bool:
        """Whether the header says that the slices lie across the heart's long axis."""
        along = abs(axes_of(self.affine)[0] @ BASE_TO_APEX)
        return self.knows_axes and bool(along >= math.cos(math.radians(MAX_TILT_DEG)))


def read_nifti(path: Path, *, labels: bool = False) -> Volume:
    """A volume with its slices along the third axis, and axes of one after them dropped.

    Whether the file is compressed shows in its content: a browser unpacks and keeps the name.

    Args:
        path: Path of the file.
        labels: It holds labels. What is not finite is not labelled then; in an image it becomes the smallest value, as
            resampling leaves NaN outside the field of view.

    Raises:
        Unusable: The file is missing, damaged, too large, holds no stack, or no finite number.
    """
    if not path.is_file():
        raise Unusable("missing-file")
    try:
        with _opened(path) as file:
            header = _read_header(file)
            shape = header.get_data_shape()
            if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
                raise Unusable("too-large")
            array = np.asanyarray(ArrayProxy(file, header, mmap=False))
    except (Unusable, MemoryError):
        raise
    except Exception:
        # Whatever damaged bytes provoke in nibabel or zlib; their own words may quote them.
        raise Unusable("unreadable-nifti") from None
    if array.dtype.kind not in "biuf":
        raise Unusable("unreadable-nifti")
    shape = (*shape[:3], *(size for size in shape[3:] if size != 1))
    if len(shape) not in (3, 4) or array.size == 0:
        raise Unusable("not-a-stack")
    array = array.reshape(shape)
    affine, knows_axes = _geometry(header)
    array, affine = _slices_last(_finite(array, labels), affine)
    return Volume(array, affine, knows_axes)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked if it is compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield cast(BinaryIO, unpacked)


def _read_header(file: BinaryIO) -> nibabel.Nifti1Header:
    """A NIfTI-1 or NIfTI-2 header of either byte order."""
    size = file.read(4)
    file.seek(0)
    is_second = NIFTI2_HEADER_BYTES in (int.from_bytes(size, "little"), int.from_bytes(size, "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    return kind.from_fileobj(file)


def _finite(array: NDArray[Any], labels: bool) -> NDArray[Any]:
    """The array with a number everywhere."""
    if array.dtype.kind != "f":
        return array
    known = np.isfinite(array)
    if known.all():
        return array
    if not known.any():
        raise Unusable("not-finite")
    return np.where(known, array, 0 if labels else array[known].min())


def _geometry(header: nibabel.Nifti1Header) -> tuple[NDArray[np.float64], bool]:
    """The affine to RAS+ millimetres, and whether the header knows the patient's axes.

    sform and qform may both be there. One that cannot be an affine does not count. The scanner's own goes before one to
    a template, one that is oblique before one that lies along the patient's axes, as a short axis never does, and then
    sform before qform.

    Raises:
        Unusable: There is none, and no voxel size either.
    """
    found = []
    for read, code in ((header.get_sform, "sform_code"), (header.get_qform, "qform_code")):
        affine = np.zeros((4, 4))
        with suppress(HeaderDataError, ValueError):  # a quaternion that is none
            affine = np.asarray(read(), np.float64)
        if int(header[code]) > 0 and _is_affine(affine):
            along_axes = Volume(np.empty(0), affine, True).is_along_axes
            found.append((along_axes, int(header[code]) != SCANNER, affine))
    if found:
        return min(found, key=lambda one: one[:2])[2], True
    sizes = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    if not (np.isfinite(sizes).all() and sizes.min() > 0):
        raise Unusable("no-voxel-size")
    return np.diag([*sizes, 1.0]), False


def _is_affine(affine: NDArray[np.float64]) -> bool:
    """Whether three axes of some length span space."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or sizes.min() <= 0:
        return False
    return abs(float(np.linalg.det(affine[:3, :3] / sizes))) > MIN_DETERMINANT


def _slices_last(array: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The slices' axis moved to the third place: that of the longest voxel side with fewer places than the third has.

    Tools that bring a file close to RAS+ leave the slices along any axis.
    """
    sizes = spacing_of(affine)
    slices = int(np.argmax(sizes))
    if sizes[slices] <= CLEARLY_LONGER * sizes[2] or array.shape[slices] >= array.shape[2]:
        return array, affine
    order = [axis for axis in range(3) if axis != slices] + [slices]
    return np.moveaxis(array, slices, 2), affine[:, [*order, 3]]


def as_in(volume: Volume, other: Volume) -> Volume:
    """The volume with its axes in the order and direction that another one's have, where both know theirs.

    A file may have been flipped or transposed since the other one was written: the array's order says nothing then.
    """
    if not (volume.knows_axes and other.knows_axes):
        return volume
    try:
        turns = orientations.io_orientation(np.linalg.inv(other.affine) @ volume.affine)
    except np.linalg.LinAlgError:
        return volume
    if np.isnan(turns).any():
        return volume
    affine = volume.affine @ orientations.inv_ornt_aff(turns, volume.array.shape[:3])
    return Volume(orientations.apply_orientation(volume.array, turns), affine, True)


def on_grid(volume: Volume, image: Volume) -> Volume | None:
    """The volume as the image's array has it, if both cover the same places; None where they do not."""
    turned = as_in(volume, image)
    fits = turned.array.shape[:3] == image.array.shape[:3]
    return turned if fits and same_grid(image.affine, turned.affine, image.array.shape[:3]) else None


def same_grid(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether two affines put the corners of a volume (X, Y, Z) in the same places."""
    size = np.array(shape) - 1
    corners = np.array([[*(size * corner), 1] for corner in np.ndindex(2, 2, 2)], np.float64)
    distances_mm = np.linalg.norm(corners @ (one - other).T, axis=1)
    return bool(distances_mm.max() <= MAX_GRID_DIFFERENCE * min(spacing_of(one)))


def read_phases(
    frames: Sequence[Path], masks: Sequence[Path], labels: Mapping[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Volume]:
    """Phases that lie in a 3D file each, with their masks, all on the first one's grid.

    Files whose headers do not agree are taken as their arrays lie: of public sets, some masks have none of their own.

    Returns:
        Images and masks, shape (T, Z, H, W), and the first image.

    Raises:
        Unusable: A file is missing or damaged, or they do not fit.
    """
    first, *others = [read_nifti(path) for path in frames]
    arrays = [first.array, *((on_grid(other, first) or other).array for other in others)]
    drawn = [read_nifti(path, labels=True) for path in masks]
    labelled = [(on_grid(mask, first) or mask).array for mask in drawn]
    if first.array.ndim != 3 or len({array.shape for array in (*arrays, *labelled)}) > 1:
        raise Unusable("masks-differ")
    images = np.stack([array.T for array in arrays]).astype(np.float32)
    return images, relabel(np.stack([array.T for array in labelled]), labels), first


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size along the array's three axes in millimetres."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    if min(x, y, z) <= 0:
        raise Unusable("no-voxel-size")
    return float(x), float(y), float(z)


def axes_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors along slices, rows and columns of the transposed array in LPS coordinates, as `Cine.axes`."""
    axes = affine[:3, :3].T * RAS_TO_LPS
    return (axes / np.linalg.norm(axes, axis=1, keepdims=True))[::-1]


def patient_axes(volume: Volume) -> NDArray[np.float64] | None:
    """`Cine.axes` of a public set's stack; None where the header lost them, as axes along the patient's own show."""
    return None if not volume.knows_axes or volume.is_along_axes else axes_of(volume.affine)


def relabel(masks: NDArray[Any], labels: Mapping[int, int]) -> NDArray[np.uint8]:
    """Another data set's labels as the project's.

    Args:
        masks: Whole numbers, any type; of fractions those within `MAX_LABEL_ERROR` of one.
        labels: From theirs to `fedcmr.shared.case`'s, background included.

    Raises:
        Unusable: There is another label.
    """
    if masks.dtype.kind == "f":
        rounded = np.rint(masks)
        if np.abs(masks - rounded).max(initial=0) > MAX_LABEL_ERROR:
            raise Unusable("masks-implausible")
        masks = rounded
    with np.errstate(invalid="ignore"):  # what is no byte does not equal its own cast, below
        numbers = masks.astype(np.uint8)
    # A table of all bytes: searching the list for every voxel of a cine takes most of a study's time.
    table, named = np.zeros(256, np.uint8), np.zeros(256, bool)
    for theirs, ours in labels.items():
        table[theirs], named[theirs] = ours, True
    if not np.array_equal(numbers, masks) or not named[numbers].all():
        raise Unusable("masks-implausible")
    return table[numbers]
