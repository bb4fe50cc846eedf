"""fedcmr: hospitals train one private generator of cardiac MRI, and a study is run on what it generates.

This is the one import name of the project. In a wheel the packages lie inside this folder; in a checkout, and in the
bundle that Flower sends to a site, they lie next to it, where the project's layout wants them.

`fedcmr.simulate`, `fedcmr.load_cases` and `fedcmr.synthesize` are imported when they are first used, and so are the
two apps that Flower runs. Flower knows them by these names and not by their modules': its simulation looks for the one
in one thread while it imports the other in another, and would find a module of a package that is half imported missing.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcmr.client.app import app as client_app
    from fedcmr.server.app import app as server_app
    from fedcmr.shared.case import load_cases
    from fedcmr.simulations.api import simulate, synthesize

__all__ = ["client_app", "load_cases", "server_app", "simulate", "synthesize"]

_HOMES = {  # name: module and attribute
    "client_app": ("fedcmr.client.app", "app"),
    "load_cases": ("fedcmr.shared.case", "load_cases"),
    "server_app": ("fedcmr.server.app", "app"),
    "simulate": ("fedcmr.simulations.api", "simulate"),
    "synthesize": ("fedcmr.simulations.api", "synthesize"),
}

_folder = Path(__file__).parent
if not (_folder / "shared").is_dir() or (_folder / "shared").is_symlink():  # `make venv` links them for mypy alone
    __path__ = [str(_folder.parent)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcmr' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
