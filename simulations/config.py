"""Settings of a study on this machine, as its command and `fedcmr.simulate` read them."""

from collections.abc import Sequence
from pathlib import Path

from fedcmr.server.settings import Config, load, with_absolute_paths


def load_study(config: str | Path, overrides: Sequence[str]) -> Config:
    """Read settings as `fedcmr.server.settings.load` does, with paths that hold in any working directory.

    A run folder is opened from other ones too: by worker processes and by Flower.

    Raises:
        UserError: See there.
    """
    return with_absolute_paths(load(config, overrides))


def default_folder(config: str | Path) -> Path:
    """The run folder where none is given."""
    return Path("runs") / Path(config).stem
