"""A request that is only rehearsed: the site decides as it would, and works on invented patients.

What a rehearsal may reveal. The code is the one that the request itself would get before its charge, and a server may
ask for that one as often as it likes: of the patients it says whether their folder can be read and whether they are at
least `min_patients`, of test patients the first alone. "budget-exhausted" speaks of the whole plan and follows from
what servers have requested of this site, not from its patients; what is left is a number for the site alone
('fedcmr-client budget'). From there on nothing reads a patient's data: the work is done on as many invented ones as the
site's public number, its result is thrown away, and the answer holds zeros and how long that work took.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings
from fedcmr.client.release import Refused
from fedcmr.client.training import Patient, dummy_patient
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release
from fedcmr.shared.progress import console
from fedcmr.shared.records import INTERNAL_ERROR
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.shared.views import Grid


@dataclass
class Rehearsed:
    """What a rehearsal brings in the place of a charge.

    Attributes:
        planned: All that the study would release from one ledger.
        seconds: How long the work on invented patients took.
    """

    planned: list[Release]
    seconds: float = 0.0

    def work(
        self,
        ledger: Ledger | None,
        work: Callable[[], Arrays],
        *,
        delta: float,
        cap: float,
        task: str,
        key: tuple[str, int] | None = None,
    ) -> Arrays:
        """Ask the ledger whether it could charge the whole plan, and do the work. The ledger stays as it is.

        Args:
            ledger: The ledger that the request would be charged to; None for one that is not charged.
            work: On invented patients.
            delta: As in `fedcmr.client.release.charged`, like the others.
            cap: Epsilon over the life of the ledger.
            task: What the release is, for the site's own people.
            key: Key of a request that is the whole plan: where it was answered before, it costs nothing.

        Raises:
            Refused: With the ledger's code.
        """
        if ledger is not None:
            try:
                answered = key is not None and ledger.cached_reply(*key, *self.planned) is not None
                spent = ledger.check([] if answered else self.planned, delta, cap)
            except UserError as error:
                raise Refused(getattr(error, "code", INTERNAL_ERROR)) from error
            # For the site alone: this line never leaves its machine.
            console.print(
                f"rehearsal of {task}: the whole study would bring {ledger.folder} to epsilon {spent:.4g} of {cap:g}",
                highlight=False,
                soft_wrap=True,
            )
        started = time.monotonic()
        arrays = work()
        self.seconds = time.monotonic() - started
        return arrays


def invented_patients(site: SiteSettings, grid: Grid) -> list[Patient]:
    """As many as the site's public number, all of them nobody, on the generator's grid."""
    nobody = replace(dummy_patient(grid), styles=torch.zeros(len(site.vendors), len(STYLE_NAMES)))
    return [nobody] * site.nominal_patients
