"""A site's public facts: its name, its vendors with their nominal numbers of patients, and its own nominal number.

Site and coordinator write them down independently (`site.yaml`; `study.json` and `sites/NAME.json`) and both must have
the same: they divide sums, and they say which vendor's style an answer describes.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fedcmr.shared.case import VENDORS, known_vendor
from fedcmr.shared.errors import UserError


def check_vendors(vendors: Mapping[str, int], nominal_patients: int) -> None:
    """Raise where the numbers cannot be those of one site.

    Args:
        vendors: Vendor -> public nominal number of patients with scans of that vendor.
        nominal_patients: Public nominal number of distinct patients; one with scans of two vendors counts once.

    Raises:
        UserError: With what was expected and what came.
    """
    if not vendors or not set(vendors) <= set(VENDORS):
        raise UserError(f"Expected vendors to name some of {VENDORS}, got {sorted(vendors)!r}.")
    if min(vendors.values()) < 1:
        raise UserError(f"Expected vendors to give each a number of patients >= 1, got {dict(vendors)!r}.")
    least, most = max(vendors.values()), sum(vendors.values())
    if not least <= nominal_patients <= most:
        expected = (
            f"{least}, the number of its vendor"
            if len(vendors) == 1
            else (f"from {least} (the largest of its vendors' numbers) to {most} (their sum)")
        )
        raise UserError(f"Expected nominal_patients {expected}, got {nominal_patients!r}.")


def vendor_argument(text: str) -> str:
    """A vendor of a command line, in any case."""
    vendor = known_vendor(text)
    if vendor not in VENDORS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(VENDORS)}, got {text!r}")
    return vendor


def parse_vendors(words: Sequence[str], nominal_patients: int) -> dict[str, int]:
    """The value of `--vendor`: one vendor alone, or several with numbers, as `Siemens=40 Philips=20`.

    Raises:
        UserError: A word is neither, names a vendor twice, or the numbers do not go with `nominal_patients`.
    """
    vendors: dict[str, int] = {}
    for word in words:
        name, separator, number = word.partition("=")
        name = known_vendor(name)
        if name not in VENDORS:
            raise UserError(f"--vendor: expected one of {', '.join(VENDORS)}, got {word!r}")
        if name in vendors:
            raise UserError(f"--vendor: expected each vendor at most once, got {name!r} again")
        if (separator and not number.isdecimal()) or (not separator and len(words) > 1):
            raise UserError(f"--vendor: expected VENDOR=NUMBER for each of several vendors, got {word!r}")
        vendors[name] = int(number) if separator else nominal_patients
    try:
        check_vendors(vendors, nominal_patients)
    except UserError as error:
        raise UserError(f"--vendor, --nominal-patients: {error}") from None
    return vendors


def read_facts(facts: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Vendors and nominal patients of a site as JSON holds them.

    Files of versions that knew one vendor a site (`{"vendor": "GE", "nominal_patients": 40}`) are read as such.

    Raises:
        UserError: The numbers cannot be those of one site.
        KeyError, TypeError, ValueError, AttributeError: They are no such facts at all.
    """
    nominal_patients = int(facts["nominal_patients"])
    vendors = facts["vendors"] if "vendors" in facts else {facts["vendor"]: nominal_patients}
    vendors = {str(vendor): int(number) for vendor, number in vendors.items()}
    check_vendors(vendors, nominal_patients)
    return vendors, nominal_patients


def facts_line(name: str, vendors: Mapping[str, int], nominal_patients: int) -> str:
    """The facts in one line, by which a site recognises that the server counts with the same."""
    parts = ", ".join(f"{vendor}={vendors[vendor]}" for vendor in sorted(vendors))
    return f"{name}: {parts}; {nominal_patients}"
