"""What `prepare` and `import` let their user say about how scans become cases."""

import argparse
from collections.abc import Callable
from pathlib import Path

from fedcmr.client.deidentify import KEY_NAME
from fedcmr.shared.case import VENDORS
from fedcmr.shared.cores import num_cores
from fedcmr.shared.site_facts import vendor_argument


def add_case_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Add the options.

    Args:
        parser: Of the command.
        positive: Parses a whole number from 1.
    """
    patients = parser.add_argument_group("who and what is in the scans")
    patients.add_argument(
        "--vendor",
        type=vendor_argument,
        metavar="V",
        help=f"vendor of the scanners, one of {', '.join(VENDORS)}, for scans that name none; overrides nothing "
        "that scans say. Repeat the call with it to give a vendor to cases that had none",
    )
    patients.add_argument(
        "--one-study-one-patient",
        action="store_true",
        help="of DICOM, take each study without a PatientID, or with a placeholder such as 0000 "
        "or UNKNOWN, for a patient of its own: only if you know that no patient has two such studies; "
        "otherwise they are refused",
    )
    patients.add_argument(
        "--keep-suspected",
        action="store_true",
        help="keep cases whose scans seem to show letters, "
        "perhaps a name: for whoever has looked at them; they are left out otherwise",
    )
    contours = parser.add_argument_group("contours that nobody drew")
    contours.add_argument(
        "--contours",
        choices=("drawn", "auto"),
        default="drawn",
        help="auto: a segmenter finds what nobody drew; it is kept where it is plausible and the segmenter sure of it, "
        "and never counts as truth (default: %(default)s)",
    )
    contours.add_argument(
        "--segmenter",
        type=Path,
        metavar="FILE",
        help="file of a study's own segmenter, which finds the heart and the contours (default: the one that ships)",
    )
    machine = parser.add_argument_group("this machine")
    machine.add_argument("--key", type=Path, help=f"file with the pseudonyms' secret (default: {KEY_NAME} next to DST)")
    machine.add_argument(
        "--num-processes",
        type=positive,
        default=num_cores(),
        help="child processes that read the scans (default: one per core that this process may use, %(default)s)",
    )
