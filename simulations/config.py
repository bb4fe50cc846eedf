"""Settings of a study on this machine, as its command and `fedcmr.simulate` read them."""

from collections.abc import Sequence
from pathlib import Path

from fedcmr.server.settings import Config, load


def load_study(config: str | Path, overrides: Sequence[str]) -> Config:
    """Read settings as `fedcmr.server.settings.load` does, with paths that hold in any working directory.

    A run folder is opened from other ones too: by worker processes and by Flower.

    Raises:
        UserError: See there.
    """
    settings = load(config, overrides)
    settings.prior = settings.prior and str(Path(settings.prior).resolve())
    settings.data_root = settings.data_root and str(Path(settings.data_root).resolve())
    return settings


def default_folder(config: str | Path) -> Path:
    """The run folder where none is given."""
    return Path("runs") / Path(config).stem
