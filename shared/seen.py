"""Whether a study's public part knows a folder's patients, who are then neither private nor a test of it.

Read from the header of the prior's file, without a network: a site asks before it joins.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedcmr.shared.case import fingerprint, load_case, read_index
from fedcmr.shared.checkpoint import check_header
from fedcmr.shared.errors import UserError


def seen_by(prior: Path) -> frozenset[str]:
    """Fingerprints of the public patients whom a prior has learnt from; see `fedcmr.shared.case.fingerprint`.

    Raises:
        UserError: The file is missing, or no prior of this version.
    """
    try:
        check_header(prior)
        with safe_open(prior, framework="numpy") as file:
            return fingerprints_in(file.metadata() or {})
    except OSError:
        raise UserError(f"{prior} cannot be read: give a prior made by 'fedcmr-server pretrain'") from None
    except (SafetensorError, TypeError, ValueError):
        raise UserError(f"{prior} is not a prior of this version: make one with 'fedcmr-server pretrain'") from None


def fingerprints_in(made_by: Mapping[str, str]) -> frozenset[str]:
    """The same, of what the header of a prior's file says."""
    return frozenset(json.loads(made_by.get("has_seen", "[]")))


def check_unseen(
    has_seen: frozenset[str],
    folder: Path,
    who: str = "the public prior has learnt from",
    instead: str = "another prior",
) -> None:
    """Raise where patients of a folder of cases are known to a study's public part.

    Patients are known again by their arrays: a scan that was prepared otherwise is not.

    Args:
        has_seen: Fingerprints of those who are known.
        folder: The folder.
        who: Who knows them, in words that their number follows.
        instead: What to take in its place, for the remedy.

    Raises:
        UserError: So many are; or the folder's index is damaged.
    """
    if not has_seen:
        return
    num_seen = 0
    for info in read_index(folder):
        with contextlib.suppress(UserError):  # a case that cannot be read takes no part
            num_seen += fingerprint(load_case(folder, info)) in has_seen
    if num_seen:
        raise UserError(
            f"{who} {num_seen} patients of {folder}, who cannot be private or test patients of a study with it: leave "
            f"them out, or take {instead}"
        )
