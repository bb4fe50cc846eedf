"""How a heart usually lies, in the patient coordinates of DICOM, and from these to those of NIfTI.

LPS coordinates (PS3.3 C.7.6.2.1.1) grow to the patient's left, backward and up; RAS+ ones to the right, forward and up.
"""

import numpy as np

BASE_TO_APEX = np.array([0.53, -0.62, -0.57]) / np.linalg.norm([0.53, -0.62, -0.57])
"""The heart's usual long axis in LPS coordinates: to the left, forward and down."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Matrix for homogeneous coordinates; its own inverse."""
