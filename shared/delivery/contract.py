"""Names and limits of the delivery service that the messages themselves do not hold."""

from math import inf, isnan

from fedcmr.shared.case import CaseInfo
from fedcmr.shared.delivery.delivery_pb2 import CaseRow, Selection

PROTOCOL = 1
SERVICE = "fedcmr.delivery.v1.Delivery"
AUTHORIZATION, BEARER = "authorization", "Bearer "

CHUNK_BYTES = 256 * 1024
"""The pieces in which a case's file travels."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""No message is longer: the datasheet's is the longest."""
MAX_CASE_BYTES = 16 * 2**20
"""A case's file as it travels; one of 16 slices takes about 1 MB."""
MAX_CASES = 1_000_000
MAX_SEED = 2**32 - 1


def to_row(info: CaseInfo) -> CaseRow:
    """A row of `cases.csv` as a message."""
    return CaseRow(
        pseudonym=info.pseudonym,
        vendor=info.vendor,
        field_strength_t=info.field_strength_t,
        ef=info.ef,
        group=info.group,
        sex=info.sex,
        pathology=info.pathology,
    )


def matches(info: CaseInfo, selection: Selection) -> bool:
    """Whether a case is of a selection's vendors and has an ejection fraction in its range."""
    if selection.vendors and info.vendor not in selection.vendors:
        return False
    low, high = ef_range(selection)
    return low <= info.ef <= high if not isnan(info.ef) else (low, high) == (-inf, inf)


def ef_range(selection: Selection) -> tuple[float, float]:
    """The lowest and highest ejection fraction requested; infinite where none is."""
    low = selection.min_ef if selection.HasField("min_ef") else -inf
    high = selection.max_ef if selection.HasField("max_ef") else inf
    return low, high
