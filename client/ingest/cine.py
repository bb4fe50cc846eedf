"""What every reader returns: a short-axis stack over time on the scanner's own grid."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.identity import Identity
from fedcmr.client.ingest.places import Place, Tally


@dataclass(frozen=True)
class Cine:
    """A short-axis stack as it was scanned.

    Attributes:
        images: Shape (T, Z, H, W), float32, any scale; phases in temporal order.
        masks: Shape (T, Z, H, W), uint8 labels of `fedcmr.shared.case`, or None. What nobody labelled is zero; whether
            it is background is decided later (`fedcmr.client.ingest.drawn`). `NOT_DRAWN` where the files say so.
        spacing_mm: Slices, rows, columns.
        axes: Shape (3, 3), unit vectors along slices, rows and columns in the patient's LPS coordinates (DICOM PS3.3
            C.7.6.2.1.1: left, posterior, superior). None where the files do not know; the reader then promises a
            view from the apex, up to quarter turns.
        vendor: One of `fedcmr.shared.case.VENDORS` or "unknown".
        field_strength_t: Tesla; NaN where unknown.
        ef: An ejection fraction in (0, 1) that is known without masks; NaN where there is none. Masks go before it.
        sex: As `fedcmr.shared.case.CaseInfo`, likewise `pathology`; empty where unknown.
        says_vendor: Whether the files name any manufacturer, a known one or not.
        ends: The phases that the files call end-diastole and end-systole; None where they do not say. Cavities that are
            drawn in both go before it.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    spacing_mm: tuple[float, float, float]
    axes: NDArray[np.float64] | None
    vendor: str
    field_strength_t: float
    ef: float = math.nan
    sex: str = ""
    pathology: str = ""
    says_vendor: bool = True
    ends: tuple[int, int] | None = None


@dataclass(frozen=True)
class Study:
    """One examination that looks usable from outside.

    Attributes:
        patient: What the files call the patient, brought to one spelling. Feeds the keyed hash and goes nowhere else.
        study: The same for the examination.
        read: Reads the scans; raises `Unusable`. Pickles, so that a worker process can call it.
        spelling: How the files spell the patient's number, where that is not `patient` itself; likewise.
        warnings: Codes of `REASONS` that its case will carry.
        is_synthetic: Whether every file says that this project's generator made it, so that it shows no patient.
        identity: What the files say about the patient, for a comparison with other studies; None where they say
            nothing but a number.
        place: Where it lies; for the site's own list of what was refused, and nowhere else.
    """

    patient: str = field(repr=False)
    study: str = field(repr=False)
    read: Callable[[], Cine] = field(repr=False)
    spelling: str = field(default="", repr=False)
    warnings: tuple[str, ...] = ()
    is_synthetic: bool = False
    identity: Identity | None = field(default=None, repr=False)
    place: Place = field(default=Place(), repr=False)

    @property
    def spelt(self) -> str:
        """The patient's number as the files have it."""
        return self.spelling or self.patient


@dataclass(frozen=True)
class Findings:
    """What a reader found in a folder.

    Attributes:
        studies: In a fixed order.
        refused: Studies refused, by reason code.
        left_out: Files, or series of a usable study, that are no part of a short-axis cine, by reason code.
    """

    studies: list[Study]
    refused: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)
