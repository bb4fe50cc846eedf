"""What scanners say about themselves, brought to one spelling."""

import math
import re
from collections.abc import Iterable

from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.shared.case import UNKNOWN

PREFIXES = {
    "siemens": "Siemens",
    "philips": "Philips",
    "ge": "GE",
    "g e": "GE",
    "gems": "GE",
    "gehc": "GE",
    "general electric": "GE",
    "canon": "Canon",
    "toshiba": "Canon",
    "uih": "United Imaging",
    "united imaging": "United Imaging",
    "unitedimaging": "United Imaging",
    "shanghai united imaging": "United Imaging",
    "wuhan united imaging": "United Imaging",
}
"""First words of Manufacturer (0008,0070) in lower case, signs between words left out."""
FIELD_STRENGTHS_T = (0.2, 10.0)
NOMINAL_T = (0.2, 0.25, 0.3, 0.35, 0.5, 0.55, 0.6, 0.7, 1.0, 1.2, 1.5, 3.0, 5.0, 7.0, 9.4)
"""What magnets for patients are sold as. A 3 T one may say 2.8936, the field at which it truly stands."""
NOMINAL_WITHIN = 0.05
PER_TESLA = (10_000.0, 1_000.0)
"""Gauss and millitesla."""


def vendor_name(manufacturer: str) -> str:
    """One of `fedcmr.shared.case.VENDORS`, or "unknown", for a free text like "GE MEDICAL SYSTEMS" or "TOSHIBA_MEC"."""
    words = re.findall(r"[^\W_]+", manufacturer.lower())
    for prefix, vendor in PREFIXES.items():
        if words[: len(prefix.split())] == prefix.split():
            return vendor
    return UNKNOWN


def agreed_vendor(manufacturers: Iterable[str]) -> str:
    """The one vendor that the images of a stack name; "unknown" where they name several or none.

    An empty name does not count: a research export may keep it in some files only. A name that is no vendor's here
    does: a stack that was processed elsewhere is not its scanner's any more.
    """
    vendors = {vendor_name(name) for name in set(manufacturers) if name.strip()}
    return vendors.pop() if len(vendors) == 1 else UNKNOWN


def says_vendor(manufacturers: Iterable[str]) -> bool:
    """Whether any name is given that is meant as one, of a known vendor or not."""
    return any(not is_placeholder(name) for name in set(manufacturers))


def field_strength(value: float) -> float:
    """Tesla, or NaN for an impossible or ambiguous value.

    MagneticFieldStrength (0018,0087) is in tesla. 15000 has been seen, which can only be gauss; 1500 can only be
    millitesla; 3000 could be either and is unknown.
    """
    if math.isfinite(value) and value > FIELD_STRENGTHS_T[1]:
        readings = {_nominal(value / unit) for unit in PER_TESLA} - {None}
        return readings.pop() or math.nan if len(readings) == 1 else math.nan
    low, high = FIELD_STRENGTHS_T
    return (_nominal(value) or value) if low <= value <= high else math.nan


def agreed_field_strength(values: Iterable[float]) -> float:
    """The one field strength that the images of a stack name; NaN where they name several or none."""
    strengths = {field_strength(value) for value in set(values)}
    known = {tesla for tesla in strengths if not math.isnan(tesla)}
    return known.pop() if len(known) == 1 else math.nan


def _nominal(tesla: float) -> float | None:
    """The strength that a magnet near this one is sold as."""
    nearest = min(NOMINAL_T, key=lambda nominal: abs(nominal - tesla))
    return nearest if abs(nearest - tesla) <= NOMINAL_WITHIN * nearest else None
