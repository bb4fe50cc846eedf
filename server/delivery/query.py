"""What a partner may request, and how a request is refused."""

import math

import grpc

from fedcmr.shared.case import UNKNOWN, VENDORS
from fedcmr.shared.delivery.contract import ef_range
from fedcmr.shared.delivery.delivery_pb2 import Selection


class Refusal(Exception):  # noqa: N818
    """A request refused with a status: `code` and one line for the caller."""

    def __init__(self, code: grpc.StatusCode, text: str):
        super().__init__(text)
        self.code, self.text = code, text


def bad_request(text: str) -> Refusal:
    """The refusal of a request that can never be served."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def checked(selection: Selection) -> Selection:
    """The selection itself, if it is valid.

    Raises:
        Refusal: A vendor is unknown, or the range of ejection fractions is not one within [0, 1].
    """
    strange = [vendor for vendor in selection.vendors if vendor not in (*VENDORS, UNKNOWN)]
    if strange or len(selection.vendors) > len(VENDORS) + 1:
        raise bad_request(f"expected vendors among {', '.join(VENDORS)}, each once")
    low = selection.min_ef if selection.HasField("min_ef") else 0.0
    high = selection.max_ef if selection.HasField("max_ef") else 1.0
    if not 0 <= low <= high <= 1:  # also false where one is NaN
        raise bad_request("expected 0 <= lowest <= highest ejection fraction <= 1")
    return selection


def described(selection: Selection) -> str:
    """A selection as text for the audit log; pass a checked one."""
    low, high = ef_range(selection)
    vendors = "+".join(selection.vendors) or "all"
    return vendors if math.isinf(low) and math.isinf(high) else f"{vendors} ef {low:g}..{high:g}"
