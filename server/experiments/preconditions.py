"""What a study needs of this machine, asked before a run folder is made or a site is called."""

from pathlib import Path

from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import tasks_of
from fedcmr.shared.device import pick_device
from fedcmr.shared.models.prior import load_prior


def check_can_run(config: Config) -> None:
    """Check device, tasks and public prior.

    Raises:
        UserError: The device is not there, a task is unknown, or the prior cannot be read.
    """
    pick_device(config.device)
    tasks_of(config)
    load_prior(None if config.prior is None else Path(config.prior))
