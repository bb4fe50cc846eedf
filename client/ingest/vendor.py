"""What scanners say about themselves, brought to one spelling."""

import math

UNKNOWN = "unknown"
PREFIXES = {
    "siemens": "Siemens",
    "philips": "Philips",
    "ge": "GE",
    "general electric": "GE",
    "canon": "Canon",
    "toshiba": "Canon",
    "uih": "United Imaging",
    "united imaging": "United Imaging",
    "shanghai united imaging": "United Imaging",
}
GAUSS_PER_TESLA = 10_000.0
FIELD_STRENGTHS_T = (0.2, 10.0)


def vendor_name(manufacturer: str) -> str:
    """One of `shared.case.VENDORS`, or "unknown", for a free text like "GE MEDICAL SYSTEMS" or "TOSHIBA_MEC"."""
    words = manufacturer.lower().replace("_", " ").split()
    for prefix, vendor in PREFIXES.items():
        if words[: len(prefix.split())] == prefix.split():
            return vendor
    return UNKNOWN


def field_strength(value: float) -> float:
    """Tesla; a value that can only be gauss (15000 has been seen) is converted, an impossible one becomes NaN."""
    low, high = FIELD_STRENGTHS_T
    tesla = value / GAUSS_PER_TESLA if value > high else value
    return tesla if low <= tesla <= high else math.nan
