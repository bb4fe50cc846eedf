"""Which images are copies of each other: those that show the same pixels at one place and time.

Neither the bytes of two files nor their UIDs tell. Archives send an image again in another transfer syntax, or with one
element changed, or under a new SOPInstanceUID; and some anonymisers write one SOPInstanceUID for all images.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.pixels import read_pixels
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers

FILES_PER_BATCH = 16
DECIMALS = 3
"""Micrometres, up to which two spellings of a position are one."""


@dataclass(frozen=True)
class Distinct:
    """Images without their copies.

    Attributes:
        images: Those that are left, in the order they came.
        copies: Files of which an image was left out.
        conflicting: Groups in which two different images claim one SOPInstanceUID, place and time.
    """

    images: list[Header]
    copies: tuple[Path, ...]
    conflicting: frozenset[str]


def without_copies(
    images: Iterable[Header], workers: Workers, group_of: Callable[[Header], str] = lambda image: image.StudyInstanceUID
) -> Distinct:
    """The images that are not copies of an earlier one of their group.

    Pixels are read of those alone that share a SOPInstanceUID, or a place and time, with another file's.

    Args:
        images: Headers of images.
        workers: Children to read pixels in.
        group_of: The study, or whatever else holds copies together.
    """
    images = list(images)
    alike: dict[object, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        alike[group_of(image), image.SOPInstanceUID, image.frame].append(index)
        alike[group_of(image), _place(image), _time(image)].append(index)
    suspects = [members for members in alike.values() if len({images[index].path for index in members}) > 1]
    digests = _read_digests(images, {index for members in suspects for index in members}, workers)
    copies: set[int] = set()
    conflicting = set()
    for members in sorted(suspects):
        kept: list[int] = []
        for index in members:
            image = images[index]
            if index in copies:
                continue
            for one in kept:
                other = images[one]
                same_uid = (image.SOPInstanceUID, image.frame) == (other.SOPInstanceUID, other.frame)
                same_place, same_time = _place(image) == _place(other), _time(image) == _time(other)
                if same_place and digests[index] == digests[one] and (same_uid or same_time):
                    copies.add(index)
                    break
                if same_uid and same_place and same_time:
                    conflicting.add(group_of(image))
            else:
                kept.append(index)
    left = [image for index, image in enumerate(images) if index not in copies]
    return Distinct(left, tuple(sorted({images[index].path for index in copies})), frozenset(conflicting))


def _place(image: Header) -> tuple[object, ...]:
    """Where an image lies, and its grid."""
    position = tuple(round(mm, DECIMALS) for mm in image.ImagePositionPatient)
    axes = tuple(round(part, DECIMALS) for part in image.ImageOrientationPatient)
    spacing = tuple(round(mm, DECIMALS) for mm in image.PixelSpacing)
    return position, axes, spacing, image.Rows, image.Columns


def _time(image: Header) -> tuple[object, ...]:
    """When an image was taken; what is missing equals itself."""
    return tuple(None if value != value else value for value in (image.TriggerTime, image.InstanceNumber, image.order))


def _read_digests(images: list[Header], wanted: set[int], workers: Workers) -> dict[int, bytes]:
    """A digest of the pixels of each wanted image, by its index; of an image that cannot be read, of its file."""
    files: dict[object, list[int]] = defaultdict(list)
    for index in sorted(wanted):
        files[images[index].path].append(index)
    digests: dict[int, bytes] = {}
    members = list(files.values())
    for indices, found in zip(
        members,
        workers.map(_digests, [[images[i] for i in indices] for indices in members], batch_size=FILES_PER_BATCH),
        strict=True,
    ):
        for position, index in enumerate(indices):
            own = str(images[index].path).encode("utf-8", "surrogatepass")
            digests[index] = own if isinstance(found, Unusable) else found[position]
    return digests


def _digests(images: list[Header]) -> list[bytes]:
    """Digests of the images of one file."""
    whole = b""
    found = []
    for image in images:
        try:
            found.append(hashlib.blake2b(read_pixels(image).tobytes(), digest_size=16).digest())
        except Unusable:
            whole = whole or hashlib.blake2b(image.path.read_bytes(), digest_size=16).digest()
            found.append(whole)
    return found
