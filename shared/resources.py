"""Files next to the code that Flower's app bundle cannot carry: weights and the report's template."""

import sys
from pathlib import Path


def resource(relative: str) -> Path:
    """A file of this project by its path from the root: next to this code, else in the installed package.

    A bundle that Flower has unpacked comes first on `sys.path` and holds code and settings only; the package that is
    installed on the machine follows it there.
    """
    roots = [Path(__file__).resolve().parent.parent]
    roots += [Path(entry) / folder for entry in sys.path for folder in ("", "fedcmr")]  # a checkout, a wheel
    return next((root / relative for root in roots if (root / relative).is_file()), roots[0] / relative)
