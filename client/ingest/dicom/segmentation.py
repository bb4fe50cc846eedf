"""Masks as DICOM segmentations (PS3.3 A.51 and A.90) of the cine next to them.

Read with pydicom by an allow-list of elements, like the images. Which image a frame is of is given by the image that it
names, else by its position among those that the whole object names.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, SegmentationStorage

from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.segment_names import structures_of
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.stack.short_axis import Stack
from fedcmr.shared.case import LV, MYO, RV

LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")
SEGMENTATION_CLASSES = frozenset({SegmentationStorage, LABEL_MAP_STORAGE})
DRAWING_ORDER = (RV, LV, MYO)
"""Later ones cover earlier ones: of a left ventricle drawn to its outer wall the wall leaves the cavity."""
MAX_VOXELS = 2**28
MIN_FRACTION = 0.5
MIN_OVERLAP = 0.9
"""Share of a frame's labelled area that must lie within the image."""
MAX_DISTANCE = 0.5
"""Largest distance of a frame's plane from the image's, as a share of the distance between slices."""

HEADER_ELEMENTS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SegmentSequence",
    "ReferencedSeriesSequence",
)
PIXEL_ELEMENTS = (
    *HEADER_ELEMENTS,
    "SegmentationType",
    "MaximumFractionalValue",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PixelData",
)

Place = tuple[int, int]
"""Phase and slice of a stack's image."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What the header of a segmentation says.

    Attributes:
        path: Path of the file.
        StudyInstanceUID: It belongs to this study.
        SOPInstanceUID: Its own.
        SeriesInstanceUIDs: Series of the images that it refers to; empty where it does not say.
    """

    path: Path = field(repr=False)
    StudyInstanceUID: str = field(repr=False)
    SOPInstanceUID: str = field(repr=False)
    SeriesInstanceUIDs: frozenset[str] = field(repr=False)


def read_segmentation_header(path: Path) -> Segmentation:
    """The allowed elements of a segmentation, without pixels.

    Raises:
        Unusable: It holds neither ventricle nor myocardium, says too little, or is damaged.
    """
    try:
        elements = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_ELEMENTS), force=True)
        study, instance = (str(elements.get(name) or "") for name in ("StudyInstanceUID", "SOPInstanceUID"))
        series = {str(item.SeriesInstanceUID) for item in elements.get("ReferencedSeriesSequence") or []}
        structures = structures_of(elements)
    except (OSError, MemoryError):
        raise
    except Exception:
        raise Unusable("damaged-header") from None
    if not (study and instance):
        raise Unusable("no-uid")
    if not structures:
        raise Unusable("other-segmentation")
    return Segmentation(path, study, instance, frozenset(series))


def choose(segmentations: Sequence[Segmentation], stack: Stack) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Those of a study's segmentations that may be of the stack, and those of other images."""
    series = {image.SeriesInstanceUID for position in stack.images for image in position}
    chosen = [one for one in segmentations if not one.SeriesInstanceUIDs or one.SeriesInstanceUIDs & series]
    return tuple(one.path for one in chosen), tuple(one.path for one in segmentations if one not in chosen)


def read_segmentations(paths: Sequence[Path], stack: Stack) -> NDArray[np.uint8] | None:
    """Labels of `shared.case` on the stack's grid, shape (T, Z, H, W); None where no frame is of the stack's images.

    A segmentation may cover some phases, slices or structures; several add up. Of fractions, a half and more counts.

    Raises:
        Unusable: One is damaged, lies next to its image, or two contradict each other.
    """
    drawn: dict[tuple[int, Place], tuple[Path, NDArray[np.bool_]]] = {}
    for path in paths:
        try:
            elements = pydicom.dcmread(path, specific_tags=list(PIXEL_ELEMENTS), force=True)
            planes = list(_planes(elements, stack))
        except (Unusable, MemoryError):
            raise
        except Exception:
            # Whatever damaged bytes provoke in the parser; its own words may quote them.
            raise Unusable("unreadable-segmentation") from None
        own: dict[tuple[int, Place], NDArray[np.bool_]] = {}
        for structure, place, plane in planes:
            own[structure, place] = own[structure, place] | plane if (structure, place) in own else plane
        for key, plane in own.items():
            if not np.array_equal(drawn.setdefault(key, (path, plane))[1], plane):
                raise Unusable("ambiguous-masks")
    if not drawn:
        return None
    first = stack.images[0][0]
    masks = np.zeros((len(stack.images[0]), len(stack.images), first.Rows, first.Columns), np.uint8)
    for structure in DRAWING_ORDER:
        for (one, place), (_, plane) in drawn.items():
            if one == structure:
                masks[place][plane] = structure
    return masks


