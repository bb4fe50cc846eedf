"""fedcmr: hospitals train one private generator of cardiac MRI, and a study is run on what it generates.

This is the one import name of the project. In a wheel the packages lie inside this folder; in a checkout, and in the
bundle that Flower sends to a site, they lie next to it, where the project's layout wants them.

`fedcmr.simulate`, `fedcmr.load_cases` and `fedcmr.synthesize` are imported when they are first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcmr.shared.case import load_cases
    from fedcmr.simulations.api import simulate, synthesize

__all__ = ["load_cases", "simulate", "synthesize"]

_folder = Path(__file__).parent
if not (_folder / "shared").is_dir() or (_folder / "shared").is_symlink():  # `make venv` links them for mypy alone
    __path__ = [str(_folder.parent)]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fedcmr' has no attribute {name!r}")
    return getattr(import_module("fedcmr.shared.case" if name == "load_cases" else "fedcmr.simulations.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
