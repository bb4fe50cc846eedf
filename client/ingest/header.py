"""What is kept of one image's header."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Header:
    """The allowed elements of one image: a classic file, or one frame of an Enhanced one.

    Vectors are in LPS coordinates and millimetres (PS3.3 C.7.6.2.1.1). An element that is absent is an empty text or
    NaN; `frame` counts from 0 and is None for a classic file.
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

    @property
    def row_axis(self) -> NDArray[np.float64]:
        """Unit vector along which rows follow each other (down the picture)."""
        return np.asarray(self.ImageOrientationPatient[3:])

    @property
    def column_axis(self) -> NDArray[np.float64]:
        """Unit vector along which columns follow each other (to the right)."""
        return np.asarray(self.ImageOrientationPatient[:3])

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit normal of the image plane."""
        return np.cross(self.column_axis, self.row_axis)