def _planes(elements: Dataset, stack: Stack) -> Iterator[tuple[int, Place, NDArray[np.bool_]]]:
    """Structure, place and pixels of every frame that is of the stack's images."""
    structures = structures_of(elements)
    frames = _frames(elements)
    shared = (elements.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    per_frame = elements.PerFrameFunctionalGroupsSequence
    if len(per_frame) != len(frames):
        raise Unusable("unreadable-segmentation")
    finder = _Finder(elements, stack)
    for pixels, own in zip(frames, per_frame, strict=True):
        place = finder.place(own, shared)
        if place is None:
            continue
        if elements.SegmentationType == "LABELMAP":
            parts = [(structure, pixels == number) for number, structure in structures.items()]
        else:
            number = int(_group(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if number not in structures:
                continue
            highest = int(elements.MaximumFractionalValue) if elements.SegmentationType == "FRACTIONAL" else 1
            parts = [(structures[number], pixels >= MIN_FRACTION * highest)]
        for structure, plane in parts:
            yield structure, place, _on_image(plane, own, shared, stack.images[place[1]][place[0]], finder.slice_mm)


def _frames(elements: Dataset) -> NDArray[Any]:
    """All frames, shape (F, Rows, Columns)."""
    shape = (int(elements.get("NumberOfFrames") or 1), int(elements.Rows), int(elements.Columns))
    if min(shape) < 1 or math.prod(shape) > MAX_VOXELS or elements.get("SamplesPerPixel", 1) != 1:
        raise Unusable("unreadable-segmentation")
    if "TransferSyntaxUID" not in elements.file_meta:  # a data set without its preamble
        implicit = elements.original_encoding[0]
        elements.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    if not elements.file_meta.TransferSyntaxUID.is_compressed:
        bits = int(elements.BitsAllocated) * math.prod(shape)
        num_bytes = math.ceil(bits / 8)
        # Padding may follow (PS3.5, 8.1.1, note 1), but no further frame.
        if not 0 <= len(elements.PixelData) - num_bytes < max(2, bits // shape[0] // 8):
            raise Unusable("unreadable-segmentation")
        elements.PixelData = elements.PixelData[: num_bytes + num_bytes % 2]
    frames = elements.pixel_array
    frames = frames[None] if frames.ndim == 2 else frames
    if frames.shape != shape:
        raise Unusable("unreadable-segmentation")
    return frames


class _Finder:
    """Finds the image that a frame of a segmentation is of."""

    def __init__(self, elements: Dataset, stack: Stack) -> None:
        self.stack = stack
        self.slice_mm = float(np.linalg.norm(stack.affine[:3, 2]))
        self.places: dict[str, dict[int | None, Place]] = defaultdict(dict)
        for z, position in enumerate(stack.images):
            for t, image in enumerate(position):
                number = None if image.frame is None else image.frame + 1  # frames count from 1 (PS3.3 10.3)
                self.places[image.SOPInstanceUID][number] = t, z
        self.listed = {
            place
            for series in elements.get("ReferencedSeriesSequence") or []
            for instance in series.get("ReferencedInstanceSequence") or []
            for place in self._named(instance)
        }

    def place(self, own: Dataset, shared: Dataset) -> Place | None:
        """The image, None where it is none of the stack's.

        Raises:
            Unusable: It could be of several phases.
        """
        derivations = own.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or []
        sources = [source for one in derivations for source in one.get("SourceImageSequence") or []]
        places = {place for source in sources for place in self._named(source)}
        if sources and not places:
            return None
        # Without an image of its own a frame may be of each that the whole object refers to.
        places = places or self.listed
        position = _optional(own, shared, "PlanePositionSequence")
        if len(places) > 1 and position is not None:
            z = self._slice(np.asarray(position.ImagePositionPatient, np.float64))
            places = {place for place in places if place[1] == z}
        if len(places) > 1 and (content := _optional(own, shared, "FrameContentSequence")) is not None:
            index = content.get("TemporalPositionIndex")
            places = {place for place in places if index is None or place[0] == int(index) - 1}
        if len(places) > 1:
            one_slice = len({z for _, z in places}) == 1
            raise Unusable("segmentation-of-no-phase" if one_slice else "unreadable-segmentation")
        return next(iter(places), None)

    def _named(self, reference: Dataset) -> list[Place]:
        """Places of the images that a reference names; without frame numbers it means all frames (PS3.3 10.3)."""
        frames = self.places.get(str(reference.ReferencedSOPInstanceUID), {})
        numbers = reference.get("ReferencedFrameNumber")
        if numbers is None or None in frames:
            return list(frames.values())
        return [frames[int(n)] for n in np.atleast_1d(np.asarray(numbers, np.int64)) if int(n) in frames]

    def _slice(self, position: NDArray[np.float64]) -> int | None:
        """The slice whose plane a position lies in."""
        normal = self.stack.images[0][0].normal
        depths = np.array([np.asarray(one[0].ImagePositionPatient) @ normal for one in self.stack.images])
        distances = np.abs(depths - position @ normal)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= MAX_DISTANCE * self.slice_mm else None


def _on_image(
    plane: NDArray[np.bool_], own: Dataset, shared: Dataset, image: Header, slice_mm: float
) -> NDArray[np.bool_]:
    """A frame on its image's grid: nearest pixel by position, where the frame has one, else pixel by pixel."""
    position = _optional(own, shared, "PlanePositionSequence")
    shape = image.Rows, image.Columns
    if position is None:
        if plane.shape != shape:
            raise Unusable("unreadable-segmentation")
        return plane
    measures = _group(own, shared, "PixelMeasuresSequence")
    orientation = np.asarray(_group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, np.float64)
    column_axis, row_axis = orientation.reshape(2, 3)
    row_mm, column_mm = (float(mm) for mm in measures.PixelSpacing)
    offset = np.asarray(image.ImagePositionPatient) - np.asarray(position.ImagePositionPatient, np.float64)
    aligned = abs(float(np.cross(column_axis, row_axis) @ image.normal)) > 0.99
    if not aligned or abs(float(offset @ image.normal)) > MAX_DISTANCE * slice_mm:
        raise Unusable("masks-misaligned")
    down, right = (n * mm for n, mm in zip(np.ogrid[: shape[0], : shape[1]], image.PixelSpacing, strict=True))
    index = []
    for axis, mm in ((row_axis, row_mm), (column_axis, column_mm)):
        along = offset @ axis + down * (image.row_axis @ axis) + right * (image.column_axis @ axis)
        index.append(np.rint(along / mm).astype(np.intp))
    inside = (index[0] >= 0) & (index[0] < plane.shape[0]) & (index[1] >= 0) & (index[1] < plane.shape[1])
    result = inside & plane[np.where(inside, index[0], 0), np.where(inside, index[1], 0)]
    area, expected = np.count_nonzero(result) * np.prod(image.PixelSpacing), plane.sum() * row_mm * column_mm
    if area < MIN_OVERLAP * expected:
        raise Unusable("masks-misaligned")
    return np.asarray(result)


def _optional(own: Dataset, shared: Dataset, keyword: str) -> Dataset | None:
    """The item of a functional group: the frame's own, else the one of all frames (PS3.3 C.7.6.16)."""
    items = own.get(keyword) or shared.get(keyword)
    return items[0] if items else None


def _group(own: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """The same, where it must be there."""
    item = _optional(own, shared, keyword)
    if item is None:
        raise Unusable("unreadable-segmentation")
    return item
