"""Where a synthetic heart lies in a patient's coordinates: the geometry that the DICOM and NIfTI exports share.

A synthetic case has pixels, spacings and an order of slices, but lies nowhere. It gets the plane in which short-axis
scans are planned, so that a viewer labels its sides correctly and a reader knows its base.
"""

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import Case
from fedcmr.shared.orientation import BASE_TO_APEX, LPS_TO_RAS

_LEFT = np.array([1.0, 0.0, 0.0])
COLUMN_AXIS = (_LEFT - _LEFT @ BASE_TO_APEX * BASE_TO_APEX) / np.linalg.norm(np.cross(_LEFT, BASE_TO_APEX))
"""Direction from column to column: to the patient's left, as in a radiologist's short-axis view."""
ROW_AXIS = np.cross(COLUMN_AXIS, BASE_TO_APEX)
"""Direction from row to row: backward and down. The cross product columns x rows points from apex to base, away from a
viewer at the apex, from where `fedcmr.shared.case.Case` is seen."""


def lps_affine(case: Case) -> NDArray[np.float64]:
    """(column, row, slice, 1) to LPS millimetres, shape (4, 4); the middle of the stack is the origin.

    PS3.3 C.7.6.2.1.1, Eq. C.7.6.2.1-1, with the slice's step as third column.
    """
    z_mm, y_mm, x_mm = _spacing_mm(case)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([COLUMN_AXIS * x_mm, ROW_AXIS * y_mm, BASE_TO_APEX * z_mm], axis=1)
    middle = (np.array(case.frames.shape[:0:-1]) - 1) / 2
    affine[:3, 3] = -affine[:3, :3] @ middle
    return affine


def ras_affine(case: Case) -> NDArray[np.float64]:
    """The same to RAS+ millimetres, as NIfTI counts."""
    return LPS_TO_RAS @ lps_affine(case)


def _spacing_mm(case: Case) -> list[float]:
    """The spacing to six digits, so that a float32 of 1.5 is written as 1.5."""
    return [float(f"{value:.6g}") for value in case.spacing_mm]
