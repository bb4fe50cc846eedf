"""What is kept of one image's header."""

import math
import sys
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class PixelFormat(NamedTuple):
    """How an image's pixels are stored (PS3.3 C.7.6.3.1) and what they mean (C.7.6.16.2.9); checked by `pixels`."""

    TransferSyntaxUID: str
    PhotometricInterpretation: str
    BitsAllocated: int
    BitsStored: int
    HighBit: int
    PixelRepresentation: int
    RescaleSlope: float
    RescaleIntercept: float
    NumberOfFrames: int


@dataclass(frozen=True, slots=True)
class Header:
    """The allowed elements of one image: a classic file, or one frame of an Enhanced one.

    Vectors are in LPS coordinates and millimetres (PS3.3 C.7.6.2.1.1). An element that is absent is an empty text or
    NaN; `frame` counts from 0 and is None for a classic file. For an Enhanced frame TriggerTime is the nominal
    cardiac trigger delay and InstanceNumber the temporal position.

    Attributes:
        person: Digests of PatientName and PatientBirthDate, empty where the file has none; only compared, in memory:
            whether one number stands for several persons, or one person has several numbers.
        issuer: Digest of who issued the PatientID, empty where the file does not say; only compared, and part of the
            keyed hash where the site says that issuers differ.
        order: InstanceNumber of an Enhanced file that holds one phase, where InstanceNumber is the temporal position.
        AcquisitionTime: HHMMSS as one number, or SeriesTime's where it is missing; tells which of two scans was later.
        AccessionNumber: For the site's own list of what was refused, and nowhere else.
        pixel_format: How to read the pixels; None in a header that is not from a file.
        pixel_offset: Byte of the file at which the value of PixelData starts, all frames together.
    """

    path: Path = field(repr=False)
    PatientID: str = field(repr=False)
    StudyInstanceUID: str = field(repr=False)
    SeriesInstanceUID: str = field(repr=False)
    SOPInstanceUID: str = field(repr=False)
    Manufacturer: str
    MagneticFieldStrength: float
    ImagePositionPatient: tuple[float, ...]
    ImageOrientationPatient: tuple[float, ...]
    PixelSpacing: tuple[float, ...]
    Rows: int
    Columns: int
    TriggerTime: float
    InstanceNumber: float
    frame: int | None = None
    ImageType: tuple[str, ...] = ()
    ScanningSequence: tuple[str, ...] = ()
    EchoTime: float = math.nan
    InversionTime: float = math.nan
    SeriesNumber: float = math.nan
    BurnedInAnnotation: str = ""
    PatientSex: str = field(default="", repr=False)
    person: tuple[str, str] = field(default=("", ""), repr=False)
    issuer: str = field(default="", repr=False)
    SyntheticData: tuple[str, ...] = ()
    CardiacNumberOfImages: float = math.nan
    pixel_format: PixelFormat | None = None
    pixel_offset: int = 0
    order: float = math.nan
    AcquisitionTime: float = math.nan
    AccessionNumber: str = field(default="", repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain values: thousands of headers travel between processes."""
        return _rebuilt, (str(self.path), *(getattr(self, name) for name in _NAMES))

    @property
    def row_axis(self) -> NDArray[np.float64]:
        """Unit vector along which rows follow each other (down the image)."""
        return np.asarray(self.ImageOrientationPatient[3:])

    @property
    def column_axis(self) -> NDArray[np.float64]:
        """Unit vector along which columns follow each other (to the right)."""
        return np.asarray(self.ImageOrientationPatient[:3])

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit normal of the image plane."""
        return np.cross(self.column_axis, self.row_axis)


_NAMES = tuple(one.name for one in fields(Header))[1:]


def _rebuilt(path: str, *values: Any) -> Header:
    """A header as it was before it travelled, its parts shared with other headers' again."""
    return Header(Path(path), *map(shared_value, values))


def shared_value(value: Any) -> Any:
    """The same object for equal texts, numbers and tuples: the images of a series differ in few elements."""
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    return _shared(value) if isinstance(value, (float, tuple)) else value


@lru_cache(maxsize=4096)
def _shared(value: Any) -> Any:
    return value
