"""What a study needs of this machine, asked before a run folder is made or a site is called."""

from collections.abc import Iterable
from pathlib import Path

from fedcmr.server.generation.guide_scans import read_guides
from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import tasks_of
from fedcmr.shared.device import pick_device
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.seen import check_unseen


def check_can_run(config: Config) -> None:
    """Check device, tasks, public prior and guides.

    Raises:
        UserError: The device is not there, a task is unknown, or the prior or the guides cannot be read.
    """
    pick_device(config.device)
    tasks_of(config)
    load_prior(None if config.prior is None else Path(config.prior))
    read_guides(config.synthesis.guides)


def check_patients_unseen(config: Config, folders: Iterable[Path]) -> None:
    """Check that the study's public part knows nobody of its private and test patients.

    Args:
        config: Names the prior, which has learnt from public scans, and the guides, which are public scans.
        folders: Of the patients' cases.

    Raises:
        UserError: It knows somebody.
    """
    has_seen = load_prior(None if config.prior is None else Path(config.prior)).has_seen
    guides = read_guides(config.synthesis.guides)
    for folder in folders:
        check_unseen(has_seen, folder)
        if guides:
            check_unseen(guides.patients, folder, "synthesis.guides holds", "other guides")
