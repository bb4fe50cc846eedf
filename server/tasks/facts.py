"""What the card of every trained model states about its training: the data, and the versions it was made with."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fedcmr.shared.file_names import DATASHEET_NAME
from fedcmr.shared.provenance import PUBLIC, Provenance, of_folder

LIBRARIES = ("fedcmr", "torch", "monai", "numpy")


def versions() -> str:
    """Versions of Python and of the libraries that determine the weights."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)])


def of_folders(folders: Sequence[Path]) -> str:
    """Facts about folders of cases, in sentences; for a synthetic data set they point to its datasheet."""
    synthetic = [folder.resolve().name for folder in folders if (folder / DATASHEET_NAME).is_file()]
    scanned = [folder for folder in folders if not (folder / DATASHEET_NAME).is_file()]
    sentences = []
    if synthetic:
        sentences.append(f"Synthetic data sets, described by their datasheets: {', '.join(synthetic)}.")
    sentences += [f"{folder.resolve().name}: {_scans(of_folder(folder))}" for folder in scanned]
    if not all(of_folder(folder).is_simulated for folder in scanned):
        sentences.append(
            "No privacy was applied in this training: the weights may disclose the real patients among "
            "these. Treat the file as you do the scans."
        )
    return "\n".join(sentences)


def _scans(provenance: Provenance) -> str:
    """What a training folder recorded of its scans, in a sentence."""
    if provenance.is_simulated:
        return "simulated scans, of no patient."
    if provenance.kind == PUBLIC:
        return f"real scans of a public data set. {provenance.terms}."
    return "real scans that are private, or whose origin nobody has recorded."
