"""fedcmr: hospitals train one private generator of cardiac MRI, and a study is run on what it generates.

This is the one import name of the project. In a wheel the packages lie inside this folder; in a checkout, and in the
bundle that Flower sends to a site, they lie next to it, where the project's layout wants them.
"""

from pathlib import Path

_folder = Path(__file__).parent
if not (_folder / "shared").is_dir() or (_folder / "shared").is_symlink():  # `make venv` links them for mypy alone
    __path__ = [str(_folder.parent)]
