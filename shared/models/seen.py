"""Whether a public prior has learnt from a folder's patients, who are then neither private nor a test of it."""

import contextlib
from pathlib import Path

from fedcmr.shared.case import fingerprint, load_case, read_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior


def check_unseen(prior: Prior, folder: Path) -> None:
    """Raise where the prior has learnt from a patient of a folder of cases.

    Patients are known again by their arrays: a scan that was prepared otherwise is not.

    Raises:
        UserError: It has, from so many; or the folder's index is damaged.
    """
    if not prior.has_seen:
        return
    num_seen = 0
    for info in read_index(folder):
        with contextlib.suppress(UserError):  # a case that cannot be read takes no part
            num_seen += fingerprint(load_case(folder, info)) in prior.has_seen
    if num_seen:
        raise UserError(
            f"the public prior has learnt from {num_seen} patients of {folder}, who cannot be private or test patients "
            "of a study with it: leave them out, or take another prior"
        )
